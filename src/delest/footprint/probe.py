"""A job tried out in a process of its own: does it work on two rows, what do steps take in memory and time, and which
ways of computing are faster on this machine.

`examine` is called through `delest.processes`; it takes and gives plain JSON.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from delest import malloc
from delest.backends.torch.check import Single, check
from delest.backends.torch.model import fingerprint
from delest.backends.torch.session import TorchSession
from delest.data import Feed, Preprocessing, open_job
from delest.hardware import machine, probes
from delest.hardware.busyness import Busyness
from delest.job import Job
from delest.records.batch import Batch
from delest.records.form import from_json
from delest.records.plan import Choice, Plan
from delest.records.source import Schema

STEPS = 3  # per probed size: the first allocates, the others are timed
LONG_STEP_SECONDS = 0.4  # of which one is timed: it repeats itself better than planning has time for
ROUNDS, LEAST_ROUNDS = 4, 2  # per compared variant
PAIRED_SECONDS = 2.0  # after which no more pairs are timed
LONGEST_FOR_ONE_THREAD = 0.04  # seconds a step: in a longer one operators are large enough to be divided
LONGEST_STEP_SECONDS = 4.0


def examine(
    job: Job,
    *,
    preprocessing: dict[str, Any],
    index: list[int],
    threads: int,
    device: str,
    checked_only: bool = False,
    fewer_threads: bool = False,
) -> dict[str, Any]:
    """Check the job on two rows and probe its steps.

    Returns `faults` (empty where all is well), `opened_bytes` (this process with the data opened), `idle_bytes` (the same, warm,
    before the model), `base_bytes` (what building the session added), `samples` (for each probed size: rows, growth over idle in bytes at
    the first step, at a steady one, in evaluation; seconds a step), `variants` (seconds a step by method and setting),
    `batch_statistics`, `parameters`, `model` (its fingerprint), `largest_bytes` (of an array of the state), `weights_bytes`, `device`,
    `device_memory_bytes` (None: it is a processor), `busy` (where others kept the machine busy meanwhile: how that was seen, else empty). With
    `fewer_threads` one thread is tried too.
    """
    torch.set_num_threads(threads)
    device = device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    prepared = from_json(Preprocessing, preprocessing)
    source = open_job(job)
    whole = next(Feed(source, np.array(index), prepared, batch_size=len(index)).ordered())
    _release()
    opened = machine.resident_bytes()
    faults = check(job, source.schema, _first(whole, 2), _first(whole, 32))
    if faults or checked_only:
        return {"faults": faults}
    memory = torch.cuda.mem_get_info()[1] if device == "cuda" else None
    result: dict[str, Any] = {
        "faults": [],
        "device": device,
        "device_memory_bytes": memory,
        "samples": [],
        "opened_bytes": opened,
    }
    plain = Plan(batch_size=job.batch_size, micro_batch=job.batch_size, threads=threads, device=device)
    _release()
    result["idle_bytes"] = machine.resident_bytes()
    busy = Busyness(threads)
    for rows in _sizes(job.batch_size, len(index)):
        sample = _probe(job, plain, source.schema, _first(whole, rows), result, busy)
        result["samples"].append(sample)
        if sample["seconds"] * job.batch_size / rows > LONGEST_STEP_SECONDS:
            break
    result["busy"] = busy.words() if device == "cpu" else ""
    few = _first(whole, min(len(index), 64))
    result["variants"] = _variants(job, plain, source.schema, few)
    _release()
    largest = result["samples"][-1]
    short = largest["seconds"] * min(1.0, few.count / largest["rows"]) < threads * LONGEST_FOR_ONE_THREAD
    if fewer_threads and threads > 1 and device == "cpu" and short:
        result["variants"] |= _one_thread(TorchSession(job, plain, source.schema), few, threads)
    return result


def examine_allocator(
    job: Job, *, preprocessing: dict[str, Any], index: list[int], threads: int, plain_seconds: float
) -> dict[str, Any]:
    """What a step on the rows `index` takes under the malloc that this process, thought to be fresh, was started with: a sample as
    `examine` has them.

    Its seconds are those of the default, `plain_seconds`, as much longer or shorter as steps were here: with a fixed threshold beside
    ones with what is freed kept, alternating; under a library's malloc as they are.
    """
    torch.set_num_threads(threads)
    source = open_job(job)
    batch = next(Feed(source, np.array(index), from_json(Preprocessing, preprocessing), batch_size=len(index)).ordered())
    check(job, source.schema, _first(batch, 2), _first(batch, 32))  # what it loads is not the step's
    plan = Plan(batch_size=job.batch_size, micro_batch=job.batch_size, threads=threads)
    _release()
    sample = _probe(job, plan, source.schema, batch, {"idle_bytes": machine.resident_bytes()}, Busyness(threads))
    if malloc.current() == "mmap":
        sample["seconds"] = plain_seconds * _threshold_cost(TorchSession(job, plan, source.schema), batch)
    return sample


def examine_plan(job: Job, *, plan: dict[str, Any], preprocessing: dict[str, Any], index: list[int]) -> dict[str, Any]:
    """What a step on the rows `index`, one batch, takes with a plan's methods, in a process that was started as they ask: a sample as
    `examine` has them."""
    followed = from_json(Plan, plan)
    torch.set_num_threads(followed.threads or torch.get_num_threads())
    source = open_job(job)
    batch = next(Feed(source, np.array(index), from_json(Preprocessing, preprocessing), batch_size=len(index)).ordered())
    check(job, source.schema, _first(batch, 2), _first(batch, 32))  # what it loads is not the step's
    if followed.config("allocator") == {"name": "mmap"}:
        malloc.fix_threshold()
    _release()
    idle = {"idle_bytes": machine.resident_bytes()}
    return _probe(job, followed, source.schema, batch, idle, Busyness(torch.get_num_threads()))


def _threshold_cost(session: TorchSession, batch: Batch) -> float:
    """How many times as long a step takes with a fixed mmap threshold as with one that has moved up."""
    ratios: list[float] = []
    began = time.perf_counter()
    while len(ratios) < ROUNDS and (not ratios or time.perf_counter() - began < PAIRED_SECONDS):
        seconds = []
        for set_threshold in (malloc.move_threshold, malloc.fix_threshold):
            set_threshold()
            float(session.step(batch, 1e-6).loss)  # which fills, or empties, the heap
            started = time.perf_counter()
            float(session.step(batch, 1e-6).loss)
            seconds.append(time.perf_counter() - started)
        ratios.append(seconds[1] / seconds[0])
    return statistics.median(ratios)


def _sizes(batch_size: int, available: int) -> list[int]:
    """A quarter and a half of the batch: enough to extrapolate from, too small to run out of memory first."""
    least = 2 if batch_size > 1 else 1
    return sorted({min(available, max(least, batch_size // 4)), min(available, max(least, batch_size // 2))})


def _probe(job: Job, plan: Plan, schema: Schema, batch: Batch, result: dict[str, Any], busy: Busyness) -> dict[str, Any]:
    idle = result["idle_bytes"]
    session = TorchSession(job, plan, schema)
    result["base_bytes"] = max(0, machine.resident_bytes() - idle)
    result["parameters"] = session.parameters()
    result["model"] = fingerprint(session.model)
    result["batch_statistics"] = any(
        isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in session.model.modules()
    )
    result["weights_bytes"] = sum(array.nbytes for array in session.weights().values())
    result["largest_bytes"] = max(array.nbytes for array in session.state().arrays.values())
    first, steady, seconds = 0, 0, []
    for number in range(STEPS):
        _reset_peak(plan.device)
        started = time.perf_counter()
        with busy.watched():
            float(session.step(batch, 1e-6).loss)
        seconds.append(time.perf_counter() - started)
        peak = _peak(plan.device) - idle
        first, steady = (peak, steady) if number == 0 else (first, max(steady, peak))
        if number and seconds[-1] > LONG_STEP_SECONDS:
            break
    busy.repeated(seconds[1:])
    _reset_peak(plan.device)
    for _ in session.outputs(Single(batch)):
        pass
    evaluation = _peak(plan.device) - idle
    del session
    _release()
    return {"rows": batch.count, "first": first, "steady": steady, "evaluation": evaluation, "seconds": min(seconds[1:])}


def _variants(job: Job, plain: Plan, schema: Schema, batch: Batch) -> dict[str, dict[str, float]]:
    """Seconds a step with and without each method that the recipe leaves to a probe, alternating."""
    candidates: dict[str, dict[str, Any]] = {}
    has_images = isinstance(batch.inputs, np.ndarray) and batch.inputs.ndim == 4
    if has_images and job.recipe.memory_format == "auto":
        candidates["memory_format"] = {"format": "channels_last"}
    if job.recipe.precision == "auto" and plain.device == "cpu" and _worth_trying_bf16():
        candidates["precision"] = {"dtype": "bf16"}
    if not candidates:
        return {}
    sessions = {"plain": TorchSession(job, plain, schema)}
    for method, config in candidates.items():
        choice = Choice(method=method, config=config, keeps="changed", why="")
        sessions[method] = TorchSession(job, replace(plain, choices=(choice,)), schema)
    seconds = _by_turns(sessions, batch)
    return {method: {"plain": seconds["plain"], "with": seconds[method]} for method in candidates}


def _by_turns(sessions: Mapping[str, TorchSession], batch: Batch) -> dict[str, float]:
    """Seconds a step of each, alternating, after a first one that is not counted: in `ROUNDS` rounds, in fewer where steps are long."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    began = time.perf_counter()
    for number in range(ROUNDS + 1):
        for name, session in sessions.items():
            started = time.perf_counter()
            float(session.step(batch, 1e-6).loss)
            times[name].append(time.perf_counter() - started)
        if number >= LEAST_ROUNDS and time.perf_counter() - began > PAIRED_SECONDS:
            break
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def _one_thread(session: TorchSession, batch: Batch, threads: int) -> dict[str, dict[str, float]]:
    """Seconds a step in one thread and in all, alternating; none where one takes so long that threads pay.

    One thread must be faster in the median than all of them at their best: beside other processes threads wait for each other at times, and a
    training lasts longer than a probe.
    """
    seconds: dict[int, list[float]] = {threads: [], 1: []}
    for _ in range(2 * ROUNDS):
        for count, times in seconds.items():
            torch.set_num_threads(count)
            started = time.perf_counter()
            float(session.step(batch, 1e-6).loss)
            times.append(time.perf_counter() - started)
        if min(seconds[1]) > LONGEST_FOR_ONE_THREAD:
            break
    torch.set_num_threads(threads)
    if min(seconds[1]) > LONGEST_FOR_ONE_THREAD:
        return {}
    return {"threads": {"plain": min(seconds[threads]), "with": statistics.median(seconds[1])}}


def _worth_trying_bf16() -> bool:
    """Whether bf16 makes a product or a convolution any faster on this machine: where it makes neither, a step takes up to ten times as long.

    How much faster says little, as kernels of other sizes gain more: steps decide.
    """
    seconds = probes.time_precisions()
    return any(seconds[f"{kernel}_bf16"] < seconds[f"{kernel}_fp32"] for kernel in ("matmul", "convolution"))


def _first(batch: Batch, rows: int) -> Batch:
    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: cut(item) for name, item in value.items()}
        if isinstance(value, tuple):
            return tuple(cut(item) for item in value)
        return None if value is None else value[:rows]

    return Batch(cut(batch.inputs), cut(batch.targets), batch.index[:rows], batch.epoch, min(rows, batch.count))


def _release() -> None:
    """Give freed memory back to the system, so that the next reading starts clean (malloc keeps it otherwise)."""
    gc.collect()
    malloc.give_back()


def _reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    machine.reset_peak()


def _peak(device: str) -> int:
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        return max(total - free, torch.cuda.max_memory_reserved())
    return machine.peak_resident_bytes()
