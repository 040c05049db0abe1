"""Candidates for shipping, compared on one machine, and which were kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

FRAMEWORKS = ("torch", "keras")  # names of the trained network as it is, run by its framework
RESTLESS = 0.25  # a candidate's `spread` from which on something else computes on the machine


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A paired one-sided 95 % confidence bound on how much worse a candidate is than the trained model.

    Differences are trained minus candidate for a metric where higher is better, signs turned otherwise.
    """

    drop: float  # mean paired difference; positive: the candidate is worse
    upper: float  # the bound: drop + 1.645 * sqrt(variance / rows)
    rows: int
    disagreeing: float  # share of rows that differ


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One form of the model, measured."""

    name: str  # "torch" or "keras", "fp32", "int8", "dynamic", "weights"; of narrower networks "pruned-1", "pruned-1-int8", "fresh", ...
    runtime: str  # "PyTorch eager", "ONNX Runtime"
    file_bytes: int | None  # of model.onnx; None for torch, whose weights are weights_bytes
    weights_bytes: int  # of the parameters and buffers
    latency_seconds: dict[int, float]  # median by batch size
    latency_spread: dict[int, tuple[float, float]]  # lower and upper quartile
    selection: dict[str, float]  # metrics on the rows that judge
    bound: Bound | None = None  # against the trained model; None for the trained model itself
    parity: float | None = None  # largest absolute difference of outputs from the trained model on real rows
    kept: bool = True
    why: str = ""
    parameters: int | None = None

    @property
    def spread(self) -> float:
        """How far the quartiles of its latency are apart, as a share of the median, at the batch size where they are furthest."""
        apart = [(high - low) / self.latency_seconds[size] for size, (low, high) in self.latency_spread.items()]
        return max(apart, default=0.0)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What became of a narrower network."""

    name: str
    accepted: bool  # its accuracy is within the bound
    why: str
    parameters: int
    seconds: float  # that it took: cutting, learning, judging
    upper: float | None = None  # what it may have lost, with 95 % confidence, in the metric's unit; None: it was not judged


@dataclass(frozen=True, kw_only=True)
class Shrunk:
    """The content of `shrink.json`."""

    path: Path  # of the artefact that ships
    shipped: str  # name of the candidate
    metric: str
    max_drop: float
    candidates: tuple[Candidate, ...]
    test: dict[str, float] = field(default_factory=dict)  # of what ships
    seconds: dict[str, float] = field(default_factory=dict)
    threads: int = 1
    fast: str = ""  # the candidate that answers soonest, of those that may ship
    small: str = ""  # the smallest of them
    stages: tuple[Stage, ...] = ()
    judged_on: str = "selection"  # the role of the rows that judged; "train" proves nothing

    @property
    def spread(self) -> float:
        """The largest spread of the candidates' latencies."""
        return max((candidate.spread for candidate in self.candidates), default=0.0)
