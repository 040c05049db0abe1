"""How a job would be trained within a budget: probed in a child process, chosen from its figures or over traces, kept for who asks again."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from delest import errors, job as jobs, malloc, processes, supervision, units
from delest.verbs import kept_plans
from delest.verbs.keras_jobs import is_keras, refuse
from delest.verbs.keras_planning import plan_keras
from delest.verbs.workplace import Workplace, backend, check_batch, check_device, given_plan, open_workplace, preprocessing_json

if TYPE_CHECKING:
    from delest.planning.request import Request
    from delest.records.devices import DeviceComparison
    from delest.records.hardware import Hardware
    from delest.records.plan import Choice, Plan
    from delest.records.trace import Trace
    from delest.training.progress import Progress

BUSY_KEPT_SECONDS = 900.0  # what was probed on a busy machine: who asks again at once gets the same answer
_TRACING = ("torch._dynamo", "delest.backends.torch.trace", "delest.planning.traced")  # what tracing loads: seconds
STARTS_HIGHER_BYTES = 8 << 20  # a process than another that does the same: within the margin of every plan


@overload
def plan(
    job: Any,
    *,
    memory: str | int | None = ...,
    device: str | None = ...,
    threads: int | None = ...,
    exact: bool = ...,
    probe: bool = ...,
    say: Progress | None = ...,
) -> Plan: ...
@overload
def plan(
    job: Any,
    *,
    memory: str | int | None = ...,
    time: str | float | None = ...,
    devices: str | Sequence[str],
    prices: Mapping[str, float] | None = ...,
    exact: bool = ...,
    say: Progress | None = ...,
) -> DeviceComparison: ...
def plan(
    job: Any,
    *,
    memory: str | int | None = None,
    time: str | float | None = None,
    devices: str | Sequence[str] | None = None,
    prices: Mapping[str, float] | None = None,
    device: str | None = None,
    threads: int | None = None,
    exact: bool = False,
    probe: bool = False,
    say: Progress | None = None,
) -> Plan | DeviceComparison:
    """Check a job and choose the fastest way to train it within `memory` (bytes, "2GiB", "80%"; None: what is free).

    `exact` leaves out what changes the results by more than rounding. With `probe` real steps are made with the plan and the fastest others
    that fit, in a process each, and the fastest of those that kept the budget is taken. With `devices`, names of the catalogue ("t4,l4,a100" or a sequence),
    the answer is a `DeviceComparison` instead: for each device, which need not be here, the plan by which the job fits, its time and, by
    `prices` of an hour, its cost; `memory` is then of each device, and `time` what the whole run may take ("10h", seconds).

    Raises `BadInput` with every fault, `NothingFits` with the smallest budget that works (not with `devices`).
    """
    from delest.training.progress import Progress

    say = say or Progress()
    if devices is not None:
        if device is not None or threads is not None or probe:
            raise errors.BadInput(
                "--device, --threads and --probe are of this machine: leave them out where devices are compared."
            )
        from delest.verbs.devices import compare, offers_of

        offers, seconds = offers_of(devices, prices, memory), None if time is None else units.read_seconds(time)
        place = open_workplace(jobs.load(job), say)
        refuse(place.job, place.source.schema, "plan --devices")
        return compare(place, offers, seconds=seconds, exact=exact, say=say)
    if time is not None or prices:
        raise errors.BadInput("--time and --price are for comparing devices: name some with --devices, as in t4,l4,a100-80.")
    place = open_workplace(jobs.load(job), say)
    return plan_workplace(place, memory=memory, device=device, threads=threads, say=say, exact=exact, probe_few=probe)


def explain(method: str) -> str:
    """What a training method is and where it comes from. Raises `BadInput` for one that is not known, with those that are."""
    from delest import methods

    return str(methods.named(method).__doc__).strip()


def plan_workplace(
    place: Workplace,
    *,
    memory: str | int | None,
    device: str | None,
    threads: int | None,
    say: Progress,
    exact: bool = False,
    startable: bool = True,
    probe_few: bool = False,
) -> Plan:
    """The plan for an opened job: checked and probed in a child process, then chosen; with `probe_few` of the few best by real steps.

    Unless `startable`, nothing that must act before a process starts.
    Raises `BadInput` for a job that does not work and a budget above the machine's, `NothingFits`.
    """
    from delest.hardware import machine
    from delest.planning import search
    from delest.planning.request import Request

    check_batch(place)
    if is_keras(place.job, place.source.schema):
        return plan_keras(place, memory=memory, device=device, threads=threads, exact=exact, probe=probe_few, say=say)
    check_device(device)
    started = time.monotonic()
    here = machine.describe()
    budget = None if memory is None else units.read_size(memory, here.memory_limit_bytes or here.memory_bytes)
    used = threads or here.cores
    key = kept_plans.key_of(place, here, used, device or "auto", threads is None)
    probe = kept_plans.kept("job-probe", key)
    if probe is None or (probe["busy"] and time.time() - probe["made"] > BUSY_KEPT_SECONDS):
        say.stage("plan: trying the job on two rows and probing a few steps in a process of its own")
        probe = _examine(place, threads=used, device=device or "auto", fewer_threads=threads is None)
        if probe["faults"]:
            raise errors.BadInput(probe["faults"])
        probe["made"] = time.time()
        kept_plans.keep("job-probe", key, probe)
    _check_budget(budget, probe, here)
    free = machine.describe().available_bytes + machine.resident_bytes()
    asked: dict[str, Any] = {
        "probe": probe,
        "budget_bytes": free if budget is None else budget,
        "asked": budget is not None,
        "idle_bytes": _idle_bytes(place, probe),
        "threads": used,
        "isolated": place.job.origin is not None,
        "exact": exact,
        "allocator": malloc.started_with(),
    }
    request = Request(job=place.job, **asked)
    mallocs = malloc.others() if startable else ("mmap",)
    chosen = search.choose(request) or _chosen_on_traces(place, request, asked, key, mallocs, say)
    if probe_few:
        from delest.verbs.probing import by_real_steps

        chosen = by_real_steps(place, chosen, request, say)
    place.seconds["planning"] = time.monotonic() - started
    return replace(chosen, made_for=kept_plans.made_for(place, here), model=probe["model"])


def plan_as_given(place: Workplace, plan: Plan | str | Path, told: Mapping[str, Any], say: Progress) -> Plan:
    """A plan that was given, or where it was made for another job or machine, one that is made anew within its budget, and said so.

    Raises as `given_plan` and `plan_workplace` do.
    """
    from delest.hardware import machine
    from delest.records.form import read_json
    from delest.records.plan import Plan

    found = plan if isinstance(plan, Plan) else read_json(Plan, Path(plan))
    now = kept_plans.made_for(place, machine.describe())
    others = [name for name, value in found.made_for.items() if value != now.get(name)]
    if not others or any(value is not None for value in told.values()):  # which it refuses
        return given_plan(place, found, told)
    of = f" ({found.made_for['machine']}, and this is {now['machine']})" if "machine" in others else ""
    within = "" if found.memory_bytes is None else f" within its {units.format_bytes(found.memory_bytes)}"
    say.note(f"the plan was made for another {' and another '.join(others)}{of}: planning anew{within}.")
    return plan_workplace(
        place, memory=found.memory_bytes, device=None, threads=None, say=say, startable=supervision.restartable
    )


def _chosen_on_traces(
    place: Workplace, request: Request, asked: dict[str, Any], key: list[Any] | None, mallocs: Sequence[str], say: Progress
) -> Plan:
    """What is chosen in a child process over traces, with `mallocs` tried beside this process's own."""
    from delest.records.form import from_json
    from delest.records.plan import Plan

    keys = [
        None if key is None else [*key, asked["budget_bytes"], idle, asked["exact"], request.probe, list(mallocs)]
        for idle in (asked["idle_bytes"], asked["idle_bytes"] - STARTS_HIGHER_BYTES)  # a process that has planned holds more
    ]
    found = next((plan for one in keys if (plan := kept_plans.kept("job-plan", one)) is not None), None)
    if found is None:
        try:
            found = _compared_on_traces(place, asked, mallocs, say)
        except errors.NothingFits as error:
            found = {"nothing_fits": error.fields()}
        kept_plans.keep("job-plan", keys[0], found)
    if "nothing_fits" in found:
        raise errors.NothingFits.rebuilt(found["nothing_fits"])
    return from_json(Plan, found)


def _compared_on_traces(place: Workplace, asked: dict[str, Any], mallocs: Sequence[str], say: Progress) -> Any:
    """The answer of `choose_on_traces`, whose process gets ready while mallocs are probed."""
    isolated = place.job.origin is not None
    ready = processes.prepare("delest.verbs.planning:choose_on_traces", place.job, imports=_TRACING) if isolated else None
    with ready or contextlib.nullcontext() as running:
        asked = {**asked, "allocators": _probe_allocators(place, asked["probe"], asked["threads"], say, mallocs)}
        say.stage("plan: the plain step does not fit; comparing combinations of methods on traces of it")
        arguments: dict[str, Any] = {
            "preprocessing": preprocessing_json(place),
            "index": [int(row) for row in place.splits["train"][:2]],
            "request": asked,
        }
        if running is None:
            return choose_on_traces(place.job, **arguments)
        running.give(arguments)
        return running.answer()


def _idle_bytes(place: Workplace, probe: dict[str, Any]) -> int:
    """What a process holds that has opened the data and made a step, before it trains: the child's, and what this one holds beyond
    another that has opened the same, in steps, so that who asks again gets the same answer."""
    from delest.hardware import machine

    if probe["device"] != "cpu" or place.job.origin is None:  # on the device, or probed in this process
        return int(probe["idle_bytes"])
    more = machine.resident_bytes() - probe["opened_bytes"]
    return int(probe["idle_bytes"]) + max(0, more // STARTS_HIGHER_BYTES) * STARTS_HIGHER_BYTES


def _check_budget(budget: int | None, probe: dict[str, Any], here: Hardware) -> None:
    """Raise `BadInput` for a budget that this machine cannot give."""
    if budget is None:
        return
    has = probe["device_memory_bytes"] or here.memory_limit_bytes or here.memory_bytes
    if budget > has:
        whose = "this machine" if probe["device"] == "cpu" else "the GPU"
        raise errors.BadInput(
            f"--memory {units.format_bytes(budget)} is more than {whose} has ({units.format_bytes(has)}): give at most that, or a share "
            "as in 80%; to see what another machine would do, delest estimate --device NAME."
        )


def _probe_allocators(
    place: Workplace, probe: dict[str, Any], threads: int, say: Progress, names: Sequence[str]
) -> dict[str, Any]:
    """What the largest probed steps take under each of these mallocs, in a process each; none where this process has another than the
    default, or the job cannot be rebuilt in one."""
    if probe["device"] != "cpu" or place.job.origin is None or malloc.started_with() != "glibc" or not malloc.is_glibc():
        return {}
    sample = probe["samples"][-1]
    found = {}
    for name in names:
        say.stage(f"plan: the plain step does not fit; the same steps with another malloc, {name}, in a process of its own")
        try:
            found[name] = processes.call(
                "delest.footprint.probe:examine_allocator",
                place.job,
                environment=malloc.environment(name),
                preprocessing=preprocessing_json(place),
                index=[int(row) for row in place.splits["train"][: sample["rows"]]],
                threads=threads,
                plain_seconds=sample["seconds"],
            )
        except errors.ProbeFailed as error:  # a library that does not work with this build of torch is no choice
            say.note(f"{name} is left out: {error}")
    return found


def choose_on_traces(job: Any, *, preprocessing: dict[str, Any], index: list[int], request: dict[str, Any]) -> dict[str, Any]:
    """The plan as JSON for a job whose plain step does not fit; called through `delest.processes`, since tracing loads what training
    does without. A model that branches on data cannot be traced: the largest micro-batch that fits is then its plan."""
    import numpy as np
    import torch

    from delest.backends.torch.loops import JobLoop
    from delest.backends.torch.model import where
    from delest.backends.torch.session import TorchSession
    from delest.backends.torch.trace import NeedsProbe, trace_loop
    from delest.data import Feed, Preprocessing, open_job
    from delest.footprint import scratch
    from delest.hardware.roofline import measure_roofline
    from delest.planning import probed, search
    from delest.planning.request import Request
    from delest.records.form import from_json, to_json
    from delest.records.plan import Plan

    torch.set_num_threads(request["threads"])
    source = open_job(job)
    example = next(Feed(source, np.array(index), from_json(Preprocessing, preprocessing), batch_size=len(index)).ordered())

    def refusal(choices: tuple[Choice, ...]) -> str | None:
        plan = Plan(batch_size=job.batch_size, micro_batch=job.batch_size, choices=choices, threads=request["threads"])
        torch.set_num_threads(1)  # two rows are too few for more
        try:
            TorchSession(job, plan, source.schema).step(example, 1e-6)
        except errors.BadInput as error:
            return " ".join(error.faults)
        except Exception as error:  # whatever stands in a method's way in this model, the others are still compared
            return f"a step with it fails: {where(error)}"
        finally:
            torch.set_num_threads(request["threads"])
        return None

    wanted, roofline = Request(job=job, **request), measure_roofline(request["threads"])
    with scratch.soon() as takes:

        def retrace(choices: tuple[Choice, ...]) -> Trace:
            plan = Plan(batch_size=job.batch_size, micro_batch=job.batch_size, choices=choices, threads=request["threads"])
            return trace_loop(lambda mode: JobLoop(job, plan, source.schema, example), job.batch_size, scratch=takes)

        try:
            found = search.choose(wanted, lambda: (retrace, roofline, refusal))
        except NeedsProbe:
            faster, rejected = probed.faster(wanted)
            found = probed.choose(search.threaded(wanted, faster), faster, rejected)
    return to_json(found)


def _examine(place: Workplace, *, threads: int, device: str, fewer_threads: bool) -> Any:
    # Loading the framework takes seconds; this process needs it too, and does it while the child works.
    warming = threading.Thread(target=lambda: backend(place.job, place.source.schema).warm(), daemon=True)
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
        fewer_threads=fewer_threads,
    )
    if warming.ident is not None:
        warming.join()
    return probe
