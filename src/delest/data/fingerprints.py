"""Names for content: equal data, equal fingerprint."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_HASHED_BYTES = 256 << 20  # beyond this in all, files are known by name, size and time of change


def of_text(*parts: str | bytes) -> str:
    """SHA-256 of some parts, the first 32 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode() if isinstance(part, str) else part
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()[:32]


def of_files(paths: Iterable[Path], root: Path, *parts: str) -> str:
    """Of the content of files where that is quick to read, else of their names, sizes and times of change."""
    status = [(path, os.stat(path)) for path in paths]
    if len(status) <= 64 and sum(stat.st_size for _, stat in status) <= _HASHED_BYTES:
        names = [""] if len(status) == 1 else [str(path.relative_to(root)) for path, _ in status]
        return of_text(*parts, *names, *(_file_digest(path) for path, _ in status))
    return of_text(*parts, *(f"{path.relative_to(root)} {stat.st_size} {stat.st_mtime_ns}" for path, stat in status))


def of_arrays(arrays: Mapping[str, NDArray], *parts: str) -> str:
    """Of arrays by name: name, type, shape and content."""
    digest = hashlib.sha256(of_text(*parts).encode())
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        step = max(1, (8 << 20) // max(1, array[:1].nbytes))
        for start in range(0, len(array), step):
            digest.update(np.ascontiguousarray(array[start : start + step]).tobytes())
    return digest.hexdigest()[:32]


def _file_digest(path: Path) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
