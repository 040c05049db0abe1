"""Run the forward of chosen modules under torch.utils.checkpoint, buffers and every random state as in a single run.

Source: https://docs.pytorch.org/docs/stable/checkpoint.html, "use_reentrant=False".
"""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from delest.backends.torch.lean import spare_the_compiler_when_checkpointing
from delest.backends.torch.methods.blocks import Forward, blocks_named

if TYPE_CHECKING:
    from delest.backends.torch.methods import Training

_Place = tuple[nn.Module, str]  # a buffer: the module that owns it, its name there


def apply(training: Training, config: dict[str, Any]) -> None:
    """Raises `BadInput` with every name that cannot be checkpointed."""
    modules = blocks_named(training.model, config["modules"], "activation_checkpointing")
    spare_the_compiler_when_checkpointing()
    for module in modules.values():
        module.forward = Recomputed(module)


class Recomputed(Forward):
    """A module's forward that keeps its inputs alone, where gradients are computed in training mode."""

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self.changing: set[_Place] | None = None  # buffers that the forward was seen to change, None: not run yet

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        if not (self.module.training and torch.is_grad_enabled()):
            return self.forward(*inputs, **named)
        return _checkpoint(self.forward, *inputs, use_reentrant=False, context_fn=_Run(self).contexts, **named)


# The wrapper imports the compiler, only to keep it away from a function that nothing compiles.
_checkpoint = inspect.unwrap(checkpoint)


class _Run:
    """One forward and its repetition."""

    def __init__(self, region: Recomputed):
        self.region = region
        self.before: dict[_Place, Tensor] = {}  # copies of buffers that the forward changed
        self.drawn: tuple[Any, Any] | None = None

    def contexts(self) -> tuple[Any, Any]:
        return self._first(), self._again()

    @contextlib.contextmanager
    def _first(self) -> Iterator[None]:
        """Note random states and what the forward changes; torch's own generators are `checkpoint`'s."""
        region = self.region
        self.drawn = _drawn()
        buffers = dict(_buffers(region.module))
        likely = region.changing
        self.before = {place: buffer.clone() for place, buffer in buffers.items() if likely is None or place in likely}
        versions = {place: buffer._version for place, buffer in buffers.items()}
        yield
        now = dict(_buffers(region.module))
        changed = {
            place
            for place, buffer in now.items()
            if place in buffers and (buffer is not buffers[place] or buffer._version != versions[place] or _counts(place[0]))
        }
        region.changing = changed | (likely or set())
        self.before = {place: copy for place, copy in self.before.items() if place in changed}

    @contextlib.contextmanager
    def _again(self) -> Iterator[None]:
        """The state of the first run inside, what came of it outside: running statistics move once."""
        drawn, kept = _drawn(), dict(_buffers(self.region.module))
        for place in self.region.changing or ():
            if place in kept:
                owner, name = place
                owner._buffers[name] = self.before[place] if place in self.before else kept[place].clone()
        _draw_from(self.drawn)
        try:
            yield
        finally:  # recomputation ends with an exception as soon as it has what is needed
            for (owner, name), buffer in kept.items():
                owner._buffers[name] = buffer
            _draw_from(drawn)


def _buffers(module: nn.Module) -> Iterator[tuple[_Place, Tensor]]:
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                yield (owner, name), buffer


def _counts(module: nn.Module) -> bool:
    """Whether the module keeps running statistics: some kernels change them without raising their version."""
    return isinstance(module, nn.modules.batchnorm._NormBase) and module.training and module.track_running_stats


def _drawn() -> tuple[Any, Any]:
    return random.getstate(), np.random.get_state()


def _draw_from(state: tuple[Any, Any] | None) -> None:
    if state is not None:
        random.setstate(state[0])
        np.random.set_state(state[1])
