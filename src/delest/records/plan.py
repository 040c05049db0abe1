"""Which methods a run uses, what they save and cost, and what was turned down."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from delest.records.footprint import Footprint

Keeps = Literal["bitwise", "rounding", "distribution", "changed"]
KEEPS: tuple[Keeps, ...] = ("bitwise", "rounding", "distribution", "changed")  # from the least change to the largest


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One method with its configuration."""

    method: str
    config: dict[str, Any]
    keeps: Keeps  # what it does to the mathematics
    why: str
    saved_bytes: int | None = None
    cost_seconds: float | None = None  # per step; negative is a gain


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """A method that was considered and not chosen, and the reason."""

    method: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Option:
    """A combination of methods that was compared, with what it would take."""

    methods: tuple[str, ...]  # without micro_batch
    blocks: int  # that are recomputed
    micro_batch: int
    peak_bytes: int
    step_seconds: float
    fits: bool
    keeps: Keeps
    bits: int | None = None  # of each of the optimizer's moments, where there is an optimizer_state
    choices: tuple[Choice, ...] = ()  # without micro_batch
    measured_bytes: int | None = None  # at the peak, where real steps were made with it
    measured_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `train` follows."""

    choices: tuple[Choice, ...] = ()
    batch_size: int
    micro_batch: int
    memory_bytes: int | None = None  # the budget that was asked for, None: what was free
    predicted: Footprint | None = None
    plain: Footprint | None = None  # the same job with no method
    rejected: tuple[Rejection, ...] = ()
    frontier: tuple[Option, ...] = ()  # from the least memory to the shortest step; empty where nothing had to be compared
    considered: tuple[Option, ...] = ()  # the chosen one, the fastest others that fit, the fastest that do not
    threads: int | None = None
    device: str = "cpu"
    code: str = ""  # the equivalent in a plain script of PyTorch or Keras
    made_for: dict[str, str] = field(default_factory=dict)  # `job`, a fingerprint, and `machine`, in words; empty: any
    notes: tuple[str, ...] = ()  # what should be known before it is followed
    model: dict[str, Any] | None = None  # it was made for: `parameters`, `tensors`, SHA-256 of their `shapes`
    seconds: dict[str, float] = field(default_factory=dict)

    def config(self, method: str) -> dict[str, Any] | None:
        """The configuration of a chosen method, None where it was not chosen."""
        return next((choice.config for choice in self.choices if choice.method == method), None)
