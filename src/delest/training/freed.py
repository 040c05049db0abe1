"""What malloc does with the blocks that a run's steps free.

The system clears every page that it gives a process anew: where blocks go back to it at each step, up to a third of the step is lost to that. So they are kept where there is twice
the room that steps take. TensorFlow's threads free large blocks in heaps of their own, where they are no room for each other: there, within a budget, blocks go back from the start until such room is seen.
"""

from __future__ import annotations

from delest import malloc
from delest.hardware import machine

LOOKED_AT = 2  # whole steps with the parts that were found: the first still takes memory for what stays


class Freed:
    """How one process's malloc treats what is freed, until `close`. Where somebody has said how, by a variable or a library, it stays so.

    With `scatters` a framework's threads keep heaps of their own.
    """

    def __init__(self, budget_bytes: int, *, scatters: bool):
        self._ours, self._budget_bytes = not malloc.is_tuned(), budget_bytes
        self._steps, self._kept = 0, False
        self._scatters = scatters
        self._gone = scatters and self._ours and malloc.fix_threshold()
        malloc.give_back()
        self._idle_bytes = machine.resident_bytes()

    @classmethod
    def of_machine(cls) -> Freed:
        """That of a run without a budget, which has what is free on the machine."""
        return cls(machine.describe().available_bytes + machine.resident_bytes(), scatters=False)

    @property
    def kept(self) -> bool:
        """Whether what is freed stays resident."""
        return self._kept

    def stepped(self) -> None:
        """After a step in the parts that were found: once, keep what is freed if there is twice the room that the process has taken so far."""
        self._steps += 1
        if self._ours and self._steps == LOOKED_AT:
            highest = machine.peak_resident_bytes()
            if self._budget_bytes - highest > highest - self._idle_bytes and malloc.keep_freed():
                self._kept, self._gone = True, False

    def give_back(self) -> bool:
        """Where memory came to be short: have what is freed go back from here on, for good; whether it did not, and does now."""
        self._steps = LOOKED_AT
        if not self._ours or not (self._kept or (self._scatters and not self._gone)):
            return False
        kept, self._kept = self._kept, False
        if self._scatters:
            self._gone = malloc.fix_threshold()
        else:
            malloc.move_threshold()
        malloc.give_back()
        return kept or self._gone

    def close(self) -> None:
        """Give back what is kept, and leave malloc as glibc has it in a process that allocates large blocks."""
        if self._kept or self._gone:
            malloc.move_threshold()
        if self._kept:
            malloc.give_back()
        self._kept = self._gone = False
