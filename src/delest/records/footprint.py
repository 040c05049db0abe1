"""What training takes in memory and time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Memory in bytes of the resident set (CPU) or of the device (GPU), time in seconds."""

    peak_bytes: int  # runtime included
    runtime_bytes: int  # of a warm idle process
    low_bytes: int  # the interval in which the peak is expected
    high_bytes: int
    phases: dict[str, int] = field(default_factory=dict)  # by phase name, bytes
    step_seconds: float | None = None
    batch_size: int  # the effective one
    micro_batch: int  # rows that are in memory at once
    device: str = "cpu"
    basis: Literal["estimate", "measurement"]
    how: Literal["trace", "probe", "replay", "run"]
    isolated: bool = True  # measured in a process of its own
