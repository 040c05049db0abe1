"""Which machine to take for a training: devices side by side, each with the plan it would be trained by there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from delest.records.plan import Plan


@dataclass(frozen=True, kw_only=True)
class DeviceOption:
    """One device of the catalogue, and what the training would take on it. Nothing of it is measured."""

    name: str  # the catalogue's
    title: str
    budget_bytes: int  # of each device's memory that may be used
    count: int | None  # devices that it takes; None: no number is enough
    plan: Plan | None  # for each of them; None where no number is enough
    peak_bytes: int | None  # on each of them; where no number is enough, with the least that was found
    high_bytes: int | None  # upper end of the interval
    step_seconds: float | None  # of the whole batch, on all of them together
    seconds: float | None  # of the whole run: all steps of all epochs, and an evaluation after each
    price: float | None  # of one of them for an hour, in the unit that was given
    cost: float | None  # of the whole run on all of them
    basis: Literal["trace", "arithmetic"]  # arithmetic: state sharded over several devices, which no trace shows
    why: str


@dataclass(frozen=True, kw_only=True)
class DeviceComparison:
    """What `plan` gives with `devices`: an option for each, in the order in which they were asked for."""

    options: tuple[DeviceOption, ...]
    recommended: str | None  # name of the device to take; None where none will do
    why: str
    batch_size: int
    steps: int  # of the whole run, if it does not end early
    notes: tuple[str, ...] = ()  # what is assumed of all of them

    @property
    def best(self) -> DeviceOption | None:
        """The option that is recommended."""
        return next((option for option in self.options if option.name == self.recommended), None)
