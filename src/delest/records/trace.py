"""One traced training loop: every operator in order, and every storage from birth to death.

A trace is of fake tensors: shapes and lifetimes without memory. It holds a setting-up, two whole training steps (an optimizer
that makes its state in the first has it only in the second) and one evaluation. Bytes are a fixed part and a part for each row
of the micro-batch, so that one trace serves any batch size between and beyond those it was made at.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Phase = Literal["start", "forward", "backward", "update", "evaluation"]
Category = Literal["parameters", "buffers", "gradients", "optimizer", "activations", "temporaries", "data"]
CATEGORIES: tuple[Category, ...] = (
    "parameters",
    "buffers",
    "gradients",
    "optimizer",
    "activations",  # kept by autograd for the backward pass
    "temporaries",  # everything else that the step makes
    "data",  # the batch
)


@dataclass(frozen=True, kw_only=True)
class Storages:
    """One entry a storage, in order of birth; lists of equal length S.

    A storage is born while the operator at `born` runs and is live for all operators k with born <= k < dies. `dies` is the
    number of operators where it outlives the trace.
    """

    born: list[int]
    dies: list[int]
    fixed_bytes: list[float]
    per_sample_bytes: list[float]
    category: list[Category]
    module: list[str]  # dotted name of the module whose forward (or whose backward) made it; "" outside any
    touched: dict[int, float] = field(default_factory=dict)  # by number, the share that is ever written, where it is not all

    def sizes(self, rows: int) -> list[int]:
        """Bytes of each storage with `rows` rows in the micro-batch."""
        return [
            max(0, round(fixed + per_sample * rows))
            for fixed, per_sample in zip(self.fixed_bytes, self.per_sample_bytes, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class Operators:
    """One entry an operator, in order; lists of equal length K."""

    name: list[str]  # "aten.convolution.default"
    module: list[str]
    phase: list[Phase]
    step: list[int]  # 0 before the first step, 1, 2, and 3 in evaluation
    reads: list[tuple[int, ...]]  # numbers of storages
    writes: list[tuple[int, ...]]
    kind: list[str]  # which rate of a `Roofline` it is held to: matmul, convolution, softmax ..., memory; view: no work
    dtype: list[str]  # that it computes in: fp32, bf16, fp16, fp64, int
    fixed_flops: list[float]  # a multiply-add is 2
    per_sample_flops: list[float]
    fixed_moved_bytes: list[float]  # read and written if nothing stays in a cache
    per_sample_moved_bytes: list[float]
    fixed_scratch_bytes: list[float]  # what the kernel takes for itself while it runs, beyond its outputs
    per_sample_scratch_bytes: list[float]
    signature: list[str]  # operator with the shapes it had at the smaller traced size: what probes are kept under

    def __len__(self) -> int:
        return len(self.name)

    def flops(self, rows: int) -> list[float]:
        return _affine(self.fixed_flops, self.per_sample_flops, rows)

    def moved_bytes(self, rows: int) -> list[float]:
        return _affine(self.fixed_moved_bytes, self.per_sample_moved_bytes, rows)

    def scratch_bytes(self, rows: int) -> list[float]:
        return _affine(self.fixed_scratch_bytes, self.per_sample_scratch_bytes, rows)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What `footprint.replay` turns into bytes and `footprint.time` into seconds."""

    storages: Storages
    operators: Operators
    rows: tuple[int, int]  # the micro-batch sizes that were traced
    how: str  # how the model was built without memory, in words
    precision: str = "fp32"
    optimizer: str = ""
    state_bytes: int = 0  # weights, buffers and optimizer state: what a checkpoint holds
    modules: dict[str, str] = field(default_factory=dict)  # dotted name to class name, in order of registration
    notes: tuple[str, ...] = ()  # what the trace could not see and which rule stands in for it


def _affine(fixed: list[float], per_sample: list[float], rows: int) -> list[float]:
    return [max(0.0, constant + slope * rows) for constant, slope in zip(fixed, per_sample, strict=True)]
