"""Columns at rest, each read in any order, and the sources made of them."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from delest.data import fingerprints
from delest.records.source import Schema, Source

if TYPE_CHECKING:
    from numpy import int64
    from numpy.typing import DTypeLike, NDArray


class Store(Protocol):
    """One column: `take` gives rows by number as [B, *shape] in one call."""

    shape: tuple[int, ...]  # of one row
    dtype: np.dtype[Any]

    def __len__(self) -> int: ...

    def take(self, index: NDArray[int64]) -> NDArray: ...


class Memory:
    """An array [N, ...] in memory, given out as `dtype`."""

    def __init__(self, array: NDArray, dtype: DTypeLike | None = None):
        self.array = array
        self.shape = array.shape[1:]
        self.dtype = np.dtype(dtype or array.dtype)

    def __len__(self) -> int:
        return len(self.array)

    def take(self, index: NDArray[int64]) -> NDArray:
        return self.array[index].astype(self.dtype, copy=False)


class PackedFile:
    """Rows of one size in a file from `offset` on, gathered with `pread`: nothing is held or mapped in memory."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: DTypeLike, rows: int, offset: int = 0):
        self.path, self.shape, self.dtype = path, shape, np.dtype(dtype)
        self._rows, self._offset = rows, offset
        self._row_bytes = self.dtype.itemsize * int(np.prod(shape))
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)

    def __len__(self) -> int:
        return self._rows

    def take(self, index: NDArray[int64]) -> NDArray:
        """Rows by number, one system call for each run of neighbours; raises `OSError` where the file was cut."""
        out = np.empty((len(index), *self.shape), self.dtype)
        if not out.nbytes:
            return out
        view = out.reshape(-1).view(np.uint8).data
        starts = np.flatnonzero(np.diff(index, prepend=index[0] - 2) != 1)
        ends = np.append(starts[1:], len(index))
        size = self._row_bytes
        for start, end, row in zip(starts.tolist(), ends.tolist(), index[starts].tolist(), strict=True):
            self._fill(view[start * size : end * size], self._offset + row * size)
        return out

    def _fill(self, view: memoryview, position: int) -> None:
        while len(view):  # one call reads at most 2 GiB
            count = os.preadv(self._descriptor, [view], position)
            if count == 0:
                raise OSError(f"{self.path} ends at byte {position}: it was cut after it was opened")
            view, position = view[count:], position + count


class Joined:
    """Several stores of one shape and type, one after the other."""

    def __init__(self, parts: Sequence[Store]):
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])
        self.shape = parts[0].shape
        self.dtype = np.result_type(*(part.dtype for part in parts))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def take(self, index: NDArray[int64]) -> NDArray:
        out = np.empty((len(index), *self.shape), self.dtype)
        owner = np.searchsorted(self._ends, index, side="right")
        for number in np.unique(owner):
            mine = owner == number
            start = self._ends[number] - len(self._parts[number])
            out[mine] = self._parts[number].take(index[mine] - start)
        return out


class Viewed:
    """A store whose rows are changed as they are read."""

    def __init__(self, store: Store, change: Callable[[NDArray], NDArray]):
        self._store, self._change = store, change
        sample = change(store.take(np.arange(min(1, len(store)))))
        self.shape, self.dtype = sample.shape[1:], sample.dtype

    def __len__(self) -> int:
        return len(self._store)

    def take(self, index: NDArray[int64]) -> NDArray:
        return self._change(self._store.take(index))


def blocks(store: Store, block_bytes: int = 8 << 20) -> Iterator[tuple[int, NDArray]]:
    """All rows of a store in order, a few at a time, each block with the number of its first row."""
    step = max(1, block_bytes // max(1, store.dtype.itemsize * int(np.prod(store.shape))))
    for start in range(0, len(store), step):
        yield start, store.take(np.arange(start, min(start + step, len(store))))


@dataclass(kw_only=True)
class StoredSource:
    """A source made of stores by column name, the target's among them.

    `extra` holds columns that are no input but may divide the rows (`Split.by`).
    """

    fingerprint: str
    schema: Schema
    stores: Mapping[str, Store]
    description: str  # in words: "10,000 images of 28x28x1 in digits.npz"
    left_out: tuple[str, ...] = ()
    image_size: int | None = None  # side that images were fitted to; None: as stored
    positional: bool = False  # inputs came as a tuple, without names
    given_roles: NDArray | None = None
    extra: Mapping[str, NDArray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.stores.values())))

    @property
    def decodes(self) -> bool:
        """Whether reading costs enough computation to be worth doing ahead."""
        return any(getattr(store, "decodes", False) for store in self.stores.values())

    def sizes(self) -> NDArray[int64] | None:
        return None

    def read(self, index: NDArray[int64]) -> dict[str, NDArray]:
        return {name: self.stores[name].take(index) for name in _names(self.schema)}

    def values(self, name: str) -> NDArray:
        return self.extra[name] if name in self.extra else self.stores[name].take(np.arange(len(self)))

    def roles(self) -> NDArray | None:
        return self.given_roles


class Subset:
    """Some rows of another source, renumbered from 0."""

    def __init__(self, source: Source, index: NDArray[int64]):
        self._source, self._index = source, index
        self.schema = source.schema
        self.left_out = tuple(getattr(source, "left_out", ()))
        self.fingerprint = fingerprints.of_text(source.fingerprint, index.tobytes())
        self.image_size: int | None = getattr(source, "image_size", None)
        self.positional: bool = getattr(source, "positional", False)
        self.decodes: bool = getattr(source, "decodes", False)
        self.description = f"{len(index):,} of {getattr(source, 'description', f'{len(source):,} rows')}"

    def __len__(self) -> int:
        return len(self._index)

    def sizes(self) -> NDArray[int64] | None:
        sizes = self._source.sizes()
        return None if sizes is None else sizes[self._index]

    def read(self, index: NDArray[int64]) -> dict[str, NDArray]:
        return self._source.read(self._index[index])

    def values(self, name: str) -> NDArray:
        return self._source.values(name)[self._index]

    def roles(self) -> NDArray | None:
        roles = self._source.roles()
        return None if roles is None else roles[self._index]


def _names(schema: Schema) -> list[str]:
    names = [column.name for column in schema.inputs]
    return names if schema.target is None else [*names, schema.target.name]
