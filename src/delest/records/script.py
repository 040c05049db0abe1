"""What a training script that knows nothing of delest was seen to take."""

from __future__ import annotations

from dataclasses import dataclass, field

from delest.records.footprint import Timeline


@dataclass(frozen=True, kw_only=True)
class OptimizerUse:
    """One optimizer of the script."""

    name: str  # class name
    steps: int
    parameter_bytes: int
    state_bytes: int
    implementation: str | None = None  # loop, foreach, fused; None where the class has no such choice
    seconds: float | None = None  # of a step, without forward and backward; None on a GPU, which is not waited for


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """One change to the script, with an estimate of what a step would save."""

    what: str
    saved_bytes: int | None = None
    saved_seconds: float | None = None  # of a step
    code: str = ""  # the change in plain code


@dataclass(frozen=True, kw_only=True)
class ScriptMeasurement:
    """Bytes are of the resident set, or of the device where the model is on a GPU; seconds are of a step.

    Steps after warm-up count for times and the steady peak; those in which data other than the training data were drawn, or an
    epoch ended, do not.
    """

    command: tuple[str, ...]
    status: int  # the script's own; 128 + n where signal n ended it
    seconds: float  # from start to end
    peak_bytes: int  # over the whole run
    steady_peak_bytes: int | None = None  # of training steps after warm-up
    runtime_bytes: int | None = None  # libraries, the script and the data that it holds, without the model
    breakdown: dict[str, int] = field(default_factory=dict)  # as in a `Footprint`; sums to the steady peak
    device: str = "cpu"
    resident_peak_bytes: int | None = None  # of the process, where `device` is a GPU
    allocated_bytes: int | None = None  # highest sum of live tensors, where `device` is a GPU
    retained_bytes: int | None = None  # that the allocator kept free when a backward pass began
    steps: int = 0
    step_seconds: float | None = None  # median
    step_seconds_spread: float | None = None  # interquartile range
    waiting_seconds: float | None = None  # for data, on average
    backward_seconds: float | None = None  # median; None on a GPU
    optimizers: tuple[OptimizerUse, ...] = ()
    parameters: int | None = None
    batch_rows: int | None = None  # that a step uses, None where no DataLoader was drawn from
    micro_batch: int | None = None  # rows of the largest batch that was drawn
    timeline: Timeline | None = None
    remedies: tuple[Remedy, ...] = ()  # at most three, the largest estimated saving first
    notes: tuple[str, ...] = ()
