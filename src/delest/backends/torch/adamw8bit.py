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
from torch.nn import functional

from delest import errors
from delest.methods.optimizer_state import BLOCK, LEAST

_PIECE = 1 << 18  # elements that are in fp32 at once
_PIECES = 32  # at most so many of one tensor
_TINY = torch.finfo(torch.float32).tiny


def quantize_signed(values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (int8) and scales [blocks] (fp32) of `values` [blocks * BLOCK] (fp32); off by at most scale / 127."""
    blocks = values.view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    shares = blocks / scales.clamp_min(_TINY).unsqueeze(1)
    return shares.abs().sqrt_().mul_(127).round_().copysign_(shares).to(torch.int8).view(-1), scales


def dequantize_signed(codes: Tensor, scales: Tensor) -> Tensor:
    roots = codes.to(torch.float32).div_(127)
    return (roots * roots.abs()).view(-1, BLOCK).mul_(scales.unsqueeze(1)).view(-1)


def quantize_positive(values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (uint8) and scales of `values` >= 0. None is 0, so that no update is divided by nothing."""
    blocks = values.view(-1, BLOCK)
    scales = blocks.amax(1)
    roots = (blocks / scales.clamp_min(_TINY).unsqueeze(1)).sqrt_().sqrt_().mul_(255).round_().clamp_(min=1)
    return roots.to(torch.uint8).view(-1), scales


def dequantize_positive(codes: Tensor, scales: Tensor) -> Tensor:
    return codes.to(torch.float32).div_(255).square_().square_().view(-1, BLOCK).mul_(scales.unsqueeze(1)).view(-1)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with decoupled weight decay; tensors below `methods.optimizer_state.LEAST` elements keep fp32 moments.

    Blocks follow a parameter's order in memory. Large tensors are updated in pieces: temporaries take some 20 bytes for each of
    the 262,144 elements of a piece, or of a 32nd of the tensor where that is more.
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
            flat = _flat(_laid_out_like(state[name], parameter)).to(torch.float32)
            for start, stop in _pieces(flat.numel()):
                _store(mine, name, _padded(flat[start:stop]), start, stop)

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
        for start, stop in _pieces(weights.numel()):
            new = gradients[start:stop].to(torch.float32)
            momentum = _moment(state, "exp_avg", start, stop).lerp_(new, 1 - first)
            variance = _moment(state, "exp_avg_sq", start, stop).mul_(second).addcmul_(new, new, value=1 - second)
            if "exp_avg" not in state:
                _store(state, "exp_avg", _padded(momentum), start, stop)
                _store(state, "exp_avg_sq", _padded(variance), start, stop)
            update = momentum.mul(size).div_(variance.sqrt().div_(root).add_(group["eps"]))
            part = weights[start:stop]
            part.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update.to(part.dtype))


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


def _pieces(count: int) -> list[tuple[int, int]]:
    """Ranges of whole blocks, the last one's rest excepted."""
    length = max(_PIECE, -(-count // (_PIECES * BLOCK)) * BLOCK)
    return [(start, min(start + length, count)) for start in range(0, count, length)]


def _flat(tensor: Tensor) -> Tensor:
    """All elements [N] in their order in memory, a view where they lie without gaps."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    return tensor.permute(order).view(-1)


def _laid_out_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    return tensor if tensor.stride() == parameter.stride() else torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)


def _padded(values: Tensor) -> Tensor:
    rest = -len(values) % BLOCK
    return functional.pad(values, (0, rest)) if rest else values


def _moment(state: dict[str, Any], name: str, start: int, stop: int) -> Tensor:
    """A piece of a moment in fp32: the state's own where it is kept so, else decoded."""
    if name in state:
        return _flat(state[name])[start:stop]
    decode = dequantize_signed if name == "exp_avg" else dequantize_positive
    codes = _padded(state[f"{name}_codes"][start:stop])
    return decode(codes, state[f"{name}_scales"][start // BLOCK : -(-stop // BLOCK)])[: stop - start]


def _store(state: dict[str, Any], name: str, values: Tensor, start: int, stop: int) -> None:
    encode = quantize_signed if name == "exp_avg" else quantize_positive
    codes, scales = encode(values)
    state[f"{name}_codes"][start:stop].copy_(codes[: stop - start])
    state[f"{name}_scales"][start // BLOCK : -(-stop // BLOCK)].copy_(scales)
