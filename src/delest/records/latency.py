"""How long an exported model takes to answer, and in how much memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Calls on batches of one size."""

    rows: int
    seconds: float  # median of a call
    seconds_spread: float  # interquartile range
    rows_per_second: float
    peak_bytes: int  # of the resident set during such calls


@dataclass(frozen=True, kw_only=True)
class Latency:
    """A bundle run in a process of its own."""

    path: str
    timings: tuple[Timing, ...]  # by rows, ascending
    peak_bytes: int  # of the resident set, runtime and loading included
    runtime_bytes: int  # of the process with all libraries loaded, before the bundle
    loaded_bytes: int  # that loading added to the resident set
    model_bytes: int  # of model.onnx on disk
    providers: tuple[str, ...]  # of ONNX Runtime, in order of preference
    threads: int | None  # None: ONNX Runtime's choice, one a physical core
