"""Synthetic data, made row by row when read: a million rows take no memory."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np

from delest import errors
from delest.data import fingerprints
from delest.data.augmentation import Draws
from delest.records.source import Column, Schema, Target

if TYPE_CHECKING:
    from numpy import float32, int64
    from numpy.typing import NDArray

_GRID = 8  # patterns are this coarse, so that networks which pool can see them
_OFFSETS = 1 << 18  # places in the noise that a row may start from


def synthetic(
    *shape: int, classes: int | None = 10, rows: int = 1000, seed: int = 0, kind: Literal["image", "array"] | None = None
) -> Synthetic:
    """Learnable data: a pattern for each class under noise.

    `shape` is (H, W, C) for uint8 images, (D,) or any other for float32 arrays; `kind` says which where three
    dimensions are to be an array. With `classes=None` the target is a number in [0, 1) that blends two patterns.
    Every row is a function of (seed, row number). Raises `BadInput` for sizes that make no data.

    >>> import numpy as np
    >>> source = synthetic(28, 28, 1, classes=3, rows=1_000_000)
    >>> source.read(np.array([0, 999_999]))["image"].shape
    (2, 28, 28, 1)
    """
    kind = kind or ("image" if len(shape) == 3 and shape[2] in (1, 3, 4) else "array")
    faults = []
    if not shape or min(shape) < 1 or (kind == "image" and len(shape) != 3):
        faults.append(
            f"synthetic: shape {shape} is no {kind}; give (height, width, channels) for images, or (features,) for arrays."
        )
    if kind not in ("image", "array"):
        faults.append(f"synthetic: kind is {kind!r}; it must be 'image' or 'array'.")
    if rows < 1:
        faults.append(f"synthetic: rows is {rows}; there must be at least 1.")
    if classes is not None and classes < 2:
        faults.append(f"synthetic: classes is {classes}; there must be at least 2, or None for a number as target.")
    if faults:
        raise errors.BadInput(faults)
    return Synthetic(shape, classes, rows, seed, kind)


class Synthetic:
    """A source of patterns under noise; see `synthetic`."""

    left_out: tuple[str, ...] = ()

    def __init__(self, shape: tuple[int, ...], classes: int | None, rows: int, seed: int, kind: Literal["image", "array"]):
        self._shape, self._classes, self._rows, self._seed = shape, classes, rows, seed
        name, dtype = ("image", "uint8") if kind == "image" else ("x", "float32")
        self._column = Column(name=name, kind=kind, shape=shape, dtype=dtype)
        names = None if classes is None else tuple(str(k) for k in range(classes))
        self._target = Target(name="target", kind="number" if names is None else "class", classes=names)
        self.schema = Schema(inputs=(self._column,), target=self._target)
        self.fingerprint = fingerprints.of_text("synthetic", str(shape), str(classes), str(rows), str(seed), kind)
        self.description = f"{rows:,} synthetic {kind}s of {'x'.join(map(str, shape))}"

    def __len__(self) -> int:
        return self._rows

    def sizes(self) -> NDArray[int64] | None:
        return None

    def roles(self) -> NDArray | None:
        return None

    def values(self, name: str) -> NDArray:
        index = np.arange(self._rows)
        return self._targets(index) if name == self._target.name else self.read(index)[name]

    def read(self, index: NDArray[int64]) -> dict[str, NDArray]:
        targets = self._targets(index)
        draws = Draws.of(self._seed, 1, index)
        values = self._patterns(targets)
        values *= 1 - 0.2 * draws.uniform(0).astype(np.float32).reshape(-1, *(1,) * len(self._shape))
        values += self._noise(draws.whole(1, 0, _OFFSETS - 1)).reshape(values.shape)
        if self._column.kind == "image":
            values = np.clip(128 + 48 * values, 0, 255).astype(np.uint8)
        return {self._column.name: values, self._target.name: targets}

    def _targets(self, index: NDArray[int64]) -> NDArray:
        if self._classes is not None:
            return index % self._classes
        return Draws.of(self._seed, 0, index).uniform(0)

    @cached_property
    def _coarse(self) -> NDArray[float32]:
        """A coarse pattern for each class (two for a number): [K, ...], no side of a picture above the grid."""
        sides = self._shape
        if self._column.kind == "image":
            sides = (min(_GRID, sides[0]), min(_GRID, sides[1]), sides[2])
        count = 2 if self._classes is None else self._classes
        return np.random.Generator(np.random.PCG64(self._seed)).standard_normal((count, *sides), np.float32)

    def _patterns(self, targets: NDArray) -> NDArray[float32]:
        if self._classes is None:
            share = targets.astype(np.float32).reshape(-1, *(1,) * len(self._shape))
            coarse = self._coarse[0] + share * (self._coarse[1] - self._coarse[0])
        else:
            coarse = self._coarse[targets]
        if self._column.kind != "image":
            return coarse
        height, width = self._shape[:2]
        rows = np.arange(height) * coarse.shape[1] // height
        columns = np.arange(width) * coarse.shape[2] // width
        return coarse[:, rows][:, :, columns]

    @cached_property
    def _bank(self) -> NDArray[float32]:
        """Noise that rows cut their part from: making it anew for each would cost more than a training step."""
        size = _OFFSETS + int(np.prod(self._shape))
        return np.random.Generator(np.random.PCG64([self._seed, 1])).standard_normal(size, np.float32)

    def _noise(self, starts: NDArray[int64]) -> NDArray[float32]:
        windows = np.lib.stride_tricks.sliding_window_view(self._bank, int(np.prod(self._shape)))
        return windows[starts]
