"""Training steps of Keras's layers by faster kernels of the framework beneath, with the same weights and, to rounding, the same results.

Batch normalisation, which Keras composes of six operators over the whole batch, is one on torch and TensorFlow. On JAX the gradient of pooling and what depthwise and pointwise
convolutions do, for which XLA has slow loops on a CPU, are comparisons, sums and matrix products. Evaluation, saving and export see the layers as they are.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import ops

from delest.frameworks.keras.optimizers import layers_of
from delest.frameworks.keras.precision import in_bf16, in_fp32

Call = Callable[..., Any]
# Of a layer's faster call, by its type; None where it does more than such a call can.
Makers = dict[type, Callable[[Any], Call | None]]


class Kernels:
    """The layers of one model that have a faster way to train here; a subclass is left as it is. With `bf16` all of them compute in it too."""

    def __init__(self, model: keras.Model, *, bf16: bool = False):
        makers, self._calls = _makers(), []
        self._lowered = in_fp32(model) if bf16 else []
        for layer in layers_of(model):
            maker = makers.get(type(layer))
            if maker is not None and "call" not in vars(layer) and (call := maker(layer)) is not None:
                self._calls.append((layer, call))

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Let the layers compute so while the context is open."""
        for layer, call in self._calls:
            object.__setattr__(layer, "call", call)
        try:
            with in_bf16(self._lowered):
                yield
        finally:
            for layer, _ in self._calls:
                object.__delattr__(layer, "call")


# Batch normalisation


def _normalisation(layer: Any, fused: Callable[..., Any]) -> Call | None:
    """The call of a batch normalisation over the last axis; None for one that does more."""
    if not layer.built or layer.renorm or layer.synchronized or layer.axis not in (-1, len(layer._reduction_axes)):
        return None
    own = layer.call

    def call(inputs: Any, training: Any = None, mask: Any = None) -> Any:
        dtype = keras.backend.result_type(inputs.dtype, "float32")
        if not training or not layer.trainable or mask is not None or dtype != "float32":
            return own(inputs, training=training, mask=mask)
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


# On JAX, for a CPU


def _max_pooling(layer: Any) -> Call | None:
    """Of windows side by side: the gradient goes to each window's first highest value, as XLA's does."""
    import jax
    import jax.numpy as jnp

    if layer.pool_size != layer.strides or layer.padding != "valid" or not _channels_last(layer):
        return None
    height, width = layer.pool_size

    def windows(x: Any) -> list[Any]:
        return [x[:, i::height, j::width] for i in range(height) for j in range(width)]

    @jax.custom_vjp
    def highest(x: Any) -> Any:
        return functools.reduce(jnp.maximum, windows(x))

    def forward(x: Any) -> Any:
        y = highest(x)
        return y, (x, y)

    def backward(kept: Any, gradient: Any) -> Any:
        x, y = kept
        taken, parts = jnp.zeros(y.shape, bool), []
        for one in windows(x):
            hit = (one == y) & ~taken
            taken |= hit
            parts.append(jnp.where(hit, gradient, 0))
        rows = [jnp.stack(parts[i * width : (i + 1) * width], axis=3) for i in range(height)]
        return (jnp.stack(rows, axis=2).reshape(x.shape),)

    highest.defvjp(forward, backward)

    def call(inputs: Any) -> Any:
        rows, columns = inputs.shape[1] // height * height, inputs.shape[2] // width * width
        return highest(inputs[:, :rows, :columns])

    return call


def _pointwise(layer: Any) -> Call | None:
    """A convolution by kernels of one pixel, as a matrix product."""
    if layer.kernel_size != (1, 1) or layer.groups != 1 or not _channels_last(layer):
        return None
    down, right = layer.strides
    own = layer.call

    def call(inputs: Any) -> Any:
        if not _single(inputs, layer.kernel):
            return own(inputs)
        return _finished(layer, ops.matmul(inputs[:, ::down, ::right], layer.kernel[0, 0]))

    return call


def _depthwise(layer: Any) -> Call | None:
    """A depthwise convolution as a sum of shifted images, each times its weight of each channel."""
    import jax
    import jax.numpy as jnp

    if layer.depth_multiplier != 1 or layer.dilation_rate != (1, 1) or not _channels_last(layer):
        return None
    down, right = layer.strides
    own = layer.call

    def call(inputs: Any) -> Any:
        kernel = layer.kernel
        if not _single(inputs, kernel):
            return own(inputs)
        height, width = kernel.shape[:2]
        around = jax.lax.padtype_to_pads(inputs.shape[1:3], (height, width), layer.strides, layer.padding.upper())
        padded = jnp.pad(inputs, ((0, 0), *around, (0, 0)))
        rows, columns = (
            (size - kernel_size) // stride + 1
            for size, kernel_size, stride in zip(padded.shape[1:3], (height, width), layer.strides, strict=True)
        )
        total: Any = 0.0
        for i in range(height):
            for j in range(width):
                shifted = padded[:, i : i + (rows - 1) * down + 1 : down, j : j + (columns - 1) * right + 1 : right]
                total = total + shifted * kernel[i, j, :, 0]
        return _finished(layer, total)

    return call


def _single(*tensors: Any) -> bool:
    """Whether all are of single precision: in bf16 sums in another order differ by more than rounding."""
    return all(keras.backend.standardize_dtype(tensor.dtype) == "float32" for tensor in tensors)


def _channels_last(layer: Any) -> bool:
    return bool(layer.data_format == "channels_last")


def _finished(layer: Any, outputs: Any) -> Any:
    """What a convolution does after its products."""
    outputs = outputs + layer.bias if layer.use_bias else outputs
    return outputs if layer.activation is None else layer.activation(outputs)


def _makers() -> Makers:
    under = keras.backend.backend()
    if under == "jax":
        import jax

        found: Makers = {
            keras.layers.MaxPooling2D: _max_pooling,
            keras.layers.Conv2D: _pointwise,
            keras.layers.DepthwiseConv2D: _depthwise,
        }
        return found if jax.default_backend() == "cpu" else {}
    fused = {"torch": _normalised_by_torch, "tensorflow": _normalised_by_tensorflow}.get(under)
    return {} if fused is None else {keras.layers.BatchNormalization: functools.partial(_normalisation, fused=fused)}
