"""Writing that a crash cannot halve: temporary file, fsync, rename, fsync of the folder. Checksums. The cache folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from delest import errors
from delest.records.form import to_json, to_plain

CACHES = ("packed", "probes")  # what `cache_folder` may be asked for: all that is ever made in the cache
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def room_reported(path: Path) -> Iterator[None]:
    """Turn the system's "no space left" into `DiskFull`, naming the path."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise errors.DiskFull(
                f"no room on disk to write {path} ({error.strerror}). Free some space or choose another place with --out; "
                "what was there before is unharmed."
            ) from error
        raise


@contextlib.contextmanager
def written_atomically(path: Path) -> Iterator[BinaryIO]:
    """A file to write piece by piece that appears under its name whole, or not at all: a crash leaves the old content or
    the new. Raises `DiskFull`; the old file then stays."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with room_reported(path):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a whole file atomically. Raises `DiskFull`; the old file then stays."""
    with written_atomically(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def write_json(path: Path, record: Any) -> None:
    """Write a record or mapping as JSON with its `format`, atomically."""
    write_atomic(path, json.dumps(to_json(record), indent=2) + "\n")


def append_line(path: Path, row: dict[str, Any], *, sync: bool = False) -> None:
    """Append one JSON line, in place of a half-written last one; with `sync` it is on disk when this returns."""
    with room_reported(path), open(path, "a+b") as file:
        _cut_half_line(file)
        file.write(json.dumps(to_plain(row)).encode() + b"\n")
        if sync:
            file.flush()
            os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file, none where it does not exist; what follows a damaged or half-written line is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().split(b"\n")[:-1]:  # a line without its end is half-written, even where it is whole JSON
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _cut_half_line(file: BinaryIO) -> None:
    """Cut what a crash left of a line, which would otherwise spoil the next one."""
    if file.seek(0, os.SEEK_END):
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def free_bytes(folder: Path) -> int:
    """What an ordinary user can still write on that file system."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def cache_folder(*parts: str) -> Path:
    """A folder in the user's cache (`DELEST_CACHE`, else `$XDG_CACHE_HOME/delest`, else `~/.cache/delest`), made if needed."""
    assert not parts or parts[0] in CACHES, f"{parts[0]} is missing in CACHES, so clear_cache would leave it"
    folder = Path(_cache_root(), *parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _cache_root() -> Path:
    own, shared = os.environ.get("DELEST_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else Path(shared or Path.home() / ".cache", "delest")


@contextlib.contextmanager
def cache_reported() -> Iterator[None]:
    """Turn what the system has against the cache folder into `BadInput`, naming it and the way out; no room is `DiskFull`."""
    with room_reported(_cache_root()):
        try:
            yield
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise
            raise errors.BadInput(
                f"the cache folder {_cache_root()} cannot be used ({error.strerror}: {error.filename}). "
                "Set DELEST_CACHE to a folder that you may write."
            ) from error


def clear_cache() -> int:
    """Empty the cache's folders, those in `CACHES` alone since `DELEST_CACHE` may hold other files too; bytes they had.

    What another process reads meanwhile stays readable to it. Raises `BadInput` where the folder cannot be used.
    """
    freed = 0
    with cache_reported():
        for folder in (_cache_root() / name for name in CACHES):
            for path in sorted(folder.rglob("*"), reverse=True):  # what a folder holds comes before it
                if path.is_dir() and not path.is_symlink():
                    path.rmdir()
                else:
                    freed += path.lstat().st_size
                    path.unlink()
    return freed
