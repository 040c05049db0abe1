"""What malloc does, in a run within a budget, with the blocks that its steps free.

The system clears every page that it gives a process anew: where blocks go back to it at each step, up to a fifth of the step is lost to that. So they are kept where there is twice
the room that steps take. TensorFlow's threads free large blocks in heaps of their own, where they are no room for each other: there blocks go back from the start until such room is seen.
"""

from __future__ import annotations

from delest import malloc
from delest.hardware import machine

LOOKS = 5  # at steps that might have the room


class Freed:
    """How one process's malloc treats what is freed, until `close`. Where somebody has said how, by a variable or a library, it stays so.

    With `scatters` a framework's threads keep heaps of their own.
    """

    def __init__(self, budget_bytes: int, *, scatters: bool):
        self._ours, self._budget_bytes = not malloc.is_tuned(), budget_bytes
        self._idle_bytes, self._left = machine.resident_bytes(), LOOKS
        self._scatters, self._kept = scatters, False
        self._gone = scatters and self._ours and malloc.fix_threshold()

    def settle(self, highest_bytes: int) -> None:
        """After a step whose parts are found and took so much: keep what is freed if there is twice the room."""
        if self._ours and self._left and not self._kept:
            self._left -= 1
            if self._budget_bytes - highest_bytes > highest_bytes - self._idle_bytes:
                self._kept, self._gone = malloc.keep_freed(), False

    @property
    def wants(self) -> bool:
        """Whether `settle` may still change something."""
        return self._ours and self._left > 0 and not self._kept

    def give_back(self) -> bool:
        """Where memory came to be short: have what is freed go back from here on; whether it did not, and does now."""
        if not self._ours or not (self._kept or (self._scatters and not self._gone)):
            return False
        self._kept, self._left = False, 0
        self._gone = malloc.fix_threshold() if self._scatters else not malloc.move_threshold()
        malloc.give_back()
        return True

    def close(self) -> None:
        """Leave malloc as glibc would have it in this process."""
        if self._kept or self._gone:
            malloc.move_threshold()
            self._kept = self._gone = False
