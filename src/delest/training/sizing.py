"""How many rows at a time keep a budget of memory, by two steps in small parts and the line through them, looked at again at each larger part: for sessions whose
framework does not survive an allocation that fails (TensorFlow ends the process or hangs, XLA may where it compiles), so that no limit can be set for it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from delest.hardware import machine
from delest.training.limit import MARGIN_BYTES, too_small
from delest.units import format_bytes

if TYPE_CHECKING:
    from delest.backends import Splits

STEPS = 2
SMALLEST, FEWEST = 16, 4  # parts of a batch in the first step; the second has half as many
FIRST_MARGIN, MARGIN = 0.5, 0.1  # of what rows take: at first what compiling takes hides a part of it
# Times the rows that were measured, at most, for the same reason.
FIRST_LEAP, LEAP = 2, 4


class Sizing:
    """Sets a session's `parts` before each of its first two steps, and after them and each larger part, until none larger fits. `option` is how a budget is asked for."""

    def __init__(self, session: Splits, budget_bytes: int, option: str):
        self.session, self.budget_bytes, self.option = session, budget_bytes, option
        self._least_parts = session.parts  # planned, or decided since
        self._readings: list[tuple[int, int]] = []  # rows of a part, highest resident bytes
        self._closed, self._begun_at = False, 0

    def wants(self, step: int) -> bool:
        """Whether a whole batch's step is still to be looked at. A run that goes on after its first two steps stays with the parts that it has."""
        return not self._closed and (step < STEPS or bool(self._readings))

    def begin(self, step: int, batch_rows: int) -> None:
        """Before a step: the first one's parts are a sixteenth of a batch, the second's an eighth; a quarter and a half where rows are normalised by each other."""
        session, least, made = self.session, self._least_rows(batch_rows), len(self._readings)
        if not made:
            self._begun_at = step  # 1 where the run goes on after its first step
        if made < STEPS:
            rows = max(least, batch_rows // (SMALLEST if least == 1 else FEWEST)) << (made + self._begun_at)
            session.parts = min(session.most_parts, max(self._least_parts, math.ceil(batch_rows / rows)))
        machine.give_back_unused()
        machine.reset_peak()

    def at_least(self, parts: int) -> None:
        """Memory ran short, or did when the run was made before: no fewer parts from here on."""
        self._least_parts = max(self._least_parts, parts)

    def close(self) -> None:
        """The parts are decided: an interrupted run had found them."""
        self._closed = True

    def end(self, batch_rows: int) -> str | None:
        """After it: once two were made the fewest parts are set that are expected to fit by the last two, then again after the step with those, until they are no
        fewer (or more, where those did not fit); what was decided, in words. Raises `NothingFits`."""
        session, least, first = self.session, self._least_rows(batch_rows), len(self._readings) < STEPS
        self._readings.append((math.ceil(batch_rows / session.parts), machine.peak_resident_bytes()))
        if len(self._readings) < STEPS:
            return None
        (few, low), (more, high) = sorted(self._readings[-STEPS:])
        slope = max(0.0, (high - low) / max(1, more - few))
        a_row = slope * (1 + (FIRST_MARGIN if first else MARGIN))
        room = self.budget_bytes - MARGIN_BYTES - getattr(session, "batch_bytes", 0) - high  # one more batch may be read ahead
        smallest = high - math.floor(slope * (1 + MARGIN) * (more - least))
        tight = first and smallest + MARGIN_BYTES > self.budget_bytes
        if tight and high > self.budget_bytes:
            why = f"steps on {few} and {more} rows came to {format_bytes(low)} and {format_bytes(high)}"
            raise too_small(self.budget_bytes, smallest + MARGIN_BYTES, why, "", self.option)
        rows = batch_rows if a_row == 0 and room > 0 else more + math.floor(room / max(1.0, a_row))
        rows = (
            more if tight else max(least, min(rows, (FIRST_LEAP if first else LEAP) * more))
        )  # fewer would save next to nothing
        parts = max(self._least_parts, min(session.most_parts, math.ceil(batch_rows / rows)))
        self._closed = parts >= session.parts
        if parts == session.parts and not first:
            return None
        session.parts = parts
        part = math.ceil(batch_rows / parts)
        words = f"{parts} parts of {part} rows" if parts > 1 else "whole batches"
        so_far, then = ("", "") if self._closed or parts == 1 else ("so far ", "next ")
        return f"{so_far}a row takes {format_bytes(slope)}, of a budget of {format_bytes(self.budget_bytes)}: {then}{words}"

    def _least_rows(self, batch_rows: int) -> int:
        return max(1, batch_rows // self.session.most_parts)
