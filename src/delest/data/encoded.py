"""Encoded pictures, one after the other or at random: files in folders, or a column of Parquet files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from delest import errors, storage
from delest.data import fingerprints
from delest.data.targets import ROLE_NAMES, TARGET_NAMES, Wishes, encode_target, missing_values, refuse, roles_of_files
from delest.job import unknown
from delest.records.source import ROLES, Target

if TYPE_CHECKING:
    from numpy import int64
    from numpy.typing import NDArray

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


class Encoded(Protocol):
    """Pictures as their files, each its path or its bytes."""

    fingerprint: str
    where: str  # in words
    extra: Mapping[str, NDArray]  # columns that may divide the rows

    def name(self, row: int) -> str: ...

    def load(self, row: int) -> bytes | Path: ...

    def stream(self, index: NDArray[int64]) -> Iterator[bytes | Path]:
        """Sorted rows, one after the other."""

    def at_random(self) -> Encoded:
        """A form whose `load` is quick."""


class Files:
    """Picture files below a folder."""

    extra: Mapping[str, NDArray] = {}

    def __init__(self, root: Path, names: Sequence[str]):
        self._root, self._names = root, names
        self.where = root.name or str(root)
        self.fingerprint = fingerprints.of_files([root / name for name in names], root)

    def name(self, row: int) -> str:
        return str(self._root / self._names[row])

    def load(self, row: int) -> Path:
        return self._root / self._names[row]

    def stream(self, index: NDArray[int64]) -> Iterator[Path]:
        return map(self.load, index.tolist())

    def at_random(self) -> Encoded:
        return self


def find_class_folders(root: Path) -> tuple[Files, NDArray[int64], Target, NDArray | None, list[str]]:
    """Pictures of a folder a class, also below `train`, `val` and `test`: files, class codes, target, roles, left out."""
    left_out: list[str] = []
    role_folders = _role_folders(root)
    parts = role_folders or {"": root}
    names: list[str] = []
    owners: list[tuple[str, str]] = []
    for role, folder in parts.items():
        for entry in sorted(folder.iterdir()):
            if entry.is_dir() and not entry.name.startswith("."):
                found = _pictures(entry)
                names += [os.path.relpath(path, root) for path in found]
                owners += [(role, entry.name)] * len(found)
                if not found:
                    left_out.append(f"{entry}: no pictures in it")
        loose = sum(1 for entry in folder.iterdir() if entry.suffix.lower() in SUFFIXES)
        if loose:
            left_out.append(f"{folder}: {loose:,} pictures that lie in no class folder")
    if not names:
        loose_hint = " Pictures must lie in a folder for each class (cats/1.png, dogs/2.png)." if left_out else ""
        raise errors.BadInput(f"{root} holds no pictures ({', '.join(SUFFIXES)}) in class folders.{loose_hint}")
    classes = sorted({label for _, label in owners})
    if len(classes) == 1:
        raise errors.BadInput(
            f"{root} has a single class folder with pictures, {classes[0]!r}: there is nothing to learn. Add another."
        )
    code = {label: place for place, label in enumerate(classes)}
    codes = np.array([code[label] for _, label in owners], np.int64)
    roles = np.array([role for role, _ in owners]) if role_folders else None
    return Files(root, names), codes, Target(name="label", kind="class", classes=tuple(classes)), roles, left_out


def _role_folders(root: Path) -> dict[str, Path] | None:
    """Folders named train, val and test that hold class folders, by role; None where there is no such train."""
    found = {
        ROLE_NAMES[path.name.lower()]: path
        for path in sorted(root.iterdir())
        if path.is_dir() and path.name.lower() in ROLE_NAMES
    }
    if "train" not in found or not any(path.is_dir() for path in found["train"].iterdir()):
        return None
    return {role: found[role] for role in ROLES if role in found}


def _pictures(folder: Path) -> list[str]:
    return sorted(
        os.path.join(place, name)
        for place, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(SUFFIXES) and not name.startswith(".")
    )


class ParquetColumn:
    """A column of encoded pictures in Parquet files; only a few rows are held at a time."""

    def __init__(self, paths: Sequence[Path], column: str, fingerprint: str, where: str, extra: Mapping[str, NDArray]):
        import pyarrow.parquet as pq

        self._paths, self._column = paths, column
        self.fingerprint, self.where, self.extra = fingerprint, where, extra
        self._starts = np.cumsum([0, *(pq.read_metadata(path).num_rows for path in paths)])

    def name(self, row: int) -> str:
        file = int(np.searchsorted(self._starts, row, side="right")) - 1
        return f"{self._paths[file]}, row {row - self._starts[file]}"

    def load(self, row: int) -> bytes:
        return next(self.stream(np.array([row])))

    def stream(self, index: NDArray[int64]) -> Iterator[bytes]:
        import pyarrow.parquet as pq

        for path, start, end in zip(self._paths, self._starts, self._starts[1:], strict=False):
            wanted = index[(index >= start) & (index < end)] - start
            if not len(wanted):
                continue
            with pq.ParquetFile(path) as file:
                sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
                ends = np.cumsum(sizes)
                groups = np.unique(np.searchsorted(ends, wanted, side="right"))
                for group in groups.tolist():
                    first = ends[group] - sizes[group]
                    mine = wanted[(wanted >= first) & (wanted < ends[group])] - first
                    yield from self._group(file, group, mine)

    def _group(self, file: Any, group: int, wanted: NDArray[int64]) -> Iterator[bytes]:
        import pyarrow as pa

        position = 0
        for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=[self._column], use_threads=False):
            values = batch.column(0)
            if pa.types.is_struct(values.type):
                values = values.field("bytes")
            for place in wanted[(wanted >= position) & (wanted < position + len(values))].tolist():
                yield values[place - position].as_py() or b""
            position += len(values)

    def at_random(self) -> Encoded:
        """The same bytes in one file of the cache, since Parquet cannot be read row by row. Raises `DiskFull`."""
        path = storage.cache_folder("packed") / f"{fingerprints.of_text(self.fingerprint, 'encoded')}.blob"
        ends = path.with_suffix(".npy")
        if not (ends.exists() and path.exists()):
            lengths = []
            with storage.written_atomically(path) as file:
                for data in self.stream(np.arange(self._starts[-1])):
                    file.write(data)
                    lengths.append(len(data))
            with storage.written_atomically(ends) as file:
                np.save(file, np.cumsum([0, *lengths]))
        return _Blob(self, path, np.load(ends))


class _Blob:
    """The bytes of all pictures in one file."""

    def __init__(self, column: ParquetColumn, path: Path, ends: NDArray[int64]):
        self._column, self._ends = column, ends
        self.fingerprint, self.where, self.extra = column.fingerprint, column.where, column.extra
        self._file = open(path, "rb")  # noqa: SIM115  lives as long as the source

    def name(self, row: int) -> str:
        return self._column.name(row)

    def load(self, row: int) -> bytes:
        return os.pread(self._file.fileno(), int(self._ends[row + 1] - self._ends[row]), int(self._ends[row]))

    def stream(self, index: NDArray[int64]) -> Iterator[bytes]:
        return map(self.load, index.tolist())

    def at_random(self) -> Encoded:
        return self


def image_column(path: Path) -> str | None:
    """The first column of encoded pictures in a Parquet file: a struct with `bytes`, or binary data Pillow knows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for item in file.schema_arrow:
            if pa.types.is_struct(item.type) and item.type.get_field_index("bytes") >= 0:
                return item.name
            if pa.types.is_binary(item.type) or pa.types.is_large_binary(item.type):
                batch = next(file.iter_batches(batch_size=1, columns=[item.name]), None)
                if batch is not None and _is_picture(batch.column(0)[0].as_py()):
                    return item.name
    return None


def _is_picture(data: bytes | None) -> bool:
    starts = (b"\x89PNG", b"\xff\xd8\xff", b"BM", b"RIFF", b"II*\0", b"MM\0*")
    return data is not None and data.startswith(starts)


def read_parquet_labels(
    paths: Sequence[Path], column: str, wishes: Wishes, where: str
) -> tuple[ParquetColumn, NDArray[int64], Target, NDArray | None, list[str]]:
    """Pictures in Parquet files: the column, class codes, target, roles by file name, columns that are not used."""
    import polars as pl
    import pyarrow.parquet as pq

    schema = pq.read_schema(paths[0])
    others = [name for name in schema.names if name != column]
    target = wishes.target or next((name for name in TARGET_NAMES if name in others), others[0] if len(others) == 1 else None)
    faults = []
    if target is None:
        faults.append(
            f"{where} has the columns {', '.join(schema.names)}, and none is plainly the target: name one with --target."
        )
    elif target not in others:
        faults.append(f"{where}: " + unknown("target", target, others))
    if wishes.split_by is not None and wishes.split_by not in others:
        faults.append(f"{where}: " + unknown("column to split by", wishes.split_by, others))
    refuse(faults)
    assert target is not None
    wanted = list(dict.fromkeys([target, *([] if wishes.split_by is None else [wishes.split_by])]))
    frame = pl.concat([pl.read_parquet(path, columns=wanted) for path in paths])
    labels = frame[target]
    if labels.null_count():
        raise errors.BadInput(missing_values(where, target, labels.null_count(), int(labels.is_null().arg_max() or 0)))
    names = _class_names(schema.metadata or {}, target)
    found, codes, faults = encode_target(target, labels.to_numpy(), where)
    if names and found.kind == "class" and labels.dtype.is_integer() and not 0 <= labels.min() <= labels.max() < len(names):  # type: ignore[operator]
        faults.append(
            f"{where}: target {target!r} holds {labels.min()!r} to {labels.max()!r}, but the file names {len(names)} classes."
        )
    elif names and labels.dtype.is_integer():
        found, codes = Target(name=target, kind="class", classes=names), labels.to_numpy().astype(np.int64)
    refuse(faults)
    rows = [pq.read_metadata(path).num_rows for path in paths]
    extra = {} if wishes.split_by is None else {wishes.split_by: frame[wishes.split_by].to_numpy()}
    fingerprint = fingerprints.of_files(paths, paths[0].parent, target, str(wishes.split_by))
    pictures = ParquetColumn(paths, column, fingerprint, where, extra)
    left_out = [f"column {name!r}: pictures are the input" for name in others if name not in wanted]
    return pictures, codes, found, roles_of_files([path.name for path in paths], rows), left_out


def _class_names(metadata: Mapping[bytes, bytes], target: str) -> tuple[str, ...] | None:
    """Names of the classes as the Hugging Face hub's Parquet files carry them."""
    try:
        feature = json.loads(metadata[b"huggingface"])["info"]["features"][target]
    except (KeyError, ValueError, TypeError):
        return None
    names = feature.get("names") if isinstance(feature, dict) else None
    return tuple(names) if names else None
