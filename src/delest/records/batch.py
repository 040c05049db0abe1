"""What flows through training: batches in, steps and outputs out, states to and from checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy import int64
    from numpy.typing import NDArray

    Inputs = NDArray | tuple[NDArray, ...] | Mapping[str, NDArray]


@dataclass(frozen=True)
class Batch:
    """Rows that make one step. An array of inputs is `model(inputs)`, a tuple `model(*inputs)`, a mapping `model(**inputs)`."""

    inputs: Inputs
    targets: NDArray | None
    index: NDArray[int64]  # [B] row numbers in the source
    epoch: int
    count: int  # B


class Lazy:
    """A figure that is computed when first asked for: reading one waits for the device."""

    def __init__(self, compute: Callable[[], float]):
        self._compute: Callable[[], float] | None = compute
        self._value = 0.0

    def __float__(self) -> float:
        if self._compute is not None:
            self._value, self._compute = self._compute(), None
        return self._value


@dataclass(frozen=True)
class Step:
    """What one optimizer step gave. `applied` is False where fp16 overflowed and the update was left out."""

    loss: Lazy  # mean over the batch
    count: int
    gradient_norm: Lazy | None  # before clipping; None where no clipping was asked for
    applied: bool = True


@dataclass(frozen=True)
class Outputs:
    """One batch in evaluation mode, all NumPy."""

    outputs: NDArray | Any | None  # [B, ...]; None where the job has a `step` and no `predict`
    targets: NDArray | None
    losses: NDArray  # [B]
    index: NDArray[int64]  # [B]


@dataclass(frozen=True)
class State:
    """A session at rest: named arrays (bf16 stored as uint16 and named in `scalars`) and JSON scalars."""

    arrays: Mapping[str, NDArray]
    scalars: Mapping[str, Any] = field(default_factory=dict)
