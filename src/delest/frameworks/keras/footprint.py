"""What training a Keras job takes: real steps in a process of its own, and what larger batches take by the line through two of them.

`measure_job` is called through `delest.processes`; it takes and gives plain JSON.
"""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np

from delest import errors, malloc, tensors
from delest.data import Feed, Preprocessing, open_job
from delest.footprint.time import spread
from delest.frameworks.keras import KerasBackend, building, precision
from delest.frameworks.keras.layers import answers_of_layers
from delest.frameworks.keras.optimizers import layers_of
from delest.frameworks.keras.session import KerasSession
from delest.hardware import machine
from delest.job import Job
from delest.records.batch import Batch, State
from delest.records.footprint import Footprint
from delest.records.form import from_json, to_json
from delest.records.plan import Choice, Plan
from delest.records.source import Schema

ROUNDS = 3  # of steps with and without a method
RATE = 1e-6  # of the learning rate: weights stay where they are, so that a measured step never diverges
PARTS = (
    "parameters",
    "gradients",
    "optimizer",
    "data",
    "activations",
)  # of a breakdown, in the order in which they are certain


def measure_job(
    job: Job,
    *,
    preprocessing: dict[str, Any],
    index: list[int],
    rows: int,
    threads: int | None,
    steps: int = 5,
    choices: Sequence[dict[str, Any]] = (),
    compared: bool = False,
) -> dict[str, Any]:
    """JSON of a `Footprint` of `steps` steps on batches of `rows` of the training rows `index`, after one to warm up, by the methods of a plan's `choices`;
    with `opened_bytes`, what this process held with the data opened, `model`, what a plan must know of it, and, where methods are to be `compared`,
    `variants`, seconds of a step with and without each that may gain, and `unsuited`, why one cannot be.

    `runtime_bytes` is this process with its framework started and no model. Raises `BadInput` for a job that does not work, `OutOfMemory`.
    """
    source, prepared = open_job(job), from_json(Preprocessing, preprocessing)
    feed = Feed(source, np.array(index), prepared, batch_size=rows, seed=job.seed, augment=job.recipe.augment)
    batches = _endless(feed)
    malloc.give_back()
    opened = machine.resident_bytes()
    KerasBackend().warm()
    malloc.give_back()
    idle = machine.resident_bytes()
    plan = Plan(batch_size=rows, micro_batch=rows, threads=threads, choices=tuple(from_json(Choice, one) for one in choices))
    phases: dict[str, int] = {}

    def read(phase: str, work: Callable[[], Any]) -> Any:
        machine.reset_peak()
        result = work()
        phases[phase] = machine.peak_resident_bytes()
        return result

    session = read("start", lambda: KerasSession(replace(job, batch_size=rows), plan, source.schema))
    base = max(0, machine.resident_bytes() - idle)
    read("first_step", lambda: _step(session, batches))
    timed = read("steady_step", lambda: [_step(session, batches) for _ in range(steps)])
    malloc.give_back()
    batch = next(batches)
    read("evaluation", lambda: deque(session.outputs(_Single(batch)), maxlen=0))
    malloc.give_back()
    with tempfile.TemporaryDirectory(prefix="delest-") as folder:
        state, path = session.state(), Path(folder, "state.safetensors")
        with open(path, "wb") as file:
            read("saving", lambda: tensors.write(file, state.arrays))
        read("resuming", lambda: session.load(State(tensors.Arrays(path), state.scalars)))
    seconds = [pair[1] for pair in timed]
    peak = max(*phases.values(), idle)
    model = _facts(session, batch, largest=max(phases["saving"], phases["resuming"]) - idle - base)
    footprint = Footprint(
        peak_bytes=peak,
        runtime_bytes=idle,
        low_bytes=peak,
        high_bytes=peak,
        phases=phases,
        breakdown=broken_down(model, rows, idle, peak),
        step_seconds=statistics.median(seconds),
        step_seconds_spread=spread(seconds),
        waiting_seconds=statistics.median(pair[0] for pair in timed),
        batch_size=rows,
        micro_batch=rows,
        allocator=malloc.current(),
        basis="measurement",
        how="run",
        isolated=job.origin is not None,
        notes=(f"measured with {KerasBackend().runtime}.",),
    )
    variants, unsuited = _variants(job, plan, source.schema, session, batches) if compared else ({}, {})
    return {
        "footprint": to_json(footprint),
        "opened_bytes": opened,
        "base_bytes": base,
        "model": model,
        "variants": variants,
        "unsuited": unsuited,
    }


def _variants(
    job: Job, plan: Plan, schema: Schema, session: KerasSession, batches: Iterator[Batch]
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Seconds of a step with and without bf16, alternating, or why there is none; nothing where the recipe says which, or a product does not gain by it."""
    if job.recipe.precision != "auto" or not precision.gains():
        return {}, {}
    lowered = replace(
        plan, choices=(*plan.choices, Choice(method="precision", config={"dtype": "bf16"}, keeps="changed", why=""))
    )
    sessions = {"plain": session, "with": KerasSession(replace(job, batch_size=plan.batch_size), lowered, schema)}
    try:
        _step(sessions["with"], batches)
    except errors.BadInput as error:
        return {}, {"precision": str(error)}
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(ROUNDS):
        for name, one in sessions.items():
            times[name].append(_step(one, batches)[1])
    return {"precision": {name: statistics.median(found) for name, found in times.items()}}, {}


def probe_of(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Answers of `measure_job`, of the smallest batch to the largest, in the form of `delest.footprint.probe.examine`."""
    last = found[-1]
    samples = []
    for one in found:
        footprint = one["footprint"]
        grown = {name: size - footprint["runtime_bytes"] for name, size in footprint["phases"].items()}
        samples.append(
            {
                "rows": footprint["batch_size"],
                "first": grown["first_step"],
                "steady": grown["steady_step"],
                "evaluation": grown["evaluation"],
                "seconds": footprint["step_seconds"],
            }
        )
    model = last["model"]
    return {
        "faults": [],
        "device": "cpu",
        "device_memory_bytes": None,
        "samples": samples,
        "opened_bytes": last["opened_bytes"],
        "idle_bytes": last["footprint"]["runtime_bytes"],
        "base_bytes": last["base_bytes"],
        "variants": found[0]["variants"],
        "unsuited": found[0]["unsuited"],
        "batch_statistics": model["batch_statistics"],
        "parameters": model["parameters"],
        "model": None,
        "largest_bytes": model["largest_bytes"],
        "weights_bytes": model["bytes"]["parameters"],
        "busy": "",
    }


def broken_down(model: Mapping[str, Any], rows: int, runtime: int, peak: int) -> dict[str, int]:
    """Categories that sum to the peak: weights, gradients, the optimizer's state, the batch and what layers give, all by their shapes; what they leave
    is `temporaries`, which the framework's own copies and compiled code are counted with. Where they leave less than nothing, layers shared memory."""
    known = dict(model["bytes"])
    for name in ("data", "activations"):
        known[name] = int(model["bytes_a_row"][name] * rows)
    left, parts = max(0, peak - runtime), {}
    for name in PARTS:
        parts[name] = min(left, known[name])
        left -= parts[name]
    return {**parts, "temporaries": left, "runtime": runtime}


def _facts(session: KerasSession, batch: Batch, *, largest: int) -> dict[str, Any]:
    """What is known of a model by its shapes."""
    few = min(2, batch.count)
    inputs = keras.tree.map_structure(lambda array: array[:few], building.received(batch.inputs, session.schema))
    given = keras.tree.flatten([batch.inputs, batch.targets])
    outputs = answers_of_layers(session.model, building.tensors(inputs))
    return {
        "parameters": session.parameters(),
        "batch_statistics": any(isinstance(layer, keras.layers.BatchNormalization) for layer in layers_of(session.model)),
        "largest_bytes": max(0, largest),
        "outputs_bytes_a_row": [_bytes([output]) / few for _, output in outputs],
        "bytes": {
            "parameters": _bytes(session.model.weights),
            "gradients": _bytes(session.model.trainable_variables),
            "optimizer": _bytes(session.optimizer.variables),
        },
        "bytes_a_row": {
            "data": sum(array.nbytes for array in given if array is not None) / batch.count,
            "activations": _bytes(output for _, output in outputs) / few,
        },
    }


def _bytes(tensors: Any) -> int:
    return sum(math.prod(tensor.shape) * _item_bytes(keras.backend.standardize_dtype(tensor.dtype)) for tensor in tensors)


def _item_bytes(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize  # which NumPy does not have


def _endless(feed: Feed) -> Iterator[Batch]:
    """Whole batches only: the smaller one at an epoch's end would be compiled anew."""
    size = min(feed.batch_size, len(feed))
    for number in itertools.count():
        yield from (batch for batch in feed.epoch(number) if batch.count >= size)


def _step(session: KerasSession, batches: Iterator[Batch]) -> tuple[float, float]:
    """(seconds waiting for a batch, seconds of the step), the loss read so that what was begun has ended."""
    begin = time.perf_counter()
    batch = next(batches)
    ready = time.perf_counter()
    float(session.step(batch, RATE).loss)
    return ready - begin, time.perf_counter() - ready


class _Single:
    """A feed of one batch."""

    def __init__(self, batch: Batch):
        self.batch = batch

    def ordered(self) -> Iterator[Batch]:
        return iter([self.batch])
