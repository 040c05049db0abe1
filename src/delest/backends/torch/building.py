"""Building a model without memory: constructors run on fake tensors.

First everything that the constructor makes is fake. One that reads values of its own (rates of stochastic depth from a
`linspace`) runs once more with real tensors, each made fake as a module takes it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def is_fake(tensor: Any) -> bool:
    return type(tensor).__name__ == "FakeTensor" or type(getattr(tensor, "data", None)).__name__ == "FakeTensor"


@contextlib.contextmanager
def all_fake(mode: Any) -> Iterator[None]:
    """All tensors that are made inside are fake."""
    with _without_values(), mode:
        yield


@contextlib.contextmanager
def fake_when_registered(mode: Any) -> Iterator[None]:
    """Tensors are real, but modules keep fake ones of the same shape: at most one parameter has memory at a time."""

    def register_parameter(self: nn.Module, name: str, parameter: Any) -> None:
        originals["register_parameter"](self, name, _faked(mode, parameter))

    def register_buffer(self: nn.Module, name: str, tensor: Any, persistent: bool = True) -> None:
        originals["register_buffer"](self, name, _faked(mode, tensor), persistent)

    originals: dict[str, Any] = {
        "register_parameter": nn.Module.register_parameter,
        "register_buffer": nn.Module.register_buffer,
    }
    with _without_values(), _replaced(nn.Module, register_parameter=register_parameter, register_buffer=register_buffer):
        yield


def _faked(mode: Any, tensor: Any) -> Any:
    return mode.from_tensor(tensor) if isinstance(tensor, Tensor) and not is_fake(tensor) else tensor


@contextlib.contextmanager
def _without_values() -> Iterator[None]:
    """What stands in the way of fake tensors although no size depends on it: an initialisation that looks whether its
    values are within bounds, and a conversion of modules that swaps tensors in place."""
    with _replaced(nn.init, _no_grad_trunc_normal_=lambda tensor, *_, **__: tensor), _replaced(nn.Module, _apply=_applying()):
        yield


@contextlib.contextmanager
def without_packing() -> Iterator[None]:
    """Let transformers' models take rows for whole sequences, not several packed into one, which they find out by reading
    positions and otherwise prepare for with a mask."""
    masks = sys.modules.get("transformers.masking_utils")
    if not hasattr(masks, "find_packed_sequence_indices"):
        yield
        return
    with _replaced(masks, find_packed_sequence_indices=lambda positions: None):
        yield


def _applying() -> Callable[..., nn.Module]:
    """`Module._apply` that puts converted tensors in place of the old ones; tied parameters stay tied."""
    converted: dict[int, tuple[Tensor, Tensor]] = {}  # the old one is kept, so that its id stays its own

    def apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if recurse:
            for child in self.children():
                child._apply(fn)
        for tensors in (self._parameters, self._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                with torch.no_grad():
                    new = fn(tensor)
                if new is tensor:
                    continue
                if id(tensor) not in converted:
                    kept = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
                    converted[id(tensor)] = (tensor, kept)
                tensors[name] = converted[id(tensor)][1]  # type: ignore[assignment]
        return self

    return apply


@contextlib.contextmanager
def _replaced(owner: Any, **names: Any) -> Iterator[None]:
    originals = {name: getattr(owner, name) for name in names}
    for name, value in names.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in originals.items():
            setattr(owner, name, value)
