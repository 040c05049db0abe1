"""Muon: momentum whose update of each weight matrix is made orthogonal by a Newton-Schulz iteration.

Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks",
https://kellerjordan.github.io/posts/muon/. torch.optim.Muon iterates in bf16, which processors without bf16 units run many
times slower than fp32 (docs/log.md); this one keeps the weights' own precision and takes convolution kernels as
[out, in * height * width] matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # the quintic of the source, steep at zero
_ITERATIONS = 5


def orthogonalize(matrix: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix to [M, N], roughly: all singular values come to lie in about [0.7, 1.2]."""
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, for parameters with two or more dimensions."""

    def __init__(self, params: Iterable[Any], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"]).reshape(len(parameter), -1)
        update = orthogonalize(update)
        # Tall matrices move further, so that every output changes at a like rate (the source's scale).
        scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update.reshape(parameter.shape), alpha=-group["lr"] * scale)
