"""AdamW whose two moments take a byte, or half a byte, each (`moments.py`). AdamW: arXiv 1711.05101."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from delest.backends.torch.moments import CODINGS, Coding
from delest.backends.torch.piecewise import PiecewiseOptimizer, counter, flat, laid_out_like, pieces
from delest.methods.optimizer_state import LEAST


class QuantisedAdamW(PiecewiseOptimizer):
    """AdamW with decoupled weight decay; tensors below `methods.optimizer_state.LEAST` elements keep fp32 moments."""

    codings: ClassVar[tuple[Coding, Coding]]

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def zero(self, parameter: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = {"step": counter(parameter)}
        for coding in self.codings:
            name = coding.name
            if parameter.numel() < LEAST:
                state[name] = torch.zeros_like(parameter, dtype=torch.float32, memory_format=torch.preserve_format)
            else:
                state[f"{name}_codes"], state[f"{name}_scales"] = coding.zero(parameter.numel(), parameter.device)
        return state

    def take_over(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Moments are rounded."""
        mine = self.state[parameter] = self.zero(parameter)
        mine["step"].copy_(torch.as_tensor(state["step"]))
        for coding in self.codings:
            if coding.name in mine:
                mine[coding.name].copy_(state[coding.name])
                continue
            given = flat(laid_out_like(state[coding.name], parameter))
            for piece in pieces(len(given), coding.block):
                values, work = (given.new_zeros(_whole(piece, coding.block), dtype=torch.float32) for _ in range(2))
                values[: piece.stop - piece.start].copy_(given[piece])
                coding.encode(values, *_coded(mine, coding, piece), work)

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        steps = state["step"].double()
        first, second = group["betas"]
        size, root = group["lr"] / (1 - first**steps), (1 - second**steps).sqrt()
        block = self.codings[0].block
        ranges = pieces(len(parameter), block)
        work = tuple(parameter.new_empty(_whole(ranges[0], block), dtype=torch.float32) for _ in range(3)) if ranges else ()
        for piece in ranges:
            part, new = parameter[piece], gradient[piece].to(torch.float32)
            momentum, variance = self._advanced(state, piece, new, group["betas"], work)
            part.mul_(1 - group["lr"] * group["weight_decay"])
            # m / (sqrt(v) / root + eps), both sides times root
            part.sub_(momentum.mul_(size * root).div_(variance.sqrt_().add_(group["eps"] * root)))

    def _advanced(
        self, state: dict[str, Any], piece: slice, new: Tensor, betas: tuple[float, float], work: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """Moments of a piece with the gradient `new` in them, in fp32 for the caller to overwrite; the state has them too."""
        found = []
        room = work[2][: _whole(piece, self.codings[0].block)]
        for coding, beta, values in zip(self.codings, betas, work, strict=False):
            moment = values[: len(room)]
            kept = flat(state[coding.name])[piece] if coding.name in state else None
            if kept is None:
                coding.decode(*_coded(state, coding, piece), moment, room)
            else:
                moment[: len(new)].copy_(kept)
            moment[len(new) :].zero_()
            active = moment[: len(new)]
            if coding.signed:
                active.lerp_(new, 1 - beta)
            else:
                active.mul_(beta).addcmul_(new, new, value=1 - beta)
            if kept is None:
                coding.encode(moment, *_coded(state, coding, piece), room)
            else:
                kept.copy_(active)
            found.append(active)
        return found[0], found[1]


class AdamW8bit(QuantisedAdamW):
    codings = CODINGS[8]


class AdamW4bit(QuantisedAdamW):
    codings = CODINGS[4]


def _coded(state: dict[str, Any], coding: Coding, piece: slice) -> tuple[Tensor, Tensor]:
    """Codes and scales of a piece."""
    first, last, width = piece.start // coding.block, -(-piece.stop // coding.block), coding.block_bytes
    return state[f"{coding.name}_codes"][first * width : last * width], state[f"{coding.name}_scales"][first:last]


def _whole(piece: slice, block: int) -> int:
    """Elements of a piece and of the rest of its last block."""
    return -(-(piece.stop - piece.start) // block) * block
