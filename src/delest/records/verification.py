"""What `verify` found: whether each method of a plan keeps what it states, and whether a killed run goes on unchanged."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from delest.records.plan import Keeps, Plan


@dataclass(frozen=True, kw_only=True)
class MethodCheck:
    """One method, or all of a plan together, against the plain step on the same batches.

    Differences are relative (fractions), the largest of any step or tensor; None where there is none to be had: the step
    failed, or values were not finite.
    """

    name: str
    keeps: Keeps  # what the plan states, and what is checked
    ok: bool
    why: str  # what was compared and how it was judged, in words
    steps: int = 0  # whose losses were compared
    precision: Literal["fp32", "fp64"] = "fp32"  # in which they were computed; fp32: as the job trains
    tolerance: float | None = None  # of losses and gradients; None: the differences are reported, not judged
    weight_tolerance: float | None = None
    loss_difference: float | None = None
    gradient_difference: float | None = None  # of the first step
    weight_difference: float | None = None  # weights and buffers after the last step


@dataclass(frozen=True, kw_only=True)
class ResumeCheck:
    """A short run that SIGKILL ended and that was resumed, against one that was left alone.

    A digest is the SHA-256 of weights, optimizer state and random state after the last step, and of the best weights.
    """

    ok: bool | None  # None: not tried
    why: str
    steps: int = 0
    killed_at: int | None = None  # after this step, before it was saved
    resumed_from: int | None = None  # the step of the checkpoint
    sha256: str | None = None  # of the run that was left alone
    resumed_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The whole verdict: `ok` where no check failed."""

    ok: bool
    plan: Plan
    methods: tuple[MethodCheck, ...]  # empty: the plan has none
    resume: ResumeCheck
    rows: int  # of a batch that was compared: fewer than the job's where the plain step would not fit
    job: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
