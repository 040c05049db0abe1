"""Which framework to train a Keras job on: the same training on each, side by side."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

PRIORITIES = ("time", "memory")


@dataclass(frozen=True, kw_only=True)
class FrameworkResult:
    """The training on one framework, measured in a process of its own; None what a training that failed did not get to."""

    name: str  # tensorflow, jax, torch: as KERAS_BACKEND has it
    versions: dict[str, str] = field(default_factory=dict)
    fault: str | None = None  # why there is no training
    start_seconds: float | None = None  # from the start of the process to training: loading and building
    compile_seconds: float | None = None  # of all epochs, beyond what as many steady ones take
    step_seconds: float | None = None  # mean of the last epoch
    evaluation_seconds: float | None = None  # between two epochs: evaluating, keeping the best weights, saving
    whole_seconds: float | None = None  # of the job's own number of epochs, start and compiling included, by these figures
    whole_seconds_of: tuple[float, ...] = ()  # by each training, in their order; these figures are of the one in their middle
    peak_bytes: int | None = None  # of the process
    runtime_bytes: int | None = None  # of it before the model
    first_loss: float | None = None  # of the first training batch in evaluation mode, before any step
    loss_difference: float | None = None  # from the first framework's, as a share of it
    differs_at: str | None = None  # the first layer whose output is another than the first framework's, or "the loss"
    validation: dict[str, float] = field(default_factory=dict)  # of the best epoch

    @property
    def ok(self) -> bool:
        return self.fault is None


@dataclass(frozen=True, kw_only=True)
class FrameworkComparison:
    """What `compare` found; frameworks in the order in which they were asked for."""

    results: tuple[FrameworkResult, ...]
    recommended: str | None  # None where none trained the job
    why: str
    priority: Literal["time", "memory"]
    memory_bytes: int | None = None  # that a process may take at its peak
    metric: str
    higher_is_better: bool
    epochs: int  # that each was trained for
    whole_epochs: int  # that the job asks for
    batch_size: int
    steps: int  # of an epoch
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> FrameworkResult | None:
        """The framework that is recommended."""
        return next((one for one in self.results if one.name == self.recommended), None)
