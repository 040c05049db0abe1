"""The digits of examples/digits.py with a network of Keras, on TensorFlow, JAX or torch.

    KERAS_BACKEND=jax delest run examples/keras_digits.py

Needs `pip install 'delest[keras]'`. Images reach the network as Keras has them, [B, height, width, channels], standardised already;
its last layer gives scores, without a softmax.
"""

from pathlib import Path

import keras
from keras import layers

import delest


def digits() -> keras.Model:
    """Three convolutions and one hidden layer: 220,000 parameters."""
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(16, 5, strides=2, padding="same", use_bias=False),
            layers.BatchNormalization(momentum=0.9),
            layers.ReLU(),
            layers.Conv2D(32, 3, padding="same", use_bias=False),
            layers.BatchNormalization(momentum=0.9),
            layers.ReLU(),
            layers.MaxPooling2D(2),
            layers.Conv2D(64, 3, padding="same", use_bias=False),
            layers.BatchNormalization(momentum=0.9),
            layers.ReLU(),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dropout(0.3),
            layers.Dense(10),
        ]
    )


job = delest.Job(model=digits, data=Path(__file__).parent / "data" / "mnist10k.npz", name="keras-digits")
