"""What training takes in memory and time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

PHASES = ("start", "first_step", "steady_step", "evaluation", "saving", "resuming")


@dataclass(frozen=True, kw_only=True)
class ModuleShare:
    """What one module takes; a module's figures include those of the modules inside it."""

    name: str  # dotted; "" is the whole model
    kind: str  # class name
    parameter_bytes: int = 0
    state_bytes: int = 0  # gradients and optimizer state of its parameters
    activation_bytes: int = 0  # live at the peak
    peak_bytes: int = 0  # everything of it that is live at the peak
    seconds: float | None = None  # of a step
    flops: float | None = None  # of a step


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Live bytes by category along one first and one steady step; lists of equal length N, at most some hundred points."""

    position: list[float]  # 0 to 1 through the operators, or through the seconds of a measurement
    phase: list[str]  # "1 forward", "1 backward", "1 update", "2 forward", ...
    categories: dict[str, list[int]]  # bytes by category; their sum over categories is what is live
    peak: int  # index of the highest point
    module: list[str] = field(default_factory=list)  # where each point is, "" outside any module


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Memory in bytes of the resident set (CPU) or of the device (GPU), time in seconds."""

    peak_bytes: int  # runtime included
    runtime_bytes: int  # of a warm idle process
    low_bytes: int  # the interval in which the peak is expected; both ends are the peak where it was measured
    high_bytes: int
    phases: dict[str, int] = field(default_factory=dict)  # by name of `PHASES`, bytes
    breakdown: dict[str, int] = field(default_factory=dict)  # categories of a trace and `runtime`; sums to the peak
    modules: tuple[ModuleShare, ...] = ()
    timeline: Timeline | None = None
    allocated_bytes: int | None = None  # highest sum of live tensors, the kernels' own scratch included
    step_seconds: float | None = None
    step_seconds_spread: float | None = None  # interquartile range where steps were measured
    waiting_seconds: float | None = None  # of a step, for data
    bound_by: str | None = None  # compute, memory traffic, overhead, data
    flops: float | None = None  # of a step
    utilisation: float | None = None  # share of the device's highest rate in that precision
    batch_size: int  # the effective one
    micro_batch: int  # rows that are in memory at once
    device: str = "cpu"
    allocator: str = "glibc"  # glibc, mmap (fixed threshold), tcmalloc, jemalloc, cuda, exact
    basis: Literal["estimate", "measurement"]
    how: Literal["trace", "probe", "replay", "run"]
    isolated: bool = True  # measured in a process of its own
    validated_on: tuple[str, ...] = ()  # devices on which a committed result backs such an estimate
    notes: tuple[str, ...] = ()  # assumptions, and what is not covered
