"""Whether others keep this machine busy while something is timed: its seconds are then too long."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

LEAST_WAITING = 0.10  # share of the time that threads waited for a core
LEAST_SPREAD = 2.0  # of repeats, the longest over the shortest
LEAST_SECONDS = 0.02  # repeats shorter than this spread on quiet machines too


class Busyness:
    """Gathered over pieces of timed work in this process, which has `threads` busy threads."""

    def __init__(self, threads: int):
        self.threads, self.seconds, self.waited_seconds, self.spread = threads, 0.0, 0.0, 1.0

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Around work that is timed."""
        started, waited = time.perf_counter(), waited_seconds()
        yield
        self.seconds += time.perf_counter() - started
        self.waited_seconds += max(0.0, waited_seconds() - waited)

    def repeated(self, seconds: Sequence[float]) -> None:
        """What the same work took each time."""
        if min(seconds) >= LEAST_SECONDS:
            self.spread = max(self.spread, max(seconds) / min(seconds))

    def words(self) -> str:
        """How it was seen that the machine was busy; empty where it was not."""
        waiting = self.waited_seconds / max(1e-9, self.seconds * self.threads)
        found = []
        if waiting >= LEAST_WAITING:
            found.append(f"threads waited for a core in {waiting:.0%} of the time")
        if self.spread >= LEAST_SPREAD:
            found.append(f"the same step took up to {self.spread:.1f} times as long when it was repeated")
        return " and ".join(found)


def waited_seconds(root: Path = Path("/")) -> float:
    """That this process's threads were ready to run and had no core; 0 where the system does not tell
    (https://docs.kernel.org/scheduler/sched-stats.html, the second figure of a thread's schedstat)."""
    total = 0
    for task in (root / "proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError, IndexError):  # a thread that has ended meanwhile
            total += int(task.read_text().split()[1])
    return total / 1e9
