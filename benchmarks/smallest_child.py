"""One process of benchmarks/smallest_budget.py, on one thread with malloc's mmap threshold fixed; prints a line of JSON at its end.

    python smallest_child.py plan JOB              the smallest plans, by what they may use
    python smallest_child.py memory JOB PLAN       peak bytes above the warm idle process; PLAN is a file, or `plain`
    python smallest_child.py time JOB PLAN...      processor seconds of steps: the plain one and each plan's in turn

The plain step is written as tutorials do, with `torch.optim.AdamW(model.parameters())` as it comes. A plan's steps are a session's,
with one evaluation on the same batch, as a training makes it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
M_MMAP_THRESHOLD, THRESHOLD_BYTES = -3, 65536  # mallopt(3)
STEPS, PAIRS = 3, 4
LONGEST = 1.7  # times the plain step's expected time
VARIANTS = ("any", "any, Adam's rule", "exact", "any, whole batch", "exact, whole batch")
OTHER_RULE = "factored_state"  # what the second variant leaves out
CLOSE = 2  # of the candidates with the least memory are traced with their methods applied


def prepared(name: str) -> tuple[Any, Any, Any]:
    """The job, its opened data, and a first batch as training gets it."""
    import numpy as np

    from delest import job as jobs
    from delest.data import Feed
    from delest.training.progress import Progress
    from delest.verbs.workplace import open_workplace

    place = open_workplace(jobs.load(f"{HERE / 'smallest_jobs.py'}:{name.replace('-', '_')}"), Progress())
    rows = place.job.batch_size
    batch = next(Feed(place.source, np.arange(rows), place.preprocessing, batch_size=rows).ordered())
    return place.job, place, batch


def plan(name: str) -> dict[str, Any]:
    """Plans with the least memory that are expected to take at most `LONGEST` times as long: of all, of those that keep
    Adam's rule, of those that keep the results, and of the first and the last without micro-batches."""
    from delest.backends.torch.loops import JobLoop
    from delest.backends.torch.trace import trace_loop
    from delest.footprint import heap
    from delest.footprint.replay import replay
    from delest.footprint.scratch import scratch
    from delest.hardware.roofline import measure_roofline
    from delest.planning import traced
    from delest.planning.account import account_for
    from delest.planning.candidates import SMALLER_STATES, Judge, all_candidates, keeps_of
    from delest.planning.request import EXACT, Request
    from delest.records.form import to_json
    from delest.records.plan import Plan
    from delest.verbs.planning import _examine

    heap.is_here = lambda: (
        False
    )  # malloc's threshold is fixed where these plans run, so that freed blocks do not wait for reuse
    job, place, batch = prepared(name)
    probe = _examine(place, threads=1, device="cpu", fewer_threads=False)
    idle = probe["idle_bytes"]
    request = Request(job=job, probe=probe, budget_bytes=idle, asked=True, idle_bytes=idle, threads=1)

    def trace(choices: tuple[Any, ...]) -> Any:
        chosen = Plan(batch_size=job.batch_size, micro_batch=job.batch_size, choices=choices, threads=1)
        return trace_loop(lambda mode: JobLoop(job, chosen, place.source.schema, batch), job.batch_size, scratch=scratch)

    started, retrace = time.perf_counter(), traced._once(trace)
    plain = retrace(())
    judge = Judge(plain, request, measure_roofline(1))
    judges = {request.allocator: judge}
    judge.refused = traced._refused(plain, (), judge, traced._by_trace(retrace))
    most = LONGEST * judge.seconds(plain, job.batch_size)
    everything = [one for state in (None, *SMALLER_STATES) for one in all_candidates(plain, (), judge, state)]
    candidates = sorted((one for one in everything if one.seconds <= most), key=lambda one: one.grown_bytes)
    found = {}
    for what in VARIANTS:
        group = [
            one
            for one in candidates
            if ("exact" not in what or keeps_of(one, request) in EXACT)
            and ("rule" not in what or not one.uses(OTHER_RULE))
            and ("whole" not in what or one.rows == job.batch_size)
        ]
        close = [traced._closely(one, judges, retrace) for one in group[:CLOSE]]
        least = min(close, key=lambda one: one.grown_bytes)
        found[what] = to_json(account_for(least, [least], (), plain, judges))
    steps = replay(plain, rows=job.batch_size, allocator="exact", phases=("first_step", "steady_step"))
    kept = steps.breakdown["activations"] + steps.breakdown["temporaries"]
    return {
        "plans": found,
        "refused": judge.refused,
        "activation_share": kept / steps.peak_bytes,
        "traced_peak_bytes": steps.peak_bytes,
        "planning_seconds": time.perf_counter() - started,
    }


def warm_up() -> None:
    """Load what a training loads, and leave no tensor behind."""
    import torch
    import torch._dynamo  # torch's optimizers import it at a moment of their own
    from torch import nn

    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.LayerNorm(8 * 36), nn.Linear(8 * 36, 4))
    optimizer = torch.optim.AdamW(network.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(torch.randn(2, 3, 8, 8)), torch.tensor([0, 1])).backward()
        optimizer.step()


def plain_step(job: Any, batch: Any) -> Callable[[], float]:
    import torch

    model = job.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    smoothing = job.recipe.label_smoothing
    tensors = _tensors(batch)

    def step() -> float:
        if job.step is not None:
            loss = job.step(model, tensors)
        else:
            loss = torch.nn.functional.cross_entropy(model(tensors.inputs), tensors.targets, label_smoothing=smoothing)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def _tensors(batch: Any) -> Any:
    from dataclasses import replace

    import torch

    return replace(batch, inputs=torch.from_numpy(batch.inputs), targets=torch.from_numpy(batch.targets))


def read_plan(path: str) -> Any:
    from delest.records.form import read_json
    from delest.records.plan import Plan

    return read_json(Plan, Path(path))


def planned_step(job: Any, place: Any, batch: Any, plan: Any, *, evaluating: bool) -> Callable[[], float]:
    from delest.backends.torch.check import Single
    from delest.backends.torch.session import TorchSession

    session = TorchSession(job, plan, place.source.schema)

    def step() -> float:
        loss = float(session.step(batch, 1.0).loss)
        if evaluating:
            for _ in session.outputs(Single(batch)):
                pass
        return loss

    return step


def memory(name: str, path: str) -> dict[str, Any]:
    from delest.backends.torch.session import TorchSession  # noqa: F401
    from delest.hardware import machine

    job, place, batch = prepared(name)
    plan = None if path == "plain" else read_plan(path)  # what reads plans is loaded in any process that follows one
    warm_up()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    idle = machine.resident_bytes()
    machine.reset_peak()
    step = plain_step(job, batch) if plan is None else planned_step(job, place, batch, plan, evaluating=True)
    losses = [step() for _ in range(STEPS)]
    return {"idle_bytes": idle, "peak_bytes": machine.peak_resident_bytes() - idle, "losses": losses}


def times(name: str, paths: list[str]) -> dict[str, Any]:
    job, place, batch = prepared(name)
    warm_up()
    steps = {"plain": plain_step(job, batch)}
    steps |= {path: planned_step(job, place, batch, read_plan(path), evaluating=False) for path in paths}
    seconds: dict[str, list[float]] = {path: [] for path in steps}
    for _ in range(PAIRS + 1):
        for path, step in steps.items():
            started = time.process_time()
            step()
            seconds[path].append(time.process_time() - started)
    return {"seconds": {path: measured[1:] for path, measured in seconds.items()}}


def main() -> None:
    what, name, *paths = sys.argv[1:]
    if what != "plan" and not ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, THRESHOLD_BYTES):
        sys.exit("mallopt refused the threshold")
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported
    sys.path.insert(0, str(HERE))
    import torch

    torch.set_num_threads(1)
    answer = plan(name) if what == "plan" else memory(name, paths[0]) if what == "memory" else times(name, paths)
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
