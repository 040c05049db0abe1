"""Schedules: pure functions from the step's number to a rate in [0, 1] that multiplies every base learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from delest.job import Recipe


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A shape over `total_steps`. With `decay_from` the rate falls from there in a line to zero at `total_steps`."""

    shape: str
    total_steps: int
    warmup_steps: int
    decay: float  # share of the whole run that the last decay takes
    decay_from: int | None = None

    @classmethod
    def of(cls, recipe: Recipe, total_steps: int) -> Schedule:
        warmup = round(recipe.warmup * total_steps)
        return cls(shape=recipe.schedule, total_steps=total_steps, warmup_steps=warmup, decay=recipe.decay)

    def rate(self, step: int) -> float:
        """The rate of step number `step`, counted from 0."""
        if self.decay_from is None or step < self.decay_from:
            return self._planned(step)
        return self._planned(self.decay_from) * (self.total_steps - step) / (self.total_steps - self.decay_from)

    def _planned(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.shape == "constant":
            return 1.0
        if self.shape == "cosine":
            done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        falling = max(1, round(self.decay * self.total_steps))
        return min(1.0, (self.total_steps - step) / falling)

    def ended_early(self, step: int) -> Schedule:
        """The schedule with its decay begun at `step`, sized so that it is the same share of the then shorter run."""
        length = max(1, round(step * self.decay / (1 - self.decay))) if self.decay < 1 else self.total_steps - step
        end = min(self.total_steps, step + length)
        return Schedule(
            shape=self.shape, total_steps=end, warmup_steps=self.warmup_steps, decay=self.decay, decay_from=min(step, end - 1)
        )

    def decaying(self, step: int) -> bool:
        """Whether the last decay has begun, so that there is nothing left to end early."""
        if self.decay_from is not None:
            return step >= self.decay_from
        return self.shape == "hold" and self.total_steps - step <= round(self.decay * self.total_steps)
