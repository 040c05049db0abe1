"""Files in the cache that hold what would otherwise be decoded again or held in memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from delest import storage

LARGEST_PACK_BYTES = 2 << 30


def has_room(need_bytes: int) -> bool:
    """Whether the cache may take a file of that size: at most 2 GiB and a quarter of the free disk, and writable."""
    if need_bytes > LARGEST_PACK_BYTES:
        return False
    try:
        folder = storage.cache_folder("packed")
    except OSError:
        return False
    return os.access(folder, os.W_OK) and need_bytes <= storage.free_bytes(folder) // 4


@contextlib.contextmanager
def written_atomically(path: Path) -> Iterator[BinaryIO]:
    """A file to write piece by piece that appears under its name whole, or not at all. Raises `DiskFull`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage.room_reported(path):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        storage.sync_folder(path.parent)
