"""A training run: what was done, how it ended, what was measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from delest.records.footprint import Footprint
from delest.records.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What `inspect` saw in the data. Counts are rows."""

    source: str  # what was opened, in words
    fingerprint: str
    rows: int
    kind: Literal["images", "table", "arrays", "text"]
    columns: tuple[dict[str, Any], ...]  # name, kind, shape, dtype, missing, and for numbers mean, std, low, high
    target: str | None
    classes: dict[str, int] | None  # rows a class, in class order
    splits: dict[str, int]  # rows a role
    row_bytes: int  # one row as the model receives it
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # what is worth knowing: imbalance, constant columns, duplicates
    baseline: dict[str, float] = field(
        default_factory=dict
    )  # the metric of always answering the most frequent class, the mean or how often each token occurs


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best state on the validation split."""

    step: int
    epoch: float
    score: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """The content of `run.json`."""

    path: Path
    name: str
    status: Literal["running", "done", "interrupted", "diverged", "failed"]
    job: dict[str, Any] = field(default_factory=dict)
    metric: str = ""
    higher_is_better: bool = True
    parameters: int = 0  # trainable and frozen
    steps: int = 0
    epochs: float = 0.0
    stopped_by: str | None = None  # "epochs", "plateau", "time", "target"
    plan: Plan | None = None
    measured: Footprint | None = None
    best: Best | None = None
    validation: dict[str, float] = field(default_factory=dict)
    test: dict[str, float] = field(default_factory=dict)
    data: Summary | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    decisions: tuple[dict[str, Any], ...] = ()
    preview: dict[str, Any] | None = None
    weights_sha256: str | None = None  # of best.safetensors' tensors
    versions: dict[str, str] = field(default_factory=dict)
