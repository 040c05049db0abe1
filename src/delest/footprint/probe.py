"""A job tried out in a process of its own: does it work on two rows, what do steps take in memory and time, and which
ways of computing are faster on this machine.

`examine` is called through `delest.processes`; it takes and gives plain JSON.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from delest.backends.torch.check import Single, check
from delest.backends.torch.model import fingerprint
from delest.backends.torch.session import TorchSession
from delest.data import Feed, Preprocessing, open_job
from delest.hardware import machine, probes
from delest.job import Job
from delest.records.batch import Batch
from delest.records.form import from_json
from delest.records.plan import Choice, Plan
from delest.records.source import Schema

STEPS = 3  # per probed size: the first allocates, the others are timed
ROUNDS = 4  # per compared variant
LONGEST_STEP_SECONDS = 4.0


def examine(
    job: Job, *, preprocessing: dict[str, Any], index: list[int], threads: int, device: str, checked_only: bool = False
) -> dict[str, Any]:
    """Check the job on two rows and probe its steps.

    Returns `faults` (empty where all is well), `idle_bytes` (this process, warm, before the model), `base_bytes` (what
    building the session added), `samples` (for each probed size: rows, growth over idle in bytes at the first step, at a
    steady one, in evaluation; seconds a step), `variants` (seconds a step by method and setting), `batch_statistics`,
    `parameters`, `model` (its fingerprint), `state_bytes`, `weights_bytes`, `device`.
    """
    torch.set_num_threads(threads)
    device = device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    prepared = from_json(Preprocessing, preprocessing)
    source = open_job(job)
    whole = next(Feed(source, np.array(index), prepared, batch_size=len(index)).ordered())
    faults = check(job, source.schema, _first(whole, 2), _first(whole, 32))
    if faults or checked_only:
        return {"faults": faults}
    result: dict[str, Any] = {"faults": [], "device": device, "samples": []}
    plain = Plan(batch_size=job.batch_size, micro_batch=job.batch_size, threads=threads, device=device)
    _release()
    result["idle_bytes"] = machine.resident_bytes()
    for rows in _sizes(job.batch_size, len(index)):
        sample = _probe(job, plain, source.schema, _first(whole, rows), result)
        result["samples"].append(sample)
        if sample["seconds"] * job.batch_size / rows > LONGEST_STEP_SECONDS:
            break
    result["variants"] = _variants(job, plain, source.schema, _first(whole, min(len(index), 64)), threads)
    return result


def _sizes(batch_size: int, available: int) -> list[int]:
    """A quarter and a half of the batch: enough to extrapolate from, too small to run out of memory first."""
    least = 2 if batch_size > 1 else 1
    return sorted({min(available, max(least, batch_size // 4)), min(available, max(least, batch_size // 2))})


def _probe(job: Job, plan: Plan, schema: Schema, batch: Batch, result: dict[str, Any]) -> dict[str, Any]:
    idle = result["idle_bytes"]
    session = TorchSession(job, plan, schema)
    result["base_bytes"] = max(0, machine.resident_bytes() - idle)
    result["parameters"] = session.parameters()
    result["model"] = fingerprint(session.model)
    result["batch_statistics"] = any(
        isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in session.model.modules()
    )
    result["weights_bytes"] = sum(array.nbytes for array in session.weights().values())
    result["state_bytes"] = sum(array.nbytes for array in session.state().arrays.values())
    first, steady, seconds = 0, 0, []
    for number in range(STEPS):
        _reset_peak(plan.device)
        started = time.perf_counter()
        float(session.step(batch, 1e-6).loss)
        seconds.append(time.perf_counter() - started)
        peak = _peak(plan.device) - idle
        first, steady = (peak, steady) if number == 0 else (first, max(steady, peak))
    _reset_peak(plan.device)
    for _ in session.outputs(Single(batch)):
        pass
    evaluation = _peak(plan.device) - idle
    del session
    _release()
    return {"rows": batch.count, "first": first, "steady": steady, "evaluation": evaluation, "seconds": min(seconds[1:])}


def _variants(job: Job, plain: Plan, schema: Schema, batch: Batch, threads: int) -> dict[str, dict[str, float]]:
    """Seconds a step with and without each method that the recipe leaves to a probe, alternating."""
    candidates: dict[str, dict[str, Any]] = {}
    has_images = isinstance(batch.inputs, np.ndarray) and batch.inputs.ndim == 4
    if has_images and job.recipe.memory_format == "auto":
        candidates["memory_format"] = {"format": "channels_last"}
    if job.recipe.precision == "auto" and plain.device == "cpu" and _worth_trying_bf16(has_images):
        candidates["precision"] = {"dtype": "bf16"}
    found: dict[str, dict[str, float]] = {}
    for method, config in candidates.items():
        choice = Choice(method=method, config=config, keeps="changed", why="")
        sessions = {
            "plain": TorchSession(job, plain, schema),
            "with": TorchSession(job, replace(plain, choices=(choice,)), schema),
        }
        times: dict[str, list[float]] = {name: [] for name in sessions}
        for _ in range(ROUNDS + 1):
            for name, session in sessions.items():
                started = time.perf_counter()
                float(session.step(batch, 1e-6).loss)
                times[name].append(time.perf_counter() - started)
        found[method] = {name: statistics.median(values[1:]) for name, values in times.items()}
        del sessions
        _release()
    return found


def _worth_trying_bf16(has_images: bool) -> bool:
    """bf16 products or convolutions must be faster than fp32 on this machine before a step is tried with them."""
    seconds, kernel = probes.time_precisions(), "convolution" if has_images else "matmul"
    return seconds[f"{kernel}_fp32"] > probes.GAIN * seconds[f"{kernel}_bf16"]


def _first(batch: Batch, rows: int) -> Batch:
    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: cut(item) for name, item in value.items()}
        if isinstance(value, tuple):
            return tuple(cut(item) for item in value)
        return None if value is None else value[:rows]

    return Batch(cut(batch.inputs), cut(batch.targets), batch.index[:rows], batch.epoch, min(rows, batch.count))


def _release() -> None:
    """Give freed memory back to the system, so that the next reading starts clean (glibc keeps it otherwise)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    machine.reset_peak()


def _peak(device: str) -> int:
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        return max(total - free, torch.cuda.max_memory_reserved())
    return machine.peak_resident_bytes()
