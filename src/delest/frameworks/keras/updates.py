"""Adam's update in one pass through memory on TensorFlow and torch, where Keras makes one for each of a dozen operators; XLA does so on JAX by itself.

The step is Keras's own (epsilon is added before the correction), to rounding: "Adam: A Method for Stochastic Optimization", section 2, https://arxiv.org/abs/1412.6980.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
from keras import ops

FUSED = ("Adam", "AdamW")


@contextlib.contextmanager
def fused(optimizer: Any) -> Iterator[None]:
    """Let Keras's Adam or AdamW update so while the context is open. Subclasses, AMSGrad and what is not all in fp32 on a CPU stay as they are."""
    under = keras.backend.backend()
    kind = type(optimizer)
    known = kind.__name__ in FUSED and kind.__module__.startswith("keras.src.") and not optimizer.amsgrad
    if not known or under not in ("tensorflow", "torch"):
        yield
        return
    name = "update_step" if under == "tensorflow" else "_parallel_update_step"
    own = getattr(optimizer, name)
    object.__setattr__(optimizer, name, (_by_tensorflow if under == "tensorflow" else _by_torch)(optimizer, own))
    try:
        yield
    finally:
        object.__delattr__(optimizer, name)


def _by_tensorflow(optimizer: Any, own: Callable[..., None]) -> Callable[..., None]:
    import tensorflow as tf

    def update(gradient: Any, variable: Any, learning_rate: Any) -> None:
        if not isinstance(gradient, tf.Tensor) or not gradient.dtype == variable.dtype == tf.float32:
            own(gradient, variable, learning_rate)
            return
        place, taken = optimizer._get_variable_index(variable), ops.cast(optimizer.iterations + 1, "float32")
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=optimizer._momentums[place].value.handle,
            v=optimizer._velocities[place].value.handle,
            beta1_power=tf.pow(optimizer.beta_1, taken),
            beta2_power=tf.pow(optimizer.beta_2, taken),
            lr=ops.cast(learning_rate, "float32"),
            beta1=optimizer.beta_1,
            beta2=optimizer.beta_2,
            epsilon=optimizer.epsilon,
            grad=gradient,
        )

    return update


def _by_torch(optimizer: Any, own: Callable[..., None]) -> Callable[..., None]:
    import torch

    def update(gradients: Sequence[Any], variables: Sequence[Any], learning_rate: Any) -> None:
        places = [optimizer._get_variable_index(variable) for variable in variables]
        values = [variable.value.detach() for variable in variables]
        first = [optimizer._momentums[place].value.detach() for place in places]
        second = [optimizer._velocities[place].value.detach() for place in places]
        if not all(_plain(one) for one in (*values, *first, *second)) or not all(
            one.dtype == torch.float32 for one in gradients
        ):
            own(gradients, variables, learning_rate)
            return
        taken = int(optimizer.iterations) + 1
        torch._fused_adam_(
            values,
            [gradient.contiguous() for gradient in gradients],
            first,
            second,
            [],
            [torch.tensor(float(taken))] * len(values),
            lr=float(learning_rate),
            beta1=optimizer.beta_1,
            beta2=optimizer.beta_2,
            weight_decay=0.0,  # Keras has decayed the weights already
            eps=optimizer.epsilon / math.sqrt(1 - optimizer.beta_2**taken),  # torch's is added after the correction
            amsgrad=False,
            maximize=False,
        )

    return update


def _plain(tensor: Any) -> bool:
    return bool(tensor.device.type == "cpu" and str(tensor.dtype) == "torch.float32" and tensor.is_contiguous())
