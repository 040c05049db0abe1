"""From rows as a source reads them to what the model receives: standardising, missing values, targets in and out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from delest.records.source import Column, Schema, Source

if TYPE_CHECKING:
    from numpy import float64, int64
    from numpy.typing import NDArray

    from delest.records.batch import Inputs

_BLOCK_BYTES = 8 << 20  # of rows read at a time while fitting


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Everything needed to turn raw rows into model inputs, here or inside an exported graph.

    `mean` and `std` are keyed by column name, in raw units (pixels 0 to 255): a value a channel (images, arrays with two
    or more dimensions a row: their first), a value a feature (arrays with one), one value (number columns). Category
    columns and arrays of ids are in neither: they reach the model as they are. A value becomes
    (value - mean) / std, of number columns and whole numbers in float64; a missing number becomes 0 after that, and each column of `indicators` adds a 0/1 column after
    all numbers.
    """

    schema: Schema
    mean: dict[str, tuple[float, ...]] = field(default_factory=dict)
    std: dict[str, tuple[float, ...]] = field(default_factory=dict)
    positional: bool = False  # several arrays came as a tuple and reach the model as one
    image_size: int | None = None  # side that images are resized and cropped to; None: used as stored
    target_mean: float = 0.0  # of a number target
    target_std: float = 1.0

    @property
    def indicators(self) -> tuple[str, ...]:
        """Number columns with missing values, in schema order."""
        return tuple(column.name for column in self.schema.numbers if column.missing)

    @cached_property
    def _scaling(self) -> dict[str, tuple[NDArray, NDArray]]:
        """float64 (mean, 1 / std) by column."""
        return {name: (np.array(self.mean[name]), 1 / np.array(self.std[name])) for name in self.mean}

    def inputs(self, rows: Mapping[str, NDArray]) -> Inputs:
        """What the model receives for rows of `Source.read`, as `Schema` says: C-contiguous float32 and int64."""
        schema = self.schema
        if schema.is_image:
            return self._pixels(rows[schema.inputs[0].name], schema.inputs[0].name)
        if schema.is_table:
            return self._table(rows)
        arrays = {column.name: self._array(rows[column.name], column) for column in schema.inputs}
        if len(arrays) == 1:
            return next(iter(arrays.values()))
        return tuple(arrays.values()) if self.positional else arrays

    def targets(self, rows: Mapping[str, NDArray]) -> NDArray | None:
        """int64 class codes [B] or ids of tokens [B, T], standardised float32 numbers [B], or arrays as stored; None where there is no target."""
        target = self.schema.target
        if target is None:
            return None
        values = rows[target.name]
        if target.kind == "array":
            return values
        if target.kind != "number":
            return values.astype(np.int64, copy=False)
        return ((values - self.target_mean) / self.target_std).astype(np.float32)

    def restore(self, outputs: Any) -> Any:
        """Standardised numbers back in the target's units, float64, [B, 1] as [B]; everything else unchanged."""
        target = self.schema.target
        if target is None or target.kind != "number" or not isinstance(outputs, np.ndarray):
            return outputs
        flat = outputs[:, 0] if outputs.ndim == 2 and outputs.shape[1] == 1 else outputs
        return flat.astype(np.float64) * self.target_std + self.target_mean

    def _pixels(self, pixels: NDArray, name: str) -> NDArray:
        mean, scale = (values.astype(np.float32) for values in self._scaling[name])
        batch, height, width, channels = pixels.shape
        out = np.empty((batch, channels, height, width), np.float32)
        for c in range(channels):  # one pass each, multiply and add in place: no temporary copy of the batch
            np.multiply(pixels[..., c], scale[c], out=out[:, c], dtype=np.float32)
            out[:, c] -= mean[c] * scale[c]
        return out

    def _array(self, values: NDArray, column: Column) -> NDArray:
        if column.name not in self._scaling:
            return np.ascontiguousarray(values, np.int64)
        exact = np.float64 if column.dtype == "int64" else np.float32
        trailing = (1,) * (values.ndim - 2)
        mean, scale = (values.astype(exact).reshape(-1, *trailing) for values in self._scaling[column.name])
        out: Any = values.astype(exact, order="C")
        out -= mean
        out *= scale
        return out.astype(np.float32, copy=False)

    def _table(self, rows: Mapping[str, NDArray]) -> Inputs:
        schema = self.schema
        numbers, categories = schema.numbers, schema.categories
        received: dict[str, NDArray] = {}
        if numbers:
            # In float64, as exported graphs do: float32 would round times of a clock to minutes.
            received["numbers"] = out = np.empty((len(rows[numbers[0].name]), schema.number_width), np.float32)
            for place, column in enumerate(numbers):
                mean, scale = self._scaling[column.name]
                out[:, place] = (rows[column.name] - mean) * scale
            for place, name in enumerate(self.indicators, len(numbers)):
                out[:, place] = np.isnan(rows[name])
            np.nan_to_num(out, copy=False, nan=0.0)
        if not categories:
            return received["numbers"]
        received["categories"] = np.stack([rows[column.name] for column in categories], axis=1).astype(np.int64, copy=False)
        return received


def fit_preprocessing(source: Source, index: NDArray[int64], *, ids: bool = True) -> Preprocessing:
    """Fit on the rows `index` (the training rows) in one exact pass: histograms for images, else float64 moments.

    Arrays of whole numbers are ids, which a model looks up, or with `ids` False numbers like others, as a model that looks
    nothing up needs them. A constant feature gets a deviation of 1. Source of the merging: Chan, Golub, LeVeque, "Updating Formulae and a
    Pairwise Algorithm for Computing Sample Variances", 1979.
    """
    schema = source.schema
    moments: dict[str, _Moments] = {}
    for rows in () if schema.is_text else _blocks(source, index):
        for column in schema.inputs:
            if column.kind == "image" or _is_standardised(column, ids):
                moments.setdefault(column.name, _Moments()).add(_features(rows[column.name], column))
        if schema.target is not None and schema.target.kind == "number":
            moments.setdefault("\0target", _Moments()).add(rows[schema.target.name].reshape(-1, 1))
    target = moments.pop("\0target", None)
    fitted = {name: moment.result() for name, moment in moments.items()}
    return Preprocessing(
        schema=schema,
        mean={name: tuple(mean.tolist()) for name, (mean, _) in fitted.items()},
        std={name: tuple(std.tolist()) for name, (_, std) in fitted.items()},
        positional=getattr(source, "positional", False),
        image_size=getattr(source, "image_size", None),
        target_mean=float(target.result()[0][0]) if target else 0.0,
        target_std=float(target.result()[1][0]) if target else 1.0,
    )


def unscaled(fitted: Preprocessing) -> Preprocessing:
    """The same without standardising, as a network that was trained elsewhere needs it: pixels from 0 to 1, numbers and targets as they are stored."""
    pixels = {column.name for column in fitted.schema.inputs if column.kind == "image"}
    return replace(
        fitted,
        mean={name: (0.0,) * len(values) for name, values in fitted.mean.items()},
        std={name: ((255.0 if name in pixels else 1.0),) * len(values) for name, values in fitted.std.items()},
        target_mean=0.0,
        target_std=1.0,
    )


def _is_standardised(column: Column, ids: bool) -> bool:
    return column.kind == "number" or (column.kind == "array" and not (ids and column.dtype == "int64"))


def _blocks(source: Source, index: NDArray[int64]) -> Iterator[dict[str, NDArray]]:
    row_bytes = sum(8 * int(np.prod(column.shape)) for column in source.schema.inputs) or 8
    step = max(1, _BLOCK_BYTES // row_bytes)
    for start in range(0, len(index), step):
        yield source.read(index[start : start + step])


def _features(values: NDArray, column: Column) -> NDArray:
    """[n, features] of a block: everything but the channel (or feature) dimension counts as a row."""
    if column.kind == "image":
        return values.reshape(-1, values.shape[-1])
    if column.kind == "number":
        return values.reshape(-1, 1)
    return np.moveaxis(values, 1, -1).reshape(-1, values.shape[1])


class _Moments:
    """Count, mean and sum of squared deviations by feature, merged block by block; NaN is left out."""

    def __init__(self) -> None:
        self.count: Any = 0
        self.mean: Any = 0.0
        self.squares: Any = 0.0
        self.resolution = 1e-13  # of the values, of which a deviation below it is rounding

    def add(self, values: NDArray) -> None:
        """Merge a block [n, features]; bytes through their histogram, which is exact."""
        if values.dtype == np.uint8:
            count, mean, squares = _byte_moments(values)
        else:
            if values.dtype == np.float32:
                self.resolution = 1e-7
            values = values.astype(np.float64)
            known = ~np.isnan(values)
            count = known.sum(0)
            mean = np.where(known, values, 0.0).sum(0) / np.maximum(count, 1)
            squares = (np.where(known, values - mean, 0.0) ** 2).sum(0)
        total = np.maximum(self.count + count, 1)
        difference = mean - self.mean
        self.mean = self.mean + difference * (count / total)
        self.squares = self.squares + squares + difference**2 * (self.count * (count / total))
        self.count = self.count + count

    def result(self) -> tuple[NDArray[float64], NDArray[float64]]:
        """Mean and standard deviation by feature."""
        mean = np.asarray(self.mean, np.float64)
        std = np.sqrt(self.squares / np.maximum(self.count, 1))
        # Dividing by a deviation that is rounding would blow noise up.
        return mean, np.where(std <= self.resolution * np.abs(mean), 1.0, std)


def _byte_moments(values: NDArray) -> tuple[Any, Any, Any]:
    levels = np.arange(256, dtype=np.float64)
    counts = np.stack([np.bincount(values[:, c], minlength=256) for c in range(values.shape[1])])
    mean = counts @ levels / len(values)
    squares = (counts * (levels - mean[:, None]) ** 2).sum(1)
    return np.full(values.shape[1], len(values)), mean, squares
