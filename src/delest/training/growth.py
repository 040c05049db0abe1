"""Notices memory that grows slowly, step by step, and finds out who holds it."""

from __future__ import annotations

import gc
from dataclasses import dataclass

from delest.training import owners

FIRST_BLOCK, LAST_BLOCK = 16, 1024  # steps
LEAST_BYTES = 256 << 10  # a block: less than that is the allocator's
SUSPICIOUS, CERTAIN = 3, 6  # blocks in a row, each above the one before it
UNNAMED_SHARE = 1 / 32  # of the budget: growth whose owner nobody sees is told from here on


@dataclass(frozen=True)
class Growth:
    """Memory that grew over a number of steps."""

    bytes_per_step: int
    owner: str | None  # in words; None: nothing that Python sees


class GrowthWatch:
    """Compares the least resident memory of one block of steps with that of the next: what a step needs for itself comes and
    goes, what stays is a leak. Blocks grow longer, so that a slow leak is noticed in a long run."""

    def __init__(self, budget_bytes: int):
        self.budget_bytes = budget_bytes
        self._block, self._blocks, self._steps = FIRST_BLOCK, 0, 0
        self._lowest = self._last = 1 << 62
        self._rising = 0
        self._begun: tuple[owners.Census, int, int] | None = None  # with the bytes then and the steps since
        self._told = False

    def stepped(self, resident_bytes: int) -> Growth | None:
        """Take what is resident after a step; the growth where it is now certain, once."""
        self._lowest, self._steps = min(self._lowest, resident_bytes), self._steps + 1
        if self._told or self._steps < self._block:
            return None
        lowest, self._lowest, self._steps = self._lowest, 1 << 62, 0
        self._rising = self._rising + 1 if lowest - self._last >= LEAST_BYTES else 0
        self._last, self._blocks = lowest, self._blocks + 1
        found = None
        if self._rising == 0:
            self._begun = None
        elif self._begun is None:
            if self._rising >= SUSPICIOUS:
                gc.collect()  # a cycle that was not collected yet is no leak
                self._begun = owners.census(), lowest, 0
        else:
            self._begun = (*self._begun[:2], self._begun[2] + self._block)
            if self._rising >= CERTAIN:
                found = self._judge(lowest)
        if self._blocks % 8 == 0 and self._begun is None:
            self._block = min(2 * self._block, LAST_BLOCK)
        return found

    def _judge(self, lowest: int) -> Growth | None:
        assert self._begun is not None
        census, before, steps = self._begun
        owner = owners.grown_since(census, steps)
        grown = lowest - before
        if owner is None and grown < self.budget_bytes * UNNAMED_SHARE:
            return None
        self._told, self._begun = True, None
        return Growth(grown // steps, owner)
