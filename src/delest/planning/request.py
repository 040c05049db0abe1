"""What a plan is asked for: a job as it was probed, a budget, and what must be kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from delest import methods
from delest.job import Job
from delest.records.plan import Choice

EXACT = ("bitwise", "rounding")  # what leaves the mathematics as it is
MARGIN = 0.10  # of what training adds: a step's resident set varies by 6 % between processes (docs/log.md)
MARGIN_BYTES = 48 << 20  # 24 for chance, 16 that the guard holds back, 8 that a training starts higher than its plan's process
SLACK_BYTES = 8 << 20  # a process that asks again starts a few MiB higher or lower


@dataclass(frozen=True, kw_only=True)
class Request:
    """`probe` is what `footprint.probe.examine` gives; bytes are of the whole process."""

    job: Job
    probe: Mapping[str, Any]
    budget_bytes: int
    asked: bool  # the user gave the budget, else it is what is free
    idle_bytes: int  # of the process before it trains
    threads: int
    isolated: bool = True
    exact: bool = False  # only methods that keep the results, bit for bit or to rounding
    recomputes: bool = True  # whether activations can be recomputed, which keeps batches whole
    allocator: str = "glibc"  # of the process that was probed
    allocators: Mapping[str, Mapping[str, Any]] = field(
        default_factory=dict
    )  # others, each with the largest probed sample under it

    def sample(self, allocator: str) -> Mapping[str, Any]:
        """What the largest probed steps took under an allocator."""
        found: Mapping[str, Any] = self.probe["samples"][-1] if allocator == self.allocator else self.allocators[allocator]
        return found

    @property
    def least_rows(self) -> int:
        """Of a part: statistics over a batch need two, and exact ones the whole batch where activations cannot be recomputed."""
        if self.probe["batch_statistics"] and self.exact and not self.recomputes:
            return self.job.batch_size
        return min(self.job.batch_size, 2 if self.probe["batch_statistics"] else 1)

    @property
    def most_grown_bytes(self) -> float:
        """That training may add to the idle process, so that the budget is kept with the margin."""
        return (self.budget_bytes - self.idle_bytes - MARGIN_BYTES) / (1 + MARGIN)

    def high_bytes(self, grown_bytes: float) -> int:
        """The upper end of the interval where training adds `grown_bytes`."""
        return self.idle_bytes + int(grown_bytes * (1 + MARGIN)) + MARGIN_BYTES


def notes(request: Request, rows: int) -> tuple[str, ...]:
    """What should be known of a plan with parts of `rows` rows."""
    found = []
    if rows < request.job.batch_size and request.probe["batch_statistics"]:
        found.append(
            f"the model normalises over the batch, and sees {rows} rows of it at a time in place of {request.job.batch_size}: results may "
            f"differ. Other ways: {'--exact keeps batches whole (and recomputes activations), ' * request.recomputes}a larger --memory, a smaller "
            "--batch-size, or layers that do not depend on the batch (GroupNorm, LayerNorm)."
        )
    if request.probe["busy"]:
        found.append(
            f"the machine was busy while steps were probed ({request.probe['busy']}): they are expected to take less time when it is "
            "quiet, and what is faster may be another method. Plan again then; figures of memory do not depend on it."
        )
    return tuple(found)


def make_choice(method: str, config: dict[str, Any], probe: Mapping[str, Any], why: str, **figures: Any) -> Choice:
    """A choice with what its method does to the mathematics."""
    keeps = methods.named(method).keeps(config, batch_statistics=probe["batch_statistics"])
    return Choice(method=method, config=config, keeps=keeps, why=why, **figures)
