"""A job measured: real steps on its own batches in a fresh process, what they take in memory and time, and where it goes.

`measure_job` is called through `delest.processes`; it takes and gives plain JSON. Steps are timed and their peak is read first,
with nothing attached; only then a second session is watched operator by operator, which slows it down.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from delest import errors, malloc
from delest.backends.torch import TorchBackend
from delest.backends.torch.check import Single, check
from delest.backends.torch.loops import JobLoop
from delest.backends.torch.model import where
from delest.backends.torch.observe import Observation, observe, sum_by_module
from delest.backends.torch.session import TorchSession
from delest.data import Feed, Preprocessing, open_job
from delest.footprint.probe import _first, _release
from delest.footprint.replay import replay
from delest.footprint.time import spread, step_time
from delest.hardware import machine
from delest.hardware.roofline import measure_roofline
from delest.job import Job
from delest.records.batch import Batch, State
from delest.records.footprint import Footprint
from delest.records.form import from_json, to_json
from delest.records.hardware import Roofline
from delest.records.plan import Plan
from delest.records.source import Schema
from delest.records.trace import CATEGORIES, Trace

RATE = 1e-6  # of the learning rate: weights stay where they are, so that a measured step never diverges
STATE = ("parameters", "buffers", "optimizer")  # what stays between steps


def measure_job(
    job: Job,
    *,
    preprocessing: dict[str, Any],
    index: list[int],
    threads: int,
    device: str,
    steps: int = 5,
    timeline: bool = True,
) -> dict[str, Any]:
    """JSON of a `Footprint` of `steps` plain steps on whole batches of the training rows `index`, after one to warm up.

    `runtime_bytes` is this process after a check on two rows and before the model, with the opened data. What the categories of
    live tensors leave of the peak is `temporaries`: kernels' scratch, and what the allocator keeps. A step's seconds are without
    the waiting for its batch. `timeline` False leaves the timeline out.

    Raises `BadInput` with every fault of the job or of these numbers, `OutOfMemory`.
    """
    if faults := _faults(job, index, threads, steps):
        raise errors.BadInput(faults)
    torch.set_num_threads(threads)
    device = device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    source, prepared = open_job(job), from_json(Preprocessing, preprocessing)
    rows = min(job.batch_size, len(index))
    feed = Feed(source, np.array(index), prepared, batch_size=job.batch_size, seed=job.seed, augment=job.recipe.augment)
    example = next(feed.epoch(0))
    plan = Plan(batch_size=job.batch_size, micro_batch=job.batch_size, threads=threads, device=device)
    _warm_up(job, plan, source.schema, example)
    del example
    gauge = _Gauge(device)
    readings = _read(lambda: TorchSession(job, plan, source.schema), _endless(feed), steps, gauge)
    footprint, notes = _put_together(readings, gauge, rows), gauge.notes()
    gauge.release()
    try:
        watched = observe(JobLoop(job, plan, source.schema, next(feed.epoch(0))), rows)
        footprint = _with_details(footprint, watched)
        footprint = _with_rates(footprint, watched, measure_roofline(threads if device == "cpu" else None, device=device))
    except Exception as error:  # what was measured still holds
        notes.append(f"where memory and time go is not fully known: {where(error)}.")
    shown = footprint.timeline if timeline else None
    return to_json(replace(footprint, timeline=shown, isolated=job.origin is not None, notes=tuple(notes)))


def _faults(job: Job, index: list[int], threads: int, steps: int) -> list[str]:
    faults = [] if index else ["there are no training rows to measure steps on."]
    for name, value in (("steps", steps), ("threads", threads), ("batch size", job.batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            faults.append(f"{name} is {value!r}; it must be a whole number of at least 1.")
    return faults


def _warm_up(job: Job, plan: Plan, schema: Schema, batch: Batch) -> None:
    """Check the job on two rows, which also loads the libraries and kernels that its steps use; all memory is given back."""
    if faults := check(job, schema, _first(batch, 2), _first(batch, 32)):
        raise errors.BadInput(faults)
    TorchBackend().warm()
    if plan.device == "cuda":  # context, handles and workspaces of cuBLAS and cuDNN are the runtime's
        session = TorchSession(job, plan, schema)
        float(session.step(_first(batch, 2), RATE).loss)
        del session
        torch.cuda.empty_cache()
    _release()


class _Gauge:
    """The highest memory since the last reset: resident set, or what this process holds on the GPU, its context included."""

    def __init__(self, device: str):
        self.on_gpu, self.exact = device == "cuda", True
        self.allocated = 0
        self.runtime = self._driver_bytes() - torch.cuda.memory_reserved() if self.on_gpu else machine.resident_bytes()

    def release(self) -> None:
        """Give freed memory back to the system."""
        _release()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def reset(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            self.exact = machine.reset_peak() and self.exact

    def peak(self) -> int:
        if not self.on_gpu:
            return machine.peak_resident_bytes()
        torch.cuda.synchronize()
        self.allocated = max(self.allocated, torch.cuda.max_memory_allocated())
        return self.runtime + torch.cuda.max_memory_reserved()

    def notes(self) -> list[str]:
        if self.on_gpu:
            reserved = torch.cuda.memory_reserved()
            return [
                f"reserved by PyTorch at the end: {reserved:,} bytes; in use on the whole device as the driver says, by other "
                f"processes too: {self._driver_bytes():,} bytes."
            ]
        if self.exact:
            return []
        return ["this system does not let the highest memory be reset: a phase shows no less than those before it."]

    @staticmethod
    def _driver_bytes() -> int:
        free, total = torch.cuda.mem_get_info()
        return int(total - free)


# Steps with nothing attached


@dataclass
class _Readings:
    """What was read while steps ran undisturbed."""

    phases: dict[str, int] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    waiting: list[float] = field(default_factory=list)


def _endless(feed: Feed) -> Iterator[Batch]:
    """Whole batches only: the smaller one at an epoch's end would blur the times."""
    size = min(feed.batch_size, len(feed))
    for number in itertools.count():
        yield from (batch for batch in feed.epoch(number) if batch.count >= size)


def _read(build: Callable[[], TorchSession], batches: Iterator[Batch], steps: int, gauge: _Gauge) -> _Readings:
    """Every phase of `PHASES` after a reset of its own, in the order in which a training goes through them.

    What the allocator keeps of the steps' memory is given back before the later phases, so that they show what they need themselves.
    """
    readings = _Readings()

    def read(phase: str, work: Callable[[], Any]) -> Any:
        if phase in ("evaluation", "saving", "resuming"):
            gauge.release()
        gauge.reset()
        result = work()
        readings.phases[phase] = gauge.peak()
        return result

    session = read("start", build)
    read("first_step", lambda: _step(session, batches))
    timed = read("steady_step", lambda: [_step(session, batches) for _ in range(steps)])
    readings.waiting, readings.seconds = [pair[0] for pair in timed], [pair[1] for pair in timed]
    read("evaluation", lambda: deque(session.outputs(Single(next(batches))), maxlen=0))
    state = _as_from_file(read("saving", session.state))
    read("resuming", lambda: session.load(state))
    return readings


def _as_from_file(state: State) -> State:
    """A state with arrays of its own, as one that was read from a checkpoint; the session's shares memory with its optimizer."""
    return State({name: array if array.base is None else array.copy() for name, array in state.arrays.items()}, state.scalars)


def _step(session: TorchSession, batches: Iterator[Batch]) -> tuple[float, float]:
    """(seconds waiting for a batch, seconds of the step), the loss read so that a GPU has finished."""
    begin = time.perf_counter()
    batch = next(batches)
    ready = time.perf_counter()
    float(session.step(batch, RATE).loss)
    return ready - begin, time.perf_counter() - ready


# The record


def _put_together(readings: _Readings, gauge: _Gauge, rows: int) -> Footprint:
    peak = max(*readings.phases.values(), gauge.runtime)
    return Footprint(
        peak_bytes=peak,
        runtime_bytes=gauge.runtime,
        low_bytes=peak,
        high_bytes=peak,
        phases=readings.phases,
        breakdown=_break_down({}, gauge.runtime, peak),
        allocated_bytes=gauge.allocated or None,
        step_seconds=statistics.median(readings.seconds),
        step_seconds_spread=spread(readings.seconds),
        waiting_seconds=statistics.median(readings.waiting),
        batch_size=rows,
        micro_batch=rows,
        device="cuda" if gauge.on_gpu else "cpu",
        allocator="cuda" if gauge.on_gpu else malloc.current(),
        basis="measurement",
        how="run",
    )


def _with_details(footprint: Footprint, watched: Observation) -> Footprint:
    """The footprint with breakdown, timeline, modules and flops from what was watched."""
    trace, rows = watched.trace, footprint.micro_batch
    highest = max(footprint.phases, key=lambda phase: footprint.phases[phase])
    # Without the bytes of a checkpoint the replay's own peak is one of a step, which is what is wanted of it.
    live = replay(replace(trace, state_bytes=0), rows=rows, allocator="exact")
    held = live.breakdown if highest in ("first_step", "steady_step") else _at_rest(trace, highest == "evaluation")
    flops = sum_by_module(trace.operators, trace.operators.flops(rows))
    shares = sum_by_module(trace.operators, watched.seconds)
    scale = footprint.step_seconds / shares[""] if footprint.step_seconds and shares.get("") else 0.0  # watching slows a step
    modules = tuple(
        replace(share, seconds=scale * shares.get(share.name, 0.0), flops=flops.get(share.name, 0.0)) for share in live.modules
    )
    return replace(
        footprint,
        breakdown=_break_down(held, footprint.runtime_bytes, footprint.peak_bytes),
        timeline=live.timeline,
        modules=modules,
        allocated_bytes=footprint.allocated_bytes or watched.allocated_bytes,
        flops=flops.get("", 0.0),
    )


def _with_rates(footprint: Footprint, watched: Observation, roofline: Roofline) -> Footprint:
    """The footprint with its share of the device's highest rate, and what bounds the step."""
    ideal = step_time(watched.trace, roofline, rows=footprint.micro_batch, allocator=footprint.allocator)
    seconds, waiting = footprint.step_seconds or 0.0, footprint.waiting_seconds or 0.0
    return replace(
        footprint,
        utilisation=ideal.utilisation * ideal.seconds / seconds if ideal.utilisation is not None and seconds else None,
        bound_by="data" if waiting > seconds else ideal.bound_by,
    )


def _at_rest(trace: Trace, with_data: bool) -> dict[str, int]:
    """Bytes by category of what stays between steps; with the batch in evaluation."""
    kept = (*STATE, "data") if with_data else STATE
    sums: Counter[str] = Counter()
    for category, size in zip(trace.storages.category, trace.storages.fixed_bytes, strict=True):
        if category in kept:
            sums[category] += int(size)
    return dict(sums)


def _break_down(live: dict[str, int], runtime: int, peak: int) -> dict[str, int]:
    """Categories that sum to the peak: what live tensors leave of it is `temporaries`. Where they leave less than nothing, pages
    were never touched: those are sought in what a step makes before they are sought in what it keeps."""
    parts: dict[str, int] = dict.fromkeys(CATEGORIES, 0)
    parts |= {name: live[name] for name in CATEGORIES if name in live and name != "temporaries"}
    left = peak - runtime - sum(parts.values())
    parts["temporaries"], missing = max(0, left), max(0, -left)
    for name in ("activations", "gradients", "data", "optimizer", "buffers", "parameters"):
        untouched = min(missing, parts[name])
        parts[name] -= untouched
        missing -= untouched
    return {**parts, "runtime": runtime}
