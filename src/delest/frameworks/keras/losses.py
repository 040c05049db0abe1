"""Losses by name over `keras.ops`: the mean that is trained on, and the value of each row for evaluation.

Each is the same function as the torch jobs' of that name; class scores are logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from keras import ops


@dataclass(frozen=True)
class Loss:
    """`mean(outputs, targets)` is a scalar; `rows(outputs, targets)` is [B] without smoothing."""

    mean: Callable[[Any, Any], Any]
    rows: Callable[[Any, Any], Any]


def choose(loss: str | Callable[..., Any], target_kind: str | None, label_smoothing: float) -> Loss:
    """The loss of a job; "auto" is cross-entropy for classes (binary for a model with a single output), mean squared error for
    numbers. A function of the job's own gives a scalar, which then stands for each row."""
    if not isinstance(loss, str):
        return Loss(loss, lambda o, t: ops.broadcast_to(loss(o, t), (len(t),)))
    name = loss if loss != "auto" else ("mse" if target_kind == "number" else "cross_entropy")
    if target_kind == "tokens":
        return _of_rows(lambda o, t, smoothing: _cross_entropy(o, t, 0.0), 0.0)
    if name in ("cross_entropy", "bce"):
        return _of_rows(lambda o, t, smoothing: _classification(name, o, t, smoothing), label_smoothing)
    function = {"mse": _square, "l1": ops.abs, "huber": _huber}[name]
    return _of_rows(lambda o, t, smoothing: function(ops.reshape(_wide(o), ops.shape(t)) - _wide(t)), 0.0)


def _of_rows(values: Callable[[Any, Any, float], Any], smoothing: float) -> Loss:
    return Loss(lambda o, t: ops.mean(values(o, t, smoothing)), lambda o, t: _per_row(values(o, t, 0.0)))


def _classification(name: str, outputs: Any, targets: Any, smoothing: float) -> Any:
    """Of one logit a row for two classes where the model gives a single value."""
    if name != "bce" and len(outputs.shape) > 1 and outputs.shape[1] != 1:
        return _cross_entropy(outputs, targets, smoothing)
    logits = ops.reshape(_wide(outputs), ops.shape(targets))
    smoothed = _wide(targets) * (1 - smoothing) + smoothing / 2
    return ops.softplus(logits) - logits * smoothed


def _cross_entropy(outputs: Any, targets: Any, smoothing: float) -> Any:
    """Of scores [..., K] for class numbers [...]: the smoothed share of a label goes to all K classes alike."""
    scores = ops.log_softmax(_wide(outputs), axis=-1)
    right = ops.squeeze(ops.take_along_axis(scores, ops.expand_dims(ops.cast(targets, "int32"), -1), axis=-1), -1)
    return -(1 - smoothing) * right - smoothing * ops.mean(scores, axis=-1)


def _square(difference: Any) -> Any:
    return difference * difference


def _huber(difference: Any) -> Any:
    size = ops.abs(difference)
    return ops.where(size < 1, 0.5 * size * size, size - 0.5)


def _wide(value: Any) -> Any:
    return ops.cast(value, "float32")


def _per_row(values: Any) -> Any:
    return ops.mean(ops.reshape(values, (values.shape[0], -1)), axis=1) if len(values.shape) > 1 else values
