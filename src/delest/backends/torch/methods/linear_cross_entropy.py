"""Cross-entropy of a linear layer's outputs, chunk by chunk: loss and gradients without the outputs of all rows.

Source: Liger kernel, arXiv 2410.10989, section 3.2: gradients are made in the forward pass and multiplied in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from delest.backends.torch.methods.blocks import slices


@dataclass(frozen=True)
class Settings:
    parts: int
    dtype: torch.dtype  # of the logits
    weight: Tensor | None  # of the classes
    ignore_index: int
    mean: bool
    label_smoothing: float

    def shares(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Of each row in the loss: by its own class, and by the smoothing over all classes, without their factors; [N] each."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        counts = (target != self.ignore_index).to(dtype)
        own = (
            counts
            if self.weight is None
            else counts * self.weight.to(dtype)[torch.where(target != self.ignore_index, target, 0)]
        )
        if self.mean:
            counts, own = counts / own.sum(), own / own.sum()
        return own * (1 - self.label_smoothing), counts * self.label_smoothing


class LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of a linear layer: rows are [N, D], weight [V, D], bias [V] or None, target [N]; a scalar."""

    @staticmethod
    def forward(ctx: Any, settings: Settings, rows: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
        _, *needs, _ = ctx.needs_input_grad
        found = [
            torch.zeros_like(one) if need and one is not None else None
            for one, need in zip((rows, weight, bias), needs, strict=True)
        ]
        own, even = settings.shares(target)
        device = rows.device.type
        computing = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype
        matrix, offset = weight.to(computing), None if bias is None else bias.to(computing)
        total = torch.zeros((), dtype=own.dtype, device=rows.device)
        with torch.autocast(device, enabled=False):
            for chunk in slices(len(rows), settings.parts):
                part = rows[chunk].to(computing)
                loss, gradient = _differentiated(
                    settings, F.linear(part, matrix, offset), target[chunk], own[chunk], even[chunk]
                )
                total += loss
                _add(found, chunk, gradient.to(computing), part, matrix)
                del gradient  # or the next chunk would be made beside it
        ctx.save_for_backward(*(one for one in found if one is not None))
        ctx.there = [one is not None for one in found]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kept = iter(ctx.saved_tensors)
        found = [next(kept) if there else None for there in ctx.there]
        return (None, *(None if one is None else one.mul_(gradient) for one in found), None)


def _differentiated(settings: Settings, logits: Tensor, target: Tensor, own: Tensor, even: Tensor) -> tuple[Tensor, Tensor]:
    """A chunk's share of the loss, and its gradient in the place of the logits [N, V]; in fp32 at the least.

    With p = softmax(z) a row costs own (log sum exp(z) - z_t) + even / V sum_c w_c (log sum exp(z) - z_c), of which the gradient is
    own (p - onehot(t)) + even / V (p sum(w) - w).
    """
    z, classes, weight = logits.to(own.dtype), logits.shape[1], settings.weight
    target = torch.where(target != settings.ignore_index, target, 0)[:, None]
    total = classes if weight is None else weight.sum()
    z -= z.amax(1, keepdim=True)
    picked = z.gather(1, target).squeeze(1)
    spread = 0 if not settings.label_smoothing else z.sum(1) if weight is None else z @ weight.to(z.dtype)
    sums = z.exp_().sum(1)
    logarithms = sums.log()
    loss = (own * (logarithms - picked)).sum() + (even / classes * (total * logarithms - spread)).sum()
    z *= ((own + even * total / classes) / sums)[:, None]
    z.scatter_add_(1, target, -own[:, None])
    if settings.label_smoothing and weight is None:
        z -= (even / classes)[:, None]
    elif settings.label_smoothing:
        z.addr_(even, weight.to(z.dtype), alpha=-1 / classes)  # type: ignore[union-attr]
    return loss, z


def _add(found: list[Tensor | None], chunk: slice, gradient: Tensor, part: Tensor, matrix: Tensor) -> None:
    """What a chunk's gradient by its logits adds to those of rows, weight and bias."""
    of_rows, of_weight, of_bias = found
    if of_rows is not None:
        of_rows[chunk] = gradient @ matrix
    if of_weight is not None and of_weight.dtype == gradient.dtype:
        of_weight.addmm_(gradient.T, part)
    elif of_weight is not None:
        of_weight += gradient.T @ part
    if of_bias is not None:
        of_bias += gradient.sum(0)
