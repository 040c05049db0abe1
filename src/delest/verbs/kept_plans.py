"""What was probed and chosen before, by job and machine: a job that is planned again is not tried again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delest import __version__, errors
from delest.hardware import probes
from delest.records.form import to_plain
from delest.units import format_bytes
from delest.verbs.keras_jobs import is_keras
from delest.verbs.workplace import Workplace, backend, preprocessing_json

if TYPE_CHECKING:
    from delest.records.hardware import Hardware

# Variables that change what a training takes, by how their names begin.
_MATTERING = ("OMP_", "MKL_", "KMP_", "MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "CUDA_VISIBLE_DEVICES", "TORCH_", "ONEDNN_")


def key_of(place: Workplace, here: Hardware, threads: int, device: str, fewer_threads: bool) -> list[Any] | None:
    """All that a probe depends on, None for a job that cannot be told from another (one without an origin)."""
    if place.job.origin is None:
        return None
    code = hashlib.sha256()
    for path in sorted(_code_of_job()):
        with contextlib.suppress(OSError):
            code.update(path.encode() + Path(path).read_bytes())
    own = [f"{path.stat().st_mtime_ns}" for path in sorted(Path(__file__).parents[1].rglob("*.py"))]
    surroundings = {name: value for name, value in os.environ.items() if name.startswith(_MATTERING)}
    about: list[Any] = [
        place.job.describe(),
        place.describe_data(),
        preprocessing_json(place),
        code.hexdigest(),
        device,
        fewer_threads,
        surroundings,
    ]
    about += [here.memory_bytes, here.memory_limit_bytes, sys.version, __version__, own]
    return probes.machine_key(threads, hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest())


def made_for(place: Workplace, here: Hardware) -> dict[str, str]:
    """What a plan holds for: a fingerprint of what of a job decides on memory and time, the machine in words, and the framework under Keras."""
    job = place.job.describe()
    about = [job[name] for name in ("model", "step", "predict", "loss", "batch_size", "image_size")]
    about += [job["recipe"][name] for name in ("optimizer", "clip", "precision", "memory_format")]
    about.append(to_plain(place.source.schema))
    fingerprint = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    size = format_bytes(here.memory_limit_bytes or here.memory_bytes)
    framework = {}
    if is_keras(place.job, place.source.schema):
        framework["framework"] = backend(place.job, place.source.schema).runtime
    return {
        **framework,
        "job": fingerprint,
        "machine": f"{here.processor}, {here.cores} cores, {', '.join(here.instruction_sets[-2:])}, {size}",
    }


def _code_of_job() -> Iterator[str]:
    """Files of the modules that were loaded from anywhere but Python, its packages and delest; the script that asks is not among them."""
    elsewhere = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    for name, module in list(sys.modules.items()):
        path = None if name == "__main__" else getattr(module, "__file__", None)
        if isinstance(path, str) and not path.startswith((*elsewhere, str(Path(__file__).parents[1]))):
            yield path


def kept(kind: str, key: list[Any] | None) -> Any:
    with contextlib.suppress(errors.BadInput):  # a cache that cannot be used: everything is made anew
        return None if key is None else probes.kept(kind, key)
    return None


def keep(kind: str, key: list[Any] | None, found: Any) -> None:
    with contextlib.suppress(errors.BadInput):
        if key is not None:
            probes.keep(kind, key, found)
