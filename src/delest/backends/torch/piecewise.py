"""What our optimizers of small state share: large tensors are updated piece by piece, so that temporaries stay small beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from delest import errors

PIECE = 1 << 18  # elements that are in fp32 at once
PIECES = 32  # at most so many of one tensor


class PiecewiseOptimizer(torch.optim.Optimizer):
    """An optimizer that updates each parameter from its own gradient and state alone; `zero` and `update` are what subclasses add.

    State follows a parameter's order in memory. Temporaries take up to 12 bytes for each of the 262,144 elements of a piece, or of a 32nd of
    the tensor where that is more.
    """

    def zero(self, parameter: Tensor) -> dict[str, Any]:
        """The state before the first step."""
        raise NotImplementedError

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One step; `parameter` and `gradient` are [N], in their order in memory."""
        raise NotImplementedError

    def take_over(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Make the state of what torch's AdamW has: `step`, `exp_avg`, `exp_avg_sq`."""
        raise NotImplementedError

    def allocate(self) -> None:
        """Give every parameter its zero state."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    self.state[parameter] = self.zero(parameter)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which however turns all state into the parameters' type: here it keeps its own."""
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
                    self._step_of(parameter, parameter.grad, group)
        return loss

    def _step_of(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if gradient.layout != torch.strided:
            raise errors.BadInput(f"{type(self).__name__} takes no sparse gradients.")
        if not self.state[parameter]:
            self.state[parameter] = self.zero(parameter)
        state = self.state[parameter]
        state["step"] += 1
        self.update(flat(parameter), flat(laid_out_like(gradient, parameter)), state, group)


def pieces(count: int, whole: int) -> list[slice]:
    """The ranges of the pieces of `count` elements, each but the last a multiple of `whole` elements."""
    length = max(PIECE // whole, -(-count // (PIECES * whole)), 1) * whole
    return [slice(start, min(start + length, count)) for start in range(0, count, length)]


def counter(parameter: Tensor) -> Tensor:
    """Zero steps: a tensor, since reading a number of the device's would wait for it."""
    return torch.zeros((), dtype=torch.float32, device=parameter.device)


def memory_order(tensor: Tensor) -> Sequence[int]:
    """Dimensions in their order in memory, the outermost first."""
    return range(tensor.ndim) if tensor.is_contiguous() else sorted(range(tensor.ndim), key=tensor.stride, reverse=True)


def flat(tensor: Tensor) -> Tensor:
    """All elements [N] in their order in memory, a view where they lie without gaps."""
    return tensor.view(-1) if tensor.is_contiguous() else tensor.permute(*memory_order(tensor)).view(-1)


def laid_out_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    return tensor if tensor.stride() == parameter.stride() else torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
