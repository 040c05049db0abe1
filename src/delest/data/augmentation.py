"""Augmentation of whole batches in NumPy, a function of (seed, epoch, row): the same however rows are batched.

Random numbers come from a counter, not a stream: a hash of seed, epoch, row and the number of the draw, by the
finaliser of SplitMix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", 2014).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from delest import errors
from delest.job import AUGMENTATIONS, unknown
from delest.records.source import Schema

if TYPE_CHECKING:
    from numpy import float64, int64, uint64
    from numpy.typing import NDArray

    from delest.records.batch import Inputs

_GOLDEN = 0x9E3779B97F4A7C15
_IMAGE_ONLY = ("flip", "crop", "erase")
_NOISE_STD = 0.1  # of standardised numbers
_DROPPED = 0.1  # share of features
# Draws are numbered apart, so that one augmentation does not change when another is added.
_FLIP, _SHIFT, _ERASE, _DROP, _NOISE = 0, 1, 3, 1 << 20, 2 << 20


def check_augmentations(augment: Sequence[str], schema: Schema) -> None:
    """Raise `BadInput` for names that are unknown or do not suit the data, all together."""
    faults = []
    for name in augment:
        if name not in AUGMENTATIONS:
            faults.append(unknown("augmentation", name, AUGMENTATIONS))
        elif name in _IMAGE_ONLY and not schema.is_image:
            faults.append(f"augmentation {name!r} is for images, and these data are none. For tables: noise, dropout.")
        elif name not in _IMAGE_ONLY and not (schema.is_table or _is_features(schema)):
            faults.append(f"augmentation {name!r} is for tables, and these data are none. For images: flip, crop, erase.")
        elif name == "noise" and schema.is_table and not schema.numbers:
            faults.append("augmentation 'noise' is for number columns, and this table has none.")
    if faults:
        raise errors.BadInput(faults)


def augment_inputs(
    inputs: Inputs, augment: Sequence[str], schema: Schema, *, seed: int, epoch: int, index: NDArray[int64]
) -> Inputs:
    """Augmented inputs of the rows `index` [B], as `Preprocessing.inputs` gives them; they may be changed in place."""
    if not augment:
        return inputs
    draws = Draws.of(seed, epoch, index)
    if schema.is_image:
        assert isinstance(inputs, np.ndarray)
        return _augment_images(inputs, augment, draws)
    numbers = inputs if isinstance(inputs, np.ndarray) else inputs.get("numbers")  # type: ignore[union-attr]
    categories = None if isinstance(inputs, np.ndarray) else inputs.get("categories")  # type: ignore[union-attr]
    if numbers is not None:
        _augment_numbers(numbers[:, : len(schema.numbers) or None], augment, draws)
    if categories is not None and "dropout" in augment:
        columns = numbers.shape[1] if numbers is not None else 0
        categories[draws.uniform_grid(_DROP + columns, categories.shape[1]) < _DROPPED] = 0
    return inputs


@dataclass(frozen=True)
class Draws:
    """Random numbers of B rows: each draw number gives other ones."""

    keys: NDArray[uint64]  # [B]

    @classmethod
    def of(cls, seed: int, epoch: int, index: NDArray[int64]) -> Draws:
        key = _mixed(np.array([seed & 0xFFFFFFFFFFFFFFFF], np.uint64))
        key = _mixed(key + np.uint64((epoch + 1) * _GOLDEN & 0xFFFFFFFFFFFFFFFF))
        return cls(_mixed(key ^ index.astype(np.uint64)))

    def uniform(self, draw: int) -> NDArray[float64]:
        """Uniform numbers [B] in [0, 1)."""
        return self.uniform_grid(draw, 1)[:, 0]

    def uniform_grid(self, draw: int, width: int) -> NDArray[float64]:
        """Uniform numbers [B, width] of the draws from `draw` on."""
        counters = np.arange(draw + 1, draw + 1 + width, dtype=np.uint64) * np.uint64(_GOLDEN)
        return (_mixed(self.keys[:, None] + counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def whole(self, draw: int, low: int, high: int) -> NDArray[int64]:
        """Whole numbers [B] from low to high, both included."""
        return low + (self.uniform(draw) * (high - low + 1)).astype(np.int64)

    def normal_grid(self, draw: int, width: int) -> NDArray[float64]:
        """Standard normal numbers [B, width] (Box and Muller)."""
        radius = np.sqrt(-2 * np.log1p(-self.uniform_grid(draw, width)))
        return radius * np.cos(2 * np.pi * self.uniform_grid(draw + width, width))


def _mixed(x: NDArray[uint64]) -> NDArray[uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _is_features(schema: Schema) -> bool:
    """One array of features, a table in all but name."""
    return (
        len(schema.inputs) == 1
        and schema.inputs[0].kind == "array"
        and len(schema.inputs[0].shape) == 1
        and schema.inputs[0].dtype != "int64"
    )


def _augment_images(images: NDArray, augment: Sequence[str], draws: Draws) -> NDArray:
    """Flipped, shifted and partly erased images, float32 [B, C, H, W]."""
    batch, channels, height, width = images.shape
    if "flip" in augment or "crop" in augment:
        shifts = "crop" in augment
        rows = _shifted(height, draws, _SHIFT if shifts else None)
        columns = _shifted(width, draws, _SHIFT + 1 if shifts else None)
        if "flip" in augment:
            columns = np.where(draws.uniform(_FLIP)[:, None] < 0.5, width - 1 - columns, columns)
        places = (rows * width)[:, :, None] + columns[:, None, :]  # one gather does both
        flat = images.reshape(batch, channels, height * width)
        images = np.take_along_axis(flat, places.reshape(batch, 1, -1), axis=2).reshape(images.shape)
    if "erase" in augment:
        covered = _covered(height, draws, _ERASE)[:, :, None] & _covered(width, draws, _ERASE + 2)[:, None, :]
        covered &= (draws.uniform(_ERASE + 4) < 0.5)[:, None, None]
        np.copyto(images, 0.0, where=covered[:, None])
    return images


def _shifted(length: int, draws: Draws, draw: int | None) -> NDArray[int64]:
    """Places [B, length] to read from: shifted by up to an eighth of the side, reflected at the border."""
    places = np.broadcast_to(np.arange(length), (len(draws.keys), length))
    if draw is None:
        return places
    places = np.abs(places + draws.whole(draw, -(length // 8), length // 8)[:, None])
    return np.where(places >= length, 2 * (length - 1) - places, places)


def _covered(length: int, draws: Draws, draw: int) -> NDArray[np.bool_]:
    """Which places [B, length] a rectangle covers: an eighth to half of the side, anywhere inside."""
    sizes = draws.whole(draw, max(1, length // 8), max(1, length // 2))
    starts = (draws.uniform(draw + 1) * (length - sizes + 1)).astype(np.int64)
    places = np.arange(length)
    return (places >= starts[:, None]) & (places < (starts + sizes)[:, None])


def _augment_numbers(numbers: NDArray, augment: Sequence[str], draws: Draws) -> None:
    """Noise on and dropping of standardised features [B, D], in place."""
    if "noise" in augment:
        numbers += _NOISE_STD * draws.normal_grid(_NOISE, numbers.shape[1])
    if "dropout" in augment:
        numbers[draws.uniform_grid(_DROP, numbers.shape[1]) < _DROPPED] = 0
