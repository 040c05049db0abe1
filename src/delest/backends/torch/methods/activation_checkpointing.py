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

from delest import errors
from delest.backends.torch.lean import spare_the_compiler_when_checkpointing

if TYPE_CHECKING:
    from delest.backends.torch.methods import Training

_Place = tuple[nn.Module, str]  # a buffer: the module that owns it, its name there


def apply(training: Training, config: dict[str, Any]) -> None:
    """Raises `BadInput` with every name that cannot be checkpointed."""
    modules = _modules(training.model, config["modules"])
    spare_the_compiler_when_checkpointing()
    for module in modules:
        module.forward = Recomputed(module)  # on the instance: names, hooks, class and state stay as they are


def _modules(model: nn.Module, names: list[str]) -> list[nn.Module]:
    known = dict(model.named_modules(remove_duplicate=False))
    faults = [f"the model has no module {name!r}." for name in names if name not in known]
    found = {name: known[name] for name in names if name in known}
    faults += [
        f"the module {inner!r} is inside {outer!r}, which is checkpointed too: name one of them."
        for outer in found
        for inner in found
        if inner != outer and (outer == "" or inner.startswith(f"{outer}."))
    ]
    faults += [
        f"the module {name!r}, a {type(module).__name__}, has no forward of its own: name its children."
        for name, module in found.items()
        if type(module).forward is nn.Module.forward
    ]
    faults += [
        f"the module {name!r} is checkpointed already."
        for name, module in found.items()
        if isinstance(module.forward, Recomputed)
    ]
    faults += [
        f"the module {name!r} is scripted: name modules before torch.jit.script."
        for name, module in found.items()
        if isinstance(module, torch.jit.ScriptModule)
    ]
    if not names:
        faults.append("checkpointing was chosen without a module.")
    if len({id(module) for module in found.values()}) < len(names) and not faults:
        faults.append("the same module is named twice.")
    if faults:
        raise errors.BadInput(faults)
    return list(found.values())


class Recomputed:
    """A module's forward that keeps its inputs alone, where gradients are computed in training mode."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.own = vars(module).get("forward")  # None: the class's
        self.changing: set[_Place] | None = None  # buffers that the forward was seen to change, None: not run yet
        self.__signature__ = inspect.signature(module.forward)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        if not (self.module.training and torch.is_grad_enabled()):
            return self._forward(*inputs, **named)
        return _checkpoint(self._forward, *inputs, use_reentrant=False, context_fn=_Run(self).contexts, **named)

    def _forward(self, *inputs: Any, **named: Any) -> Any:
        if self.own is not None:
            return self.own(*inputs, **named)
        return type(self.module).forward(self.module, *inputs, **named)


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
