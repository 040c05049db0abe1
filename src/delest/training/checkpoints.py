"""Checkpoints that a crash cannot halve, and that are checked before they are believed.

A checkpoint is a folder `step-00000120` with `state.safetensors`, `state.json`, the best weights so far
(`best.safetensors`, a hard link) and `complete.json`, the completion mark with the size and SHA-256 of each file.
It is written under another name, synced to disk, and renamed at the end.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from delest import errors, storage, tensors
from delest.records.batch import State

_NAME = re.compile(r"step-(\d{8,})")
KEPT = 2


def save(folder: Path, step: int, state: State, position: dict[str, Any], best: Path) -> Path:
    """Write a checkpoint, then drop all but the newest two. Raises `DiskFull`; earlier ones then stay."""
    final = folder / f"step-{step:08d}"
    temporary = folder / f".step-{step:08d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with storage.room_reported(final):
            temporary.mkdir(parents=True)
            with open(temporary / "state.safetensors", "wb") as file:
                tensors.write(file, state.arrays)
            (temporary / "state.json").write_text(
                json.dumps({"format": 1, "position": position, "scalars": dict(state.scalars)})
            )
            if best.exists():
                _link(best, temporary / "best.safetensors")
            files = {
                path.name: {"bytes": path.stat().st_size, "sha256": storage.checksum(path)}
                for path in sorted(temporary.iterdir())
            }
            (temporary / "complete.json").write_text(json.dumps({"format": 1, "files": files}))
            for path in temporary.iterdir():
                _sync(path)
            storage.sync_folder(temporary)
            if final.exists():  # the same step again, after a setback
                replaced = folder / f".step-{step:08d}.old"
                shutil.rmtree(replaced, ignore_errors=True)
                final.rename(replaced)
                temporary.rename(final)
                shutil.rmtree(replaced)
            else:
                temporary.rename(final)
            storage.sync_folder(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for _, old in _all(folder)[KEPT:]:
        shutil.rmtree(old)
    return final


def newest(folder: Path, note: Callable[[str], None] = lambda text: None) -> tuple[State, dict[str, Any], Path] | None:
    """State, read as it is asked for, position and folder of the newest intact checkpoint; each damaged one is named through `note`
    and skipped."""
    for leftover in folder.glob(".step-*.old") if folder.exists() else ():
        intended = folder / leftover.name[1:-4]
        if not intended.exists():  # killed between the two renames of `save`
            leftover.rename(intended)
    for _, path in _all(folder):
        fault = damage(path)
        if fault:
            note(f"checkpoint {path.name} is damaged ({fault}); going on from the one before it.")
            damaged = path.with_name(f".{path.name}.damaged")  # set aside, so that it does not count as one of those kept
            shutil.rmtree(damaged, ignore_errors=True)
            path.rename(damaged)
            continue
        document = json.loads((path / "state.json").read_text())
        return State(tensors.Arrays(path / "state.safetensors"), document["scalars"]), document["position"], path
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, None where it is intact."""
    try:
        files = json.loads((path / "complete.json").read_text())["files"]
    except FileNotFoundError:
        return "its completion mark is missing"
    except (OSError, ValueError, KeyError, TypeError):
        return "its completion mark cannot be read"
    for name, expected in files.items():
        file = path / name
        if not file.exists():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
        if storage.checksum(file) != expected["sha256"]:
            return f"{name} does not match its checksum"
    return None


def check_room(folder: Path, state_bytes: int, weights_bytes: int) -> None:
    """Raise `DiskFull` where the checkpoints and best weights of a run will not fit on the disk."""
    needed = (KEPT + 1) * state_bytes + 2 * weights_bytes + (1 << 20)
    free = storage.free_bytes(folder)
    if free < needed:
        raise errors.DiskFull(
            f"the run needs about {needed / 2**20:,.1f} MiB on disk for its checkpoints, and {folder} has {free / 2**20:,.1f} MiB free. "
            "Free some space or choose another place with --out."
        )


def _all(folder: Path) -> list[tuple[int, Path]]:
    found = [
        (int(match[1]), path) for path in (folder.iterdir() if folder.exists() else ()) if (match := _NAME.fullmatch(path.name))
    ]
    return sorted(found, reverse=True)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
