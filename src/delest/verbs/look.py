"""Looking before doing: the data, the plan, the machine."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from delest import errors, job as jobs, processes
from delest.verbs.workplace import Workplace, backend, check_batch, open_workplace, preprocessing_json

if TYPE_CHECKING:
    from delest.records.hardware import Diagnosis
    from delest.records.plan import Choice, Plan
    from delest.records.run import Summary
    from delest.records.trace import Trace
    from delest.training.progress import Progress


def inspect(job: Any) -> Summary:
    """Look at a job's data: what is there, what is wrong with it. Raises `BadInput` with every fault found."""
    from delest.training.progress import Progress

    return open_workplace(jobs.load(job), Progress()).summary


def plan(
    job: Any,
    *,
    memory: str | int | None = None,
    device: str | None = None,
    threads: int | None = None,
    exact: bool = False,
    say: Progress | None = None,
) -> Plan:
    """Check a job and choose the fastest way to train it within `memory` (bytes, "2GiB", "80%"; None: what is free).

    `exact` leaves out what changes the results by more than rounding.
    Raises `BadInput` with every fault, `NothingFits` with the smallest budget that works.
    """
    from delest.training.progress import Progress

    say = say or Progress()
    return plan_workplace(
        open_workplace(jobs.load(job), say), memory=memory, device=device, threads=threads, say=say, exact=exact
    )


def explain(method: str) -> str:
    """What a training method is and where it comes from. Raises `BadInput` for one that is not known, with those that are."""
    from delest import methods

    return str(methods.named(method).__doc__).strip()


def doctor(*, measure: bool = False, clear_cache: bool = False) -> Diagnosis:
    """Versions, processor, memory, GPUs and whether this build of torch can use them, extras, and what to mend.

    With `measure` also the roofline, which takes about six seconds the first time; with `clear_cache` the cache is emptied.
    Raises `BadInput` for a cache folder that cannot be emptied.
    """
    from delest.hardware.doctor import diagnose

    return diagnose(measure=measure, clear_cache=clear_cache)


def plan_workplace(
    place: Workplace, *, memory: str | int | None, device: str | None, threads: int | None, say: Progress, exact: bool = False
) -> Plan:
    """The plan for an opened job: checked and probed in a child process, then chosen."""
    from delest import units
    from delest.hardware import machine
    from delest.planning import search
    from delest.planning.request import Request
    from delest.records.form import from_json
    from delest.records.plan import Plan

    check_batch(place)
    check_device(device)
    started = time.monotonic()
    say.stage("plan: trying the job on two rows and probing a few steps in a process of its own")
    here = machine.describe()
    budget = None if memory is None else units.read_size(memory, here.memory_limit_bytes or here.memory_bytes)
    used = threads or here.cores
    probe = _examine(place, threads=used, device=device or "auto")
    if probe["faults"]:
        raise errors.BadInput(probe["faults"])
    idle = machine.resident_bytes() if probe["device"] == "cpu" else probe["idle_bytes"]
    free = machine.describe().available_bytes + machine.resident_bytes()
    asked: dict[str, Any] = {
        "probe": probe,
        "budget_bytes": free if budget is None else budget,
        "asked": budget is not None,
        "idle_bytes": idle,
        "threads": used,
        "isolated": place.job.origin is not None,
        "exact": exact,
    }
    chosen = search.choose(Request(job=place.job, **asked))
    if chosen is None:
        say.stage("plan: the plain step does not fit; comparing combinations of methods on traces of it")
        found = processes.call(
            "delest.verbs.look:choose_on_traces",
            place.job,
            preprocessing=preprocessing_json(place),
            index=[int(row) for row in place.splits["train"][:2]],
            request=asked,
        )
        chosen = from_json(Plan, found)
    place.seconds["planning"] = time.monotonic() - started
    return replace(chosen, model=probe["model"])


def choose_on_traces(job: Any, *, preprocessing: dict[str, Any], index: list[int], request: dict[str, Any]) -> dict[str, Any]:
    """The plan as JSON for a job whose plain step does not fit; called through `delest.processes`, since tracing loads what training
    does without. A model that branches on data cannot be traced: the largest micro-batch that fits is then its plan."""
    import numpy as np
    import torch

    from delest.backends.torch.loops import JobLoop
    from delest.backends.torch.trace import NeedsProbe, trace_loop
    from delest.data import Feed, Preprocessing, open_job
    from delest.footprint.scratch import scratch
    from delest.hardware.roofline import measure_roofline
    from delest.planning import probed, search
    from delest.planning.request import Request
    from delest.records.form import from_json, to_json
    from delest.records.plan import Plan

    torch.set_num_threads(request["threads"])
    source = open_job(job)
    example = next(Feed(source, np.array(index), from_json(Preprocessing, preprocessing), batch_size=len(index)).ordered())

    def retrace(choices: tuple[Choice, ...]) -> Trace:
        plan = Plan(batch_size=job.batch_size, micro_batch=job.batch_size, choices=choices, threads=request["threads"])
        return trace_loop(lambda mode: JobLoop(job, plan, source.schema, example), job.batch_size, scratch=scratch)

    wanted = Request(job=job, **request)
    try:
        found = search.choose(wanted, lambda: (retrace, measure_roofline(request["threads"])))
    except NeedsProbe:
        found = probed.choose(wanted, *probed.faster(wanted))
    return to_json(found)


def check_device(device: str | None) -> None:
    """Raise `BadInput` for a device that is unknown or that this build of torch cannot use, with the remedy."""
    if device in (None, "auto", "cpu"):
        return
    if device != "cuda":
        raise errors.BadInput(f"unknown device {device!r}: use cpu or cuda.")
    from delest.hardware.accelerators import find_accelerators

    found = find_accelerators()
    if not any(gpu.usable for gpu in found):
        why = "; ".join(f"{gpu.name}: {gpu.remedy}" for gpu in found) or "no GPU was found on this machine"
        raise errors.BadInput(f"--device cuda cannot be used: {why}. `delest doctor` says more.")


def _examine(place: Workplace, *, threads: int, device: str) -> Any:
    # Loading the framework takes seconds; this process needs it too, and does it while the child works.
    warming = threading.Thread(target=lambda: backend(place.job).warm(), daemon=True)
    if place.job.origin is not None:
        warming.start()
    rows = min(len(place.splits["train"]), max(2, place.job.batch_size // 2, min(64, place.job.batch_size)))
    probe = processes.call(
        "delest.footprint.probe:examine",
        place.job,
        preprocessing=preprocessing_json(place),
        index=[int(row) for row in place.splits["train"][:rows]],
        threads=threads,
        device=device,
    )
    if warming.ident is not None:
        warming.join()
    return probe
