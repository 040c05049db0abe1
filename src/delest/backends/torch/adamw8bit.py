"""AdamW whose two moments take a byte each.

Blocks of 256 elements share a scale, their largest magnitude, in fp32. A code c stands for scale * (c / 127)^2 with the sign
of c in the first moment, and for scale * (c / 255)^4 in the second, whose square root divides: both maps are as dense near
zero as the source's dynamic one (section 2.2: down to about 1e-5 of a block's largest gradient), and being closed forms they
need no search through a table, which a processor would do element by element.

Source: Dettmers et al., "8-bit optimizers via block-wise quantization", arXiv 2110.02861; AdamW: arXiv 1711.05101.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from delest import errors
from delest.methods.optimizer_state import BLOCK, LEAST

_PIECE = 1 << 18  # elements that are in fp32 at once
_PIECES = 32  # at most so many of one tensor
_TOP = {"exp_avg": 127.0**2, "exp_avg_sq": 255.0**4}  # what the largest code stands for, before the scale
_LEAST_SCALE = 1e-28  # of a block of zeros; the quotient of the two must be a finite fp32


def encode(name: str, values: Tensor, codes: Tensor, scales: Tensor, work: Tensor) -> None:
    """Write the codes [N] and scales [blocks] of a moment's `values` [blocks * BLOCK] (fp32), with `work` as room for as many."""
    blocks, rounded = values.view(-1, BLOCK), work.view(-1, BLOCK)
    torch.abs(blocks, out=rounded)
    scales.copy_(rounded.amax(1).clamp_min_(_LEAST_SCALE))
    rounded.mul_((_TOP[name] / scales).unsqueeze(1)).sqrt_()
    if name == "exp_avg":
        rounded.round_().copysign_(blocks)
    else:  # no code is 0, so that no update is divided by nothing
        rounded.sqrt_().round_().clamp_(min=1)
    codes.copy_(work[: len(codes)])


def decode(name: str, codes: Tensor, scales: Tensor, values: Tensor, work: Tensor) -> None:
    """Write into `values` [blocks * BLOCK] (fp32) what codes [N] and scales [blocks] stand for, zeros after the last."""
    values[len(codes) :].zero_()
    values[: len(codes)].copy_(codes)
    if name == "exp_avg":
        values.mul_(torch.abs(values, out=work))
    else:
        values.square_().square_()
    values.view(-1, BLOCK).mul_((scales / _TOP[name]).unsqueeze(1))


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with decoupled weight decay; tensors below `methods.optimizer_state.LEAST` elements keep fp32 moments.

    Blocks follow a parameter's order in memory. Large tensors are updated in pieces: temporaries take 12 bytes for each of the
    262,144 elements of a piece, or of a 32nd of the tensor where that is more.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def allocate(self) -> None:
        """Give every parameter its zero state."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    self.state[parameter] = _zero(parameter)

    def take_over(self, parameter: Tensor, state: dict[str, Any]) -> None:
        """Moments of torch's AdamW: `step`, `exp_avg`, `exp_avg_sq`."""
        mine = self.state[parameter] = _zero(parameter)
        mine["step"].copy_(torch.as_tensor(state["step"]))
        for name in ("exp_avg", "exp_avg_sq"):
            if name in mine:
                mine[name].copy_(state[name])
                continue
            flat, codes, scales = _flat(_laid_out_like(state[name], parameter)), mine[f"{name}_codes"], mine[f"{name}_scales"]
            for piece, blocks in _pieces(len(flat)):
                values, work = (flat.new_zeros(_whole(piece), dtype=torch.float32) for _ in range(2))
                values[: piece.stop - piece.start].copy_(flat[piece])
                encode(name, values, codes[piece], scales[blocks], work)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which however turns all state into the parameters' type: codes and scales keep theirs."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        for parameter, number in zip(own, numbers, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                self.state[parameter][name] = value.to(parameter.device, copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if gradient.layout != torch.strided:
            raise errors.BadInput("AdamW with 8-bit moments takes no sparse gradients.")
        if not self.state[parameter]:
            self.state[parameter] = _zero(parameter)
        state = self.state[parameter]
        state["step"] += 1
        steps = state["step"].double()  # a tensor throughout: reading it would wait for the device
        first, second = group["betas"]
        size, root = group["lr"] / (1 - first**steps), (1 - second**steps).sqrt()
        weights, gradients = _flat(parameter), _flat(_laid_out_like(gradient, parameter))
        pieces = _pieces(len(weights))
        work = tuple(weights.new_empty(_whole(pieces[0][0]), dtype=torch.float32) for _ in range(3)) if pieces else ()
        for piece, blocks in pieces:
            part, new = weights[piece], gradients[piece].to(torch.float32)
            momentum, variance = _advanced(state, piece, blocks, new, group["betas"], work)
            part.mul_(1 - group["lr"] * group["weight_decay"])
            # m / (sqrt(v) / root + eps), both sides times root
            part.sub_(momentum.mul_(size * root).div_(variance.sqrt_().add_(group["eps"] * root)))


def _advanced(
    state: dict[str, Any], piece: slice, blocks: slice, new: Tensor, betas: tuple[float, float], work: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Moments of a piece with the gradient `new` in them, in fp32 for the caller to overwrite; the state has them too."""
    found = []
    room = work[2][: _whole(piece)]
    for name, beta, values in zip(_TOP, betas, work, strict=False):
        moment = values[: _whole(piece)]
        kept = _flat(state[name])[piece] if name in state else None
        if kept is None:
            decode(name, state[f"{name}_codes"][piece], state[f"{name}_scales"][blocks], moment, room)
        else:
            moment[: len(new)].copy_(kept)
        active = moment[: len(new)]
        if name == "exp_avg":
            active.lerp_(new, 1 - beta)
        else:
            active.mul_(beta).addcmul_(new, new, value=1 - beta)
        if kept is None:
            encode(name, moment, state[f"{name}_codes"][piece], state[f"{name}_scales"][blocks], room)
        else:
            kept.copy_(active)
        found.append(active)
    return found[0], found[1]


def _zero(parameter: Tensor) -> dict[str, Any]:
    state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.float32, device=parameter.device)}
    for name, dtype in (("exp_avg", torch.int8), ("exp_avg_sq", torch.uint8)):
        if parameter.numel() < LEAST:
            state[name] = torch.zeros_like(parameter, dtype=torch.float32, memory_format=torch.preserve_format)
        else:
            blocks = -(-parameter.numel() // BLOCK)
            state[f"{name}_codes"] = torch.zeros(parameter.numel(), dtype=dtype, device=parameter.device)
            state[f"{name}_scales"] = torch.zeros(blocks, dtype=torch.float32, device=parameter.device)
    return state


def _pieces(count: int) -> list[tuple[slice, slice]]:
    """Elements and blocks of each piece: whole blocks, the last one's rest excepted."""
    length = max(_PIECE, -(-count // (_PIECES * BLOCK)) * BLOCK)
    ranges = [(start, min(start + length, count)) for start in range(0, count, length)]
    return [(slice(start, stop), slice(start // BLOCK, -(-stop // BLOCK))) for start, stop in ranges]


def _whole(piece: slice) -> int:
    """Elements of a piece and of the rest of its last block."""
    return -(-(piece.stop - piece.start) // BLOCK) * BLOCK


def _flat(tensor: Tensor) -> Tensor:
    """All elements [N] in their order in memory, a view where they lie without gaps."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    return tensor.permute(order).view(-1)


def _laid_out_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    return tensor if tensor.stride() == parameter.stride() else torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
