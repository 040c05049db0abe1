"""A bundle measured: seconds a call by batch size, and memory, in a process of its own without torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from delest import errors, processes
from delest.bundle import Model, load
from delest.bundle.timing import time_alternating
from delest.hardware import machine
from delest.records.form import from_json, to_json
from delest.records.latency import Latency, Timing

MODEL = "model.onnx"
_TIMEOUT_SECONDS = 600.0


def measure_bundle(
    folder: Path | str, *, rows: Sequence[int] = (1, 32), threads: int | None = None, seconds: float = 2.0
) -> Latency:
    """Time a bundle on batches of `rows` rows each, for `seconds` in all, and read its peak memory.

    Its inputs are made up: random pixels and numbers, known categories in turn, and 0 for whole numbers in arrays, which may
    be ids of which nothing else is known to be valid.

    Raises `BadInput` where there is no bundle or a number is below 1, `CheckFailed` where the bundle is damaged, `ProbeFailed`
    where the process ended without an answer.
    """
    faults = [
        f"a batch of {count!r} rows cannot be timed: give whole numbers of at least 1." for count in rows if not _counts(count)
    ]
    if not rows:
        faults.append("no batch size to time: give at least one, such as 1.")
    if threads is not None and not _counts(threads):
        faults.append(f"{threads!r} threads cannot compute: give 1 or more.")
    if faults:
        raise errors.BadInput(faults)
    answer = processes.call(
        "delest.footprint.latency:time_bundle",
        None,
        timeout=_TIMEOUT_SECONDS + seconds,
        folder=str(folder),
        rows=sorted(set(map(int, rows))),
        threads=threads,
        seconds=seconds,
    )
    return from_json(Latency, answer)


def time_bundle(*, folder: str, rows: Sequence[int], threads: int | None, seconds: float) -> dict[str, Any]:
    """`measure_bundle` in this process, which is thought to be fresh: JSON of a `Latency`. `rows` ascend."""
    import onnxruntime  # noqa: F401 - its libraries belong to the runtime, not to the bundle

    runtime = machine.resident_bytes()
    machine.reset_peak()
    model = load(folder, threads=threads)
    loading, loaded = machine.peak_resident_bytes(), machine.resident_bytes()
    calls = {count: partial(model.predict, _made_up_rows(model, count)) for count in rows}
    peaks = {}
    for count, call in calls.items():  # ascending: ONNX Runtime's arena keeps what the largest call so far took
        machine.reset_peak()
        call()
        call()
        peaks[count] = machine.peak_resident_bytes()
    taken = time_alternating({str(count): call for count, call in calls.items()}, seconds=seconds)
    timings = tuple(_timing(count, *taken[str(count)], peaks[count]) for count in rows)
    return to_json(
        Latency(
            path=folder,
            timings=timings,
            peak_bytes=max(loading, *peaks.values()),
            runtime_bytes=runtime,
            loaded_bytes=max(0, loaded - runtime),
            model_bytes=Path(folder, MODEL).stat().st_size,
            providers=tuple(model.session.get_providers()),
            threads=threads,
        )
    )


def _timing(rows: int, median: float, lower: float, upper: float, peak: int) -> Timing:
    return Timing(rows=rows, seconds=median, seconds_spread=upper - lower, rows_per_second=rows / median, peak_bytes=peak)


def _made_up_rows(model: Model, count: int) -> dict[str, np.ndarray]:
    """Raw inputs of `count` rows by name, as `Model.predict` takes them."""
    random = np.random.default_rng(0)
    made: dict[str, np.ndarray] = {}
    for column, declared in zip(model.preprocessing.schema.inputs, model.description["inputs"], strict=True):
        shape, dtype = (count, *column.shape), np.dtype(column.dtype)
        if column.kind == "image":
            values = random.integers(0, 256, shape, np.uint8)
        elif column.kind == "category":
            values = np.resize(np.array(column.categories or ("",), object), count)
        elif column.kind == "number":
            values = random.standard_normal(count)
        else:
            values = random.standard_normal(shape).astype(dtype) if dtype.kind == "f" else np.zeros(shape, dtype)
        made[declared["name"]] = values
    return made


def _counts(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and int(value) >= 1
