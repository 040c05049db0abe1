"""Keras jobs of the benchmarks: each a factory, arrays that it learns from, a batch. `KERAS_BACKEND` says on what they compute."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import layers

import delest

RANDOM = np.random.default_rng(0)
EPOCHS = {"mlp": 5, "recommender": 20}  # others: 3


def job(name: str, model: Any, inputs: Any, classes: int, batch: int) -> delest.Job:
    rows = len(next(iter(inputs.values())) if isinstance(inputs, dict) else inputs)
    targets = np.arange(rows) % classes
    data: Any = {**inputs, "class": targets} if isinstance(inputs, dict) else (inputs, targets)
    target = "class" if isinstance(inputs, dict) else None
    epochs = EPOCHS.get(name, 3)
    recipe = delest.Recipe(epochs=epochs, label_smoothing=0.0, optimizer="adam", patience=epochs)
    return delest.Job(model=model, data=data, target=target, batch_size=batch, recipe=recipe, name=name)


def images(rows: int, side: int, channels: int = 3) -> Any:
    return RANDOM.integers(0, 255, (rows, side, side, channels)).astype(np.uint8)


def block(x: Any, width: int, stride: int = 1) -> Any:
    x = layers.Conv2D(width, 3, strides=stride, padding="same", use_bias=False)(x)
    return layers.ReLU()(layers.BatchNormalization()(x))


def cnn() -> keras.Model:
    inputs = x = keras.Input((32, 32, 3))
    for width in (32, 64, 128):
        x = layers.MaxPooling2D()(block(block(x, width), width))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def vgg() -> keras.Model:
    body = []
    for width in (32, 64, 128):
        body += [layers.Conv2D(width, 3, padding="same", activation="relu") for _ in range(2)] + [layers.MaxPooling2D()]
    ends = [layers.Flatten(), layers.Dense(256, activation="relu"), layers.Dropout(0.3), layers.Dense(10)]
    return keras.Sequential([keras.Input((48, 48, 3)), *body, *ends])


def resnet() -> keras.Model:
    inputs = x = keras.Input((32, 32, 3))
    x = block(x, 32)
    for width, stride in ((32, 1), (64, 2), (128, 2)):
        y = layers.BatchNormalization()(layers.Conv2D(width, 3, padding="same", use_bias=False)(block(x, width, stride)))
        x = x if stride == 1 else layers.Conv2D(width, 1, strides=stride)(x)
        x = layers.ReLU()(layers.Add()([x, y]))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def mobilenet() -> keras.Model:
    base = keras.applications.MobileNetV2((64, 64, 3), alpha=0.5, weights=None, include_top=False, pooling="avg")
    return keras.Sequential([keras.Input((64, 64, 3)), base, layers.Dense(10)])


def unet() -> keras.Model:
    inputs = x = keras.Input((48, 48, 3))
    kept = []
    for width in (16, 32):
        x = block(x, width)
        kept.append(x)
        x = layers.MaxPooling2D()(x)
    x = block(x, 64)
    for width in (32, 16):
        x = layers.Conv2DTranspose(width, 2, strides=2)(x)
        x = block(layers.Concatenate()([x, kept.pop()]), width)
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalMaxPooling2D()(x)))


def mlp() -> keras.Model:
    body = [layers.Dense(1024, activation="relu") for _ in range(3)]
    return keras.Sequential([keras.Input((256,)), *body, layers.Dense(10)])


def transformer() -> keras.Model:
    tokens = keras.Input((64,), dtype="int64")
    x = layers.Embedding(2000, 128)(tokens)
    for _ in range(2):
        y = layers.LayerNormalization()(x)
        x = layers.Add()([x, layers.MultiHeadAttention(4, 32)(y, y)])
        y = layers.Dense(128)(layers.Dense(512, activation="gelu")(layers.LayerNormalization()(x)))
        x = layers.Add()([x, y])
    return keras.Model(tokens, layers.Dense(10)(layers.GlobalAveragePooling1D()(x)))


def recommender() -> keras.Model:
    pairs = keras.Input((2,), dtype="int64")
    user = layers.Flatten()(layers.Embedding(20_000, 64)(pairs[:, 0:1]))
    item = layers.Flatten()(layers.Embedding(5_000, 64)(pairs[:, 1:2]))
    x = layers.Concatenate()([user, item, layers.Multiply()([user, item])])
    for width in (256, 128):
        x = layers.Dense(width, activation="relu")(x)
    return keras.Model(pairs, layers.Dense(10)(x))


def numbers(rows: int, width: int) -> Any:
    return RANDOM.normal(size=(rows, width)).astype(np.float32)


def whole_numbers(rows: int, most: tuple[int, ...]) -> Any:
    return np.stack([RANDOM.integers(0, high, rows) for high in most], axis=1)


JOBS = {
    "cnn": lambda: job("cnn", cnn, images(2560, 32), 10, 256),
    "vgg": lambda: job("vgg", vgg, images(1280, 48), 10, 128),
    "resnet": lambda: job("resnet", resnet, images(2560, 32), 10, 256),
    "mobilenet": lambda: job("mobilenet", mobilenet, images(1280, 64), 10, 128),
    "unet": lambda: job("unet", unet, images(1280, 48), 10, 128),
    "mlp": lambda: job("mlp", mlp, numbers(40_960, 256), 10, 2048),
    "transformer": lambda: job("transformer", transformer, whole_numbers(2560, (2000,) * 64), 10, 256),
    "recommender": lambda: job("recommender", recommender, whole_numbers(81_920, (20_000, 5_000)), 10, 4096),
}


def __getattr__(name: str) -> Any:
    """`keras_models.py:cnn_job` and so on: only what is asked for is drawn."""
    if name.endswith("_job") and name.removesuffix("_job") in JOBS:
        return JOBS[name.removesuffix("_job")]()
    raise AttributeError(name)
