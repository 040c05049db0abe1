"""The processes of benchmarks/throughput.py; what they find is printed as lines of JSON.

    python throughput_child.py grid JOB            a line for each point, one after another
    python throughput_child.py plan JOB BUDGET     delest's plan, BUDGET in bytes or `free`
    python throughput_child.py turns JOB WHAT      WHAT is a point, or a plan, as JSON in a file: its highest resident
                                                   memory, then after each line of standard input also the seconds of a step
A point of the grid is a training loop in plain PyTorch, with `torch.optim.AdamW`.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MOST_POINTS = 64
POINT_SECONDS, TURN_SECONDS = 1.0, 0.7  # of steps that are timed
DROPPED = 2.0  # a first step this many times as long as the best first step: no further ones
LR = 1e-3
Step = Callable[[], float]


def prepared(name: str) -> tuple[Any, Any, Any]:
    """The job, its opened data, and a first batch as training gets it."""
    from delest import job as jobs
    from delest.training.progress import Progress
    from delest.verbs.workplace import open_workplace

    place = open_workplace(jobs.load(f"{HERE / 'throughput_jobs.py'}:{name}"), Progress())
    rows = place.splits["train"][: place.job.batch_size]
    return place.job, place, next(iter(place.feed("train", rows).ordered()))


@dataclasses.dataclass(frozen=True)
class Point:
    """One way to write the same step."""

    rows: int  # of a micro-batch
    checkpoints: bool  # on every block
    channels_last: bool
    bf16: bool
    fused: bool  # the optimizer; else a loop over parameters, as it comes


def points_of(job: Any, batch: Any, least_rows: int) -> list[Point]:
    """From the whole batch down in powers of two; memory formats for images alone, bf16 where the processor gains from it."""
    from delest.hardware import probes

    seconds = probes.time_precisions()
    has_bf16 = any(seconds[f"{kernel}_bf16"] < seconds[f"{kernel}_fp32"] for kernel in ("matmul", "convolution"))
    formats = (False, True) if batch.inputs.ndim == 4 else (False,)
    others = list(itertools.product((False, True), formats, (False, True) if has_bf16 else (False,), (True, False)))
    sizes = [job.batch_size >> power for power in range(job.batch_size.bit_length()) if job.batch_size >> power >= least_rows]
    return [Point(rows, *other) for rows in sizes[: MOST_POINTS // len(others)] for other in others]


def point_step(name: str, job: Any, batch: Any, point: Point) -> Step:
    """A training step in plain PyTorch, built with what `point` says."""
    import torch

    model = job.model()
    if point.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if point.checkpoints:
        checkpoint_blocks(name, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True if point.fused else None)

    def step() -> float:
        total = 0.0
        for part in parts_of(batch, point):
            with torch.autocast("cpu", torch.bfloat16, enabled=point.bf16):
                loss = loss_of(job, model, part) * (part.count / batch.count)
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        return float(total)

    return step


def parts_of(batch: Any, point: Point) -> Iterator[Any]:
    import torch

    for start in range(0, batch.count, point.rows):
        rows = slice(start, start + point.rows)
        inputs, targets = torch.from_numpy(batch.inputs[rows]), torch.from_numpy(batch.targets[rows])
        if point.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        yield dataclasses.replace(batch, inputs=inputs, targets=targets, index=batch.index[rows], count=len(inputs))


def loss_of(job: Any, model: Any, batch: Any) -> Any:
    import torch

    if job.step is not None:
        return job.step(model, batch)
    return torch.nn.functional.cross_entropy(model(batch.inputs), batch.targets, label_smoothing=job.recipe.label_smoothing)


def checkpoint_blocks(name: str, model: Any) -> None:
    import throughput_jobs
    from torch.utils.checkpoint import checkpoint

    def recomputed(forward: Any) -> Any:
        return lambda *inputs: checkpoint(forward, *inputs, use_reentrant=False)

    for module in model.modules():
        if isinstance(module, throughput_jobs.BLOCKS[name]):
            module.forward = recomputed(module.forward)


def normalises_over_batch(model: Any) -> bool:
    import torch

    return any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in model.modules())


def timed(step: Step) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def release() -> None:
    from delest import malloc

    gc.collect()
    malloc.give_back()


def grid(name: str) -> None:
    """Each point's fastest step after its first, and the least that its peak can be in a process of its own: what earlier points left in
    the heap is here already, and used again."""
    from delest.hardware import machine

    job, _, batch = prepared(name)
    release()
    idle = machine.resident_bytes()
    statistics = normalises_over_batch(job.model())
    points = points_of(job, batch, 2 if statistics else 1)
    for point in points[:1]:  # libraries load, threads start
        point_step(name, job, batch, point)()
    best_first = math.inf
    for point in points:
        release()
        machine.reset_peak()
        before = machine.resident_bytes()
        step = point_step(name, job, batch, point)
        first = timed(step)
        best_first = min(best_first, first)
        seconds: list[float] = []
        while first <= DROPPED * best_first and (len(seconds) < 2 or sum(seconds) < POINT_SECONDS - first):
            seconds.append(timed(step))
        least = idle + machine.peak_resident_bytes() - before
        found = {"seconds": min(seconds, default=first), "dropped": not seconds, "least_peak_bytes": least}
        del step
        keeps = point.rows == job.batch_size or not statistics
        print(json.dumps({"point": dataclasses.asdict(point), "keeps": keeps, **found}), flush=True)


def plan(name: str, budget: str) -> None:
    import delest
    from delest import errors, job as jobs
    from delest.records.form import to_json

    job = jobs.load(f"{HERE / 'throughput_jobs.py'}:{name}")
    started = time.perf_counter()
    try:
        found = to_json(delest.plan(job, memory=None if budget == "free" else int(budget)))
    except errors.NothingFits as error:
        found = {"nothing_fits": str(error), "smallest_bytes": error.smallest_bytes}
    print(json.dumps({"plan": found, "planning_seconds": time.perf_counter() - started}), flush=True)


def turns(name: str, path: str) -> None:
    """Steps when asked for, as many as take `TURN_SECONDS`."""
    from delest.hardware import machine

    job, place, batch = prepared(name)
    given = json.loads(Path(path).read_text())
    release()
    machine.reset_peak()
    step = point_step(name, job, batch, Point(**given)) if "fused" in given else plan_step(job, place, batch, path)
    for _ in range(2):
        seconds = timed(step)
    count = max(1, round(TURN_SECONDS / seconds))
    print(json.dumps({"peak_bytes": machine.peak_resident_bytes()}), flush=True)
    for _ in sys.stdin:
        taken = [timed(step) for _ in range(count)]
        print(json.dumps({"seconds": sum(taken) / count, "peak_bytes": machine.peak_resident_bytes()}), flush=True)


def plan_step(job: Any, place: Any, batch: Any, path: str) -> Step:
    """A step as `delest train` makes it under a plan."""
    from delest.backends.torch.session import TorchSession
    from delest.records.form import read_json
    from delest.records.plan import Plan

    session = TorchSession(job, read_json(Plan, Path(path)), place.source.schema)
    return lambda: float(session.step(batch, 1.0).loss)


def main() -> None:
    what, *arguments = sys.argv[1:]
    sys.path.insert(0, str(HERE))
    {"grid": grid, "plan": plan, "turns": turns}[what](*arguments)


if __name__ == "__main__":
    main()
