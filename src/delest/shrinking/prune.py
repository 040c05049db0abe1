"""Which units to cut: those that are worth least for what they cost, until enough is gone.

Every width is cut in steps, so that what is left suits the processor. The next step is always the one whose units are expected to change the loss
least for the parameters and the measured seconds that go with it. What goes depends on what has gone before: a layer that has lost
half its inputs has half the parameters left to lose at its outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from delest.records.pruning import Width

FEW = 4  # steps that a width must have, or it is cut by quarters


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What layers cost now."""

    parameters: Mapping[str, float]  # by layer
    seconds: Mapping[str, float]  # of an answer, by layer, that go with its width; none for layers that were not measured


@dataclass(frozen=True, kw_only=True)
class Wish:
    """When to stop: where both are given, when both are reached; seconds count for nothing where none were measured."""

    parameters: float | None = None  # share of all parameters that is to go
    seconds: float | None = None  # share of the measured seconds that is to go
    most: float = 0.9  # share of a width that may go


@dataclass(frozen=True, kw_only=True)
class Choice:
    cuts: dict[str, list[int]]  # units by width
    parameters: float  # share of all parameters that is expected to go
    seconds: float  # share of the measured seconds that is expected to go
    change: float  # expected in the loss: the sum of the units' scores


def choose_units(
    widths: Sequence[Width],
    scores: Mapping[str, NDArray],
    costs: Costs,
    wish: Wish,
    *,
    step: int = 8,
    favour_seconds: float = 0.5,
) -> Choice:
    """The units to cut. `scores` are float [units] by width; `step` is of how many channels what is left should be a multiple.

    `favour_seconds`, from 0 to 1, weighs measured seconds against parameters; where the wish names both, what is further from its goal weighs more.
    """
    state = _State(widths, scores, costs, step)
    while not state.reached(wish):
        favour = state.favour(wish, favour_seconds)
        best = min(state.steps(wish.most), key=lambda one: state.price(one[0], one[1], favour), default=None)
        if best is None:  # all widths are as narrow as they may be
            break
        state.take(*best)
    return state.choice()


class _State:
    def __init__(self, widths: Sequence[Width], scores: Mapping[str, NDArray], costs: Costs, step: int):
        self.widths = {width.name: width for width in widths}
        self.order = {name: np.argsort(scores[name], kind="stable") for name in self.widths}
        self.sums = {name: np.concatenate([[0.0], np.cumsum(np.sort(scores[name]))]) for name in self.widths}
        self.gone = dict.fromkeys(self.widths, 0)
        self.step, self.costs = step, costs
        self.left: dict[tuple[str, str], float] = {}  # share that is left of a layer's side
        self.all_parameters = sum(costs.parameters.values())
        self.all_seconds = sum(costs.seconds.values())

    def share(self, layer: str) -> float:
        """What is left of a layer: the product of both sides."""
        return self.left.get((layer, "in"), 1.0) * self.left.get((layer, "out"), 1.0)

    def lost(self, costs: Mapping[str, float], total: float) -> float:
        changed = {layer for layer, _ in self.left}
        return sum(costs.get(layer, 0.0) * (1 - self.share(layer)) for layer in changed) / total if total else 0.0

    def reached(self, wish: Wish) -> bool:
        enough_parameters = wish.parameters is None or self.lost(self.costs.parameters, self.all_parameters) >= wish.parameters
        if wish.seconds is None or not self.all_seconds:
            return enough_parameters
        return enough_parameters and self.lost(self.costs.seconds, self.all_seconds) >= wish.seconds

    def favour(self, wish: Wish, otherwise: float) -> float:
        """How much seconds weigh: by what is still missing of both goals."""
        if not wish.parameters or not wish.seconds or not self.all_seconds:
            return otherwise
        missing_parameters = max(0.0, 1 - self.lost(self.costs.parameters, self.all_parameters) / wish.parameters)
        missing_seconds = max(0.0, 1 - self.lost(self.costs.seconds, self.all_seconds) / wish.seconds)
        return missing_seconds / (missing_parameters + missing_seconds)

    def steps(self, most: float) -> list[tuple[str, int]]:
        """The next step of each width that may still be cut: (name, units)."""
        found = []
        for name, width in self.widths.items():
            count = self._units(width)
            if count and self.gone[name] + count <= most * width.size:
                found.append((name, count))
        return found

    def _units(self, width: Width) -> int:
        """How many units the next step takes, so that channels that are left are a multiple of the step; 0: there is no more."""
        left = width.size - self.gone[width.name]
        if width.kind == "heads" or width.unit > 1:
            return 1 if left > 1 else 0
        step = self.step if width.size >= FEW * self.step else max(1, width.size // 4)
        units = left % step or step
        return units if left - units >= step else 0

    def change(self, name: str, units: int) -> float:
        """Expected in the loss."""
        sums = self.sums[name]
        return float(sums[self.gone[name] + units] - sums[self.gone[name]])

    def price(self, name: str, units: int, favour_seconds: float) -> float:
        """Expected change in the loss for what is gained."""
        return self.change(name, units) / max(1e-30, self.gain(name, units, favour_seconds))

    def gain(self, name: str, units: int, favour_seconds: float) -> float:
        """Shares of the parameters and of the seconds that the step takes away, weighed."""
        width = self.widths[name]
        part = units / (width.size - self.gone[name])
        parameters = sum(self.costs.parameters.get(layer, 0.0) * self.share(layer) for layer, _ in width.sides) * part
        seconds = sum(self.costs.seconds.get(layer, 0.0) * self.share(layer) for layer, _ in width.sides) * part
        by_seconds = favour_seconds if self.all_seconds else 0.0
        return (1 - by_seconds) * parameters / self.all_parameters + by_seconds * seconds / (self.all_seconds or 1.0)

    def take(self, name: str, units: int) -> None:
        width = self.widths[name]
        before = width.size - self.gone[name]
        self.gone[name] += units
        for layer, side in dict.fromkeys(width.sides):
            self.left[layer, side] = self.left.get((layer, side), 1.0) * (before - units) / before

    def choice(self) -> Choice:
        cuts = {name: sorted(int(unit) for unit in self.order[name][:count]) for name, count in self.gone.items() if count}
        return Choice(
            cuts=cuts,
            parameters=self.lost(self.costs.parameters, self.all_parameters),
            seconds=self.lost(self.costs.seconds, self.all_seconds),
            change=sum(float(self.sums[name][count]) for name, count in self.gone.items()),
        )
