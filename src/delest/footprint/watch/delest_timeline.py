"""One training step on real tensors, every storage that it makes from birth to death."""

from __future__ import annotations

import time
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

POINTS = 200


class Storage:
    """One storage: when it was made and freed (seconds), in which phase it was made."""

    def __init__(self, size: int, phase: str, born: float, key: int):
        self.bytes, self.phase, self.born, self.key = size, phase, born, key
        self.died: float | None = None
        self.is_gradient = False


class Recorder(TorchDispatchMode):
    """Passes every operator on as it came and notes the storages of what came out."""

    def __init__(self) -> None:
        super().__init__()
        self.began = time.perf_counter()
        self.storages: list[Storage] = []
        self.alive: dict[int, Storage] = {}
        self.phases: list[tuple[float, str]] = [(0.0, "forward")]
        self.faults: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.see_all((args, kwargs), existing=True)
        out = func(*args, **(kwargs or {}))
        self.see_all(out, existing=False)
        return out

    def see_all(self, value: Any, existing: bool) -> None:
        """A failure here must not reach the script: the step is then recorded in part, and `faults` says so."""
        try:
            for leaf in tree_leaves(value):
                if isinstance(leaf, torch.Tensor):
                    self.see(leaf, existing)
        except Exception as error:
            self.faults.add(f"the timeline is incomplete: {type(error).__name__}: {error}")

    def now(self) -> float:
        return time.perf_counter() - self.began

    def see(self, tensor: torch.Tensor, existing: bool) -> None:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):
            return  # a subclass without a storage of its own: what it holds is seen by itself
        key = storage._cdata
        if key in self.alive:
            return
        seen = Storage(storage.nbytes(), self.phases[-1][1], self.now(), key)
        if not existing:
            self.storages.append(seen)
        self.alive[key] = seen
        weakref.finalize(storage, self.gone, seen).atexit = False

    def gone(self, seen: Storage) -> None:
        if seen.died is None:
            seen.died = self.now()
            if self.alive.get(seen.key) is seen:
                del self.alive[seen.key]

    def enter(self, phase: str) -> None:
        self.phases.append((self.now(), phase))

    def backward_ended(self, parameters: list[Any]) -> None:
        """Of what is alive now, the gradients; what follows is forward again until an optimizer says otherwise."""
        for parameter in parameters:
            if parameter.grad is not None and (seen := self.alive.get(parameter.grad.untyped_storage()._cdata)):
                seen.is_gradient = True
        self.enter("forward")

    def result(self) -> dict[str, Any]:
        """Points in time with the live bytes of what this step made: `position`, `phase`, `activations`, ..., `gradients`."""
        end = self.now()
        backward = [at for at, phase in self.phases if phase == "backward"] or [end]
        events = []
        for seen in self.storages:
            if seen.phase == "data":
                continue
            category = self.category(seen, backward)
            events.append((seen.born, category, seen.bytes))
            if seen.died is not None:
                events.append((seen.died, category, -seen.bytes))
        events.sort(key=lambda event: event[0])
        live = {"gradients": 0, "activations": 0, "temporaries": 0}
        points: list[tuple[float, dict[str, int]]] = []
        for at, category, size in events:
            live[category] += size
            points.append((at, dict(live)))
        thinned = self.thin(points)
        return {
            "position": [at / end for at, _ in thinned],
            "phase": [self.phase_at(at) for at, _ in thinned],
            **{name: [point[name] for _, point in thinned] for name in live},
        }

    def category(self, seen: Storage, backward: list[float]) -> str:
        if seen.is_gradient:
            return "gradients"
        # Alive when a backward pass began after it: kept for that pass, or at least live through it.
        kept = seen.phase == "forward" and any(seen.born <= at and (seen.died is None or seen.died > at) for at in backward)
        return "activations" if kept else "temporaries"

    def phase_at(self, at: float) -> str:
        return next(phase for since, phase in reversed(self.phases) if since <= at)

    @staticmethod
    def thin(points: list[tuple[float, dict[str, int]]]) -> list[tuple[float, dict[str, int]]]:
        """At most `POINTS`, of each stretch the highest."""
        stretch = -(-len(points) // POINTS) or 1
        groups = [points[start : start + stretch] for start in range(0, len(points), stretch)]
        return [max(group, key=lambda point: sum(point[1].values())) for group in groups]
