"""Training steps of Keras's layers by faster kernels of the framework beneath, with the same weights and, to rounding, the same results.

Batch normalisation, which Keras composes of six operators over the whole batch, is one on torch and TensorFlow; gradients of convolutions and of pooling,
for which XLA has slow loops on a CPU, are matrix products and comparisons on JAX. Evaluation, saving and export see the layers as they are.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
from keras import ops

from delest.frameworks.keras.optimizers import layers_of

Call = Callable[..., Any]


class Kernels:
    """The layers of one model that have a faster way to train here."""

    def __init__(self, model: keras.Model):
        makers = _MAKERS.get(keras.backend.backend(), {})
        found = [(layer, makers[type(layer)](layer)) for layer in layers_of(model) if type(layer) in makers and "call" not in vars(layer)]
        self._calls = [(layer, call) for layer, call in found if call is not None]

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Let the layers compute so while the context is open."""
        for layer, call in self._calls:
            object.__setattr__(layer, "call", call)
        try:
            yield
        finally:
            for layer, _ in self._calls:
                object.__delattr__(layer, "call")


# Batch normalisation


def _normalisation(layer: Any, fused: Callable[..., Any]) -> Call | None:
    """The call of a batch normalisation over the last axis; None for one that does more."""
    if layer.renorm or layer.synchronized or layer.axis not in (-1, len(layer.input_spec.axes and layer._reduction_axes)):
        return None
    own = layer.call

    def call(inputs: Any, training: Any = None, mask: Any = None) -> Any:
        if not training or not layer.trainable or mask is not None:
            return own(inputs, training=training, mask=mask)
        dtype = keras.backend.result_type(inputs.dtype, "float32")
        x = ops.cast(inputs, dtype)
        given = (layer.gamma if layer.scale else None, layer.beta if layer.center else None)
        gamma, beta = (None if weight is None else ops.cast(weight, dtype) for weight in given)
        outputs, mean, variance = fused(x, gamma, beta, layer.epsilon)
        for kept, new in ((layer.moving_mean, mean), (layer.moving_variance, variance)):
            kept.assign(ops.cast(kept, dtype) * layer.momentum + new * (1.0 - layer.momentum))
        return ops.cast(outputs, layer.compute_dtype)

    return call


def _normalised_by_torch(x: Any, gamma: Any, beta: Any, epsilon: float) -> tuple[Any, Any, Any]:
    import torch

    channels_second = x.movedim(-1, 1)
    y, mean, scale = torch.native_batch_norm(channels_second, gamma, beta, None, None, True, 0.0, epsilon)
    return y.movedim(1, -1), mean.detach(), scale.detach() ** -2 - epsilon


def _normalised_by_tensorflow(x: Any, gamma: Any, beta: Any, epsilon: float) -> tuple[Any, Any, Any]:
    import tensorflow as tf

    width, none = x.shape[-1], tf.zeros(0)
    shape = tf.shape(x)
    rows = tf.reshape(x, (-1, 1, 1, width)) if x.shape.rank != 4 else x
    y, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=rows,
        scale=tf.ones(width) if gamma is None else gamma,
        offset=tf.zeros(width) if beta is None else beta,
        mean=none,
        variance=none,
        epsilon=epsilon,
        is_training=True,
    )
    count = tf.cast(tf.size(x) // width, variance.dtype)
    biased = variance * (count - 1) / count  # as Keras has it
    return tf.reshape(y, shape), tf.stop_gradient(mean), tf.stop_gradient(biased)


