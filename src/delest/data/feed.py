"""The feed of batches: shuffled by (seed, epoch), one read a batch; its state is two integers, epoch and position."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from delest.data.augmentation import augment_inputs, check_augmentations
from delest.data.preprocessing import Preprocessing
from delest.records.batch import Batch
from delest.records.source import Schema, Source

if TYPE_CHECKING:
    from numpy import int64
    from numpy.typing import NDArray


class Feed:
    """Batches of the rows `index` of a source.

    `batch_size` is the global one: of `world` feeds each gives every `world`-th row of a batch, from its `rank` on, and
    a last batch that has no row for some rank is left out, so that all make the same number of steps.
    """

    def __init__(
        self,
        source: Source,
        index: NDArray[int64],
        preprocessing: Preprocessing,
        *,
        batch_size: int,
        seed: int = 0,
        augment: Sequence[str] = (),
        rank: int = 0,
        world: int = 1,
    ):
        check_augmentations(augment, source.schema)
        self.source, self.index, self.preprocessing = source, index, preprocessing
        self.batch_size, self.seed, self.augment = batch_size, seed, tuple(augment)
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        """Rows an epoch, those of all ranks."""
        return len(self.index)

    @property
    def steps(self) -> int:
        """Batches an epoch."""
        return sum(1 for part in self._parts(self.index) if len(part) >= self.world)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """Batches of one epoch in its own order, from `start` samples on; the last may be smaller."""
        order = self.index[np.random.Generator(np.random.PCG64([self.seed, number])).permutation(len(self.index))]
        mine = [part[self.rank :: self.world] for part in self._parts(order[start:]) if len(part) >= self.world]
        for rows, index in self._reads(mine):
            inputs = augment_inputs(
                self.preprocessing.inputs(rows), self.augment, self.source.schema, seed=self.seed, epoch=number, index=index
            )
            yield Batch(inputs, self.preprocessing.targets(rows), index, number, len(index))

    def _parts(self, order: NDArray[int64]) -> list[NDArray[int64]]:
        """Whole batches and what is left; a single row that is left joins the batch before it, since a normalisation
        over the batch cannot train on one row."""
        size = self.batch_size
        cuts = list(range(size, len(order) - (1 if size > 1 and len(order) > size else 0), size))
        return np.split(order, cuts) if len(order) else []

    def ordered(self) -> Iterator[Batch]:
        """All rows (of this rank) once, in order and not augmented: for evaluation."""
        for rows, index in self._reads(self._in_order()):
            yield Batch(self.preprocessing.inputs(rows), self.preprocessing.targets(rows), index, 0, len(index))

    def raw(self) -> Iterator[Batch]:
        """`ordered` with the inputs that an exported bundle takes (`raw_rows`)."""
        for rows, index in self._reads(self._in_order()):
            yield Batch(_raw_inputs(self.source.schema, rows), self.preprocessing.targets(rows), index, 0, len(index))

    def _in_order(self) -> list[NDArray[int64]]:
        mine = self.index[self.rank :: self.world]
        return [mine[place : place + self.batch_size] for place in range(0, len(mine), self.batch_size)]

    def _reads(self, parts: Sequence[NDArray[int64]]) -> Iterator[tuple[dict[str, NDArray], NDArray[int64]]]:
        """Rows of each batch; a source that decodes is read one batch ahead, while the caller computes."""
        if not getattr(self.source, "decodes", False):
            yield from ((self.source.read(index), index) for index in parts)
            return
        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(self.source.read, parts[0]) if parts else None
            for place, index in enumerate(parts):
                assert coming is not None
                rows = coming.result()
                if place + 1 < len(parts):
                    coming = ahead.submit(self.source.read, parts[place + 1])
                yield rows, index


def raw_rows(source: Source, index: NDArray[int64]) -> dict[str, NDArray]:
    """The mapping that an exported bundle takes for the rows `index` [B].

    Images: `image` uint8 [B, H, W, C]. Arrays by column name as stored. Number columns: float64 [B], NaN where missing.
    Category columns: text [B], "" where missing.
    """
    return _raw_inputs(source.schema, source.read(index))


def _raw_inputs(schema: Schema, rows: Mapping[str, NDArray]) -> dict[str, NDArray]:
    raw = {}
    for column in schema.inputs:
        values = rows[column.name]
        if column.kind == "image":
            raw["image"] = values
        elif column.kind == "number":
            raw[column.name] = values.astype(np.float64, copy=False)
        elif column.kind == "category":
            raw[column.name] = np.array(["", *(column.categories or ())], object)[values]
        else:
            raw[column.name] = values
    return raw
