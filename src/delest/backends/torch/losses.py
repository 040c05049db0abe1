"""Losses by name: the mean that is trained on, and the value of each row for evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Loss:
    """`mean(outputs, targets)` is a scalar with gradient; `rows(outputs, targets)` is [B] without smoothing."""

    name: str
    mean: Callable[[Any, Any], Tensor]
    rows: Callable[[Any, Any], Tensor]


def choose(loss: str | Callable[..., Any], target_kind: str | None, label_smoothing: float) -> Loss:
    """The loss of a job; "auto" is cross-entropy for classes (binary for a model with a single output), mean squared
    error for numbers. The targets of a text are ids [B, T] and its outputs [B, T, V]; labels are smoothed for classes alone, since a text
    is judged by the loss itself."""
    if not isinstance(loss, str):
        return Loss(getattr(loss, "__name__", type(loss).__name__), loss, lambda o, t: loss(o, t).detach().expand(len(t)))
    name = loss if loss != "auto" else ("mse" if target_kind == "number" else "cross_entropy")
    if target_kind == "tokens":
        return Loss(name, lambda o, t: _of_tokens(o, t, "mean"), lambda o, t: _per_row(_of_tokens(o, t, "none").view(t.shape)))
    if name in ("cross_entropy", "bce"):
        return Loss(
            name,
            lambda o, t: _classification(name, o, t, label_smoothing, "mean"),
            lambda o, t: _per_row(_classification(name, o, t, 0.0, "none")),
        )
    function: Any = {"mse": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}[name]
    return Loss(
        name,
        lambda o, t: function(_like(o, t), t),
        lambda o, t: _per_row(function(_like(o, t), t, reduction="none")),
    )


def _classification(name: str, outputs: Tensor, targets: Tensor, smoothing: float, reduction: str) -> Tensor:
    """Cross-entropy; of one logit a row for two classes where the model gives a single value. Log-probabilities
    (a model ending in log_softmax) give the same value as logits, since log_softmax does not change them."""
    if name == "bce" or outputs.ndim == 1 or outputs.shape[1] == 1:
        logits = _wide(outputs.reshape(targets.shape))
        smoothed = targets.to(logits.dtype) * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, smoothed, reduction=reduction)
    return F.cross_entropy(_wide(outputs), targets, label_smoothing=smoothing, reduction=reduction)


def _of_tokens(outputs: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """Cross-entropy of scores [B, T, V] for ids [B, T]: a mean, or [B * T]."""
    return F.cross_entropy(_wide(outputs.flatten(0, 1)), targets.flatten(), reduction=reduction)


def _wide(outputs: Tensor) -> Tensor:
    """Half precision as fp32; fp64 stays, or a comparison in it would end in fp32."""
    return outputs if outputs.dtype == torch.float64 else outputs.float()


def _like(outputs: Tensor, targets: Tensor) -> Tensor:
    """[B, 1] outputs for [B] targets lose the last dimension; broadcasting [B, 1] against [B] would give [B, B]."""
    return outputs.reshape(targets.shape) if outputs.numel() == targets.numel() else outputs


def _per_row(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1).mean(1) if values.ndim > 1 else values
