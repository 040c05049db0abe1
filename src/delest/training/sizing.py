"""How many rows at a time keep a budget of memory, by two steps in small parts and the line through them: for sessions whose framework does not survive
an allocation that fails (TensorFlow ends the process or hangs, XLA may where it compiles), so that no limit can be set for it.
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
MARGIN = 0.1  # of what rows take


class Sizing:
    """Sets a session's `parts` before each of its first two steps, and after them. `option` is how a budget is asked for."""

    def __init__(self, session: Splits, budget_bytes: int, option: str):
        self.session, self.budget_bytes, self.option = session, budget_bytes, option
        self._least_parts = session.parts  # planned, or decided since
        self._readings: dict[int, tuple[int, int]] = {}  # by step: rows of a part, highest resident bytes

    def begin(self, step: int, batch_rows: int) -> None:
        """Before a step: its parts are a sixteenth of a batch, then an eighth; a quarter and a half where rows are normalised by each other."""
        session, least = self.session, self._least_rows(batch_rows)
        rows = max(least, batch_rows // (SMALLEST if least == 1 else FEWEST)) << step
        session.parts = min(session.most_parts, max(self._least_parts, math.ceil(batch_rows / rows)))
        machine.reset_peak()

    def at_least(self, parts: int) -> None:
        """Memory ran short, or did when the run was made before: no fewer parts from here on."""
        self._least_parts = max(self._least_parts, parts)

    def end(self, step: int, batch_rows: int) -> str | None:
        """After it: once both were made the fewest parts that are expected to fit are set; what was decided, in words. A run that goes on between the two
        stays with the parts that it has. Raises `NothingFits`."""
        session, least = self.session, self._least_rows(batch_rows)
        self._readings[step] = math.ceil(batch_rows / session.parts), machine.peak_resident_bytes()
        if len(self._readings) < STEPS:
            return None
        (few, low), (more, high) = sorted(self._readings.values())
        a_row = max(0.0, (high - low) / max(1, more - few)) * (1 + MARGIN)
        room = self.budget_bytes - MARGIN_BYTES - high
        smallest = high - math.floor(a_row * (more - least))
        if smallest + MARGIN_BYTES > self.budget_bytes:
            why = f"steps on {few} and {more} rows came to {format_bytes(low)} and {format_bytes(high)}"
            raise too_small(self.budget_bytes, smallest + MARGIN_BYTES, why, "", self.option)
        rows = batch_rows if a_row == 0 and room > 0 else more + math.floor(room / max(1.0, a_row))
        session.parts = max(self._least_parts, min(session.most_parts, math.ceil(batch_rows / max(least, rows))))
        part = math.ceil(batch_rows / session.parts)
        words = f"{session.parts} parts of {part} rows" if session.parts > 1 else "whole batches"
        return f"a row takes {format_bytes(a_row)}, of a budget of {format_bytes(self.budget_bytes)}: {words}"

    def _least_rows(self, batch_rows: int) -> int:
        return max(1, batch_rows // self.session.most_parts)
