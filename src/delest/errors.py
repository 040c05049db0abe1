"""Every exception and warning that delest raises, one tree.

An error says what was asked, which limit or rule was met, and what to do next. `exit_status` is what the command
line ends with (see "Exit status" in docs/architecture.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class DelestWarning(UserWarning):
    """Something the user should know that does not stop the work."""


class DelestError(Exception):
    """The root of the tree. One that is raised as such is a fault of delest itself."""

    exit_status = 1

    def fields(self) -> dict[str, object]:
        """What a process on the other side of a pipe needs to build this error again: constructor arguments, JSON."""
        return {"message": str(self)}

    @classmethod
    def rebuilt(cls, fields: dict[str, object]) -> DelestError:
        return cls(*fields.values())


class BadInput(DelestError):
    """What was given cannot be used. All faults that were found are reported together."""

    exit_status = 2

    def __init__(self, faults: str | Sequence[str]):
        self.faults = (faults,) if isinstance(faults, str) else tuple(faults)
        if len(self.faults) == 1:
            super().__init__(self.faults[0])
        else:
            super().__init__(f"{len(self.faults)} faults:\n" + "\n".join(f"  - {fault}" for fault in self.faults))

    def fields(self) -> dict[str, object]:
        return {"faults": list(self.faults)}


class MissingExtra(BadInput):
    """An optional dependency is needed that is not installed."""


class FolderTaken(BadInput):
    """Another run made the folder first."""


class DiskFull(BadInput):
    """There is no room for what must be written. Nothing half-written is left behind."""


class NothingFits(DelestError):
    """No plan keeps within the memory budget; `smallest_bytes` is the least budget that would do, `plan` the JSON of the plan for it."""

    exit_status = 3

    def __init__(self, message: str, smallest_bytes: int | None = None, plan: dict[str, Any] | None = None):
        super().__init__(message)
        self.smallest_bytes, self.plan = smallest_bytes, plan

    def fields(self) -> dict[str, object]:
        return {"message": str(self), "smallest_bytes": self.smallest_bytes, "plan": self.plan}


class OutOfMemory(DelestError):
    """An allocation failed in a training step; the session is as it was before the step unless the update had `begun`.

    `phase` is `forward`, `backward`, `optimizer` or `evaluation`. With `begun` some weights are those of the next step already:
    only a checkpoint leads back.
    """

    exit_status = 3

    def __init__(self, phase: str, detail: str = "", begun: bool = False):
        super().__init__(
            f"memory ran out in the {phase} phase{': ' + detail if detail else ''}. "
            f"{'The update had begun: go on from a checkpoint. ' if begun else ''}"
            "Give a budget with --memory so that the step is split to fit, or a smaller batch with --batch-size."
        )
        self.phase, self.detail, self.begun = phase, detail, begun

    def fields(self) -> dict[str, object]:
        return {"phase": self.phase, "detail": self.detail, "begun": self.begun}


class AccuracyNotMet(DelestError):
    """No candidate keeps the promised accuracy."""

    exit_status = 4


class Diverged(DelestError):
    """Training produced values that are not finite, again after it was taken back and slowed down."""

    exit_status = 5


class CheckFailed(DelestError):
    """A check that was asked for (`doctor`, a bundle's checksum) did not hold."""

    exit_status = 6


class Interrupted(DelestError):
    """A signal ended the work at a safe point; `command` goes on from there, empty where nothing had begun."""

    def __init__(self, signal_number: int, command: str):
        self.signal_number, self.command = signal_number, command
        self.exit_status = 128 + signal_number
        saved = f"everything is saved. Go on with: {command}" if command else "the run had not begun, and nothing was written."
        super().__init__(f"stopped by signal {signal_number}; {saved}")

    def fields(self) -> dict[str, object]:
        return {"signal_number": self.signal_number, "command": self.command}


class ProbeFailed(DelestError):
    """A child process ended without an answer: killed, crashed or out of time."""

    def __init__(self, message: str, exit_code: int | None = None):
        super().__init__(message)
        self.exit_code = exit_code

    def fields(self) -> dict[str, object]:
        return {"message": str(self), "exit_code": self.exit_code}
