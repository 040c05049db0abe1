"""Files in the cache that hold what would otherwise be decoded again or held in memory."""

from __future__ import annotations

import os

from delest import storage

LARGEST_PACK_BYTES = 2 << 30


def has_room(need_bytes: int, *, of_any_size: bool = False) -> bool:
    """Whether the cache may take a file of that size: at most 2 GiB (but for one `of_any_size`) and a quarter of the free disk, and writable."""
    if need_bytes > LARGEST_PACK_BYTES and not of_any_size:
        return False
    try:
        folder = storage.cache_folder("packed")
    except OSError:
        return False
    return os.access(folder, os.W_OK) and need_bytes <= storage.free_bytes(folder) // 4
