"""Jobs whose model is Keras's: how they are told from torch jobs without loading Keras, what is planned for them, what they cannot do yet."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delest import errors, malloc, processes, units
from delest.job import Job, takes_schema
from delest.records.plan import Plan
from delest.records.source import Schema

if TYPE_CHECKING:
    from delest.records.footprint import Footprint
    from delest.training.progress import Progress
    from delest.verbs.workplace import Workplace

WORKS = "inspect, estimate, measure, plan, train and run (--memory too), compare, shrink, report, predict, verify and load"
AS_IT_IS = (
    "a Keras job without a budget is trained as it is, with whole batches: nothing was estimated, and no methods were compared."
)
MAPPED_BYTES = (
    32 << 20
)  # from which on malloc gives a tensor pages of its own, which go back when it does (mallopt(3), M_MMAP_THRESHOLD)
RETURNED = ", as far as tensors are large enough here through steps with malloc giving blocks back"
NO_METHODS = "a Keras job fits a budget by parts of its batches alone: no other methods were compared."


def is_keras(job: Job, schema: Schema) -> bool:
    """Whether a job's model is Keras's: a `.keras` file, a subclass of `keras.Model`, or a factory of one.

    A torch job's file has not imported Keras, and is known by that. Where both frameworks are loaded the factory is asked, once.
    Raises `MissingExtra` for a `.keras` file where there is no Keras.
    """
    if isinstance(job.model, (str, Path)):
        if importlib.util.find_spec("keras") is None:
            raise errors.MissingExtra(f"{job.model} needs Keras, which is not installed: pip install 'delest[keras]'.")
        return True
    keras: Any = sys.modules.get("keras")
    if keras is None or job.model is None:
        return False
    if isinstance(job.model, type):
        return issubclass(job.model, keras.Model)
    if "torch" not in sys.modules:
        return True
    if id(job.model) not in _asked:
        _asked[id(job.model)] = job.model, _makes_keras(job.model, schema)
    return _asked[id(job.model)][1]


_asked: dict[int, tuple[Callable[..., Any], bool]] = {}  # by identity: what can be called need not be hashable


def _makes_keras(factory: Callable[..., Any], schema: Schema) -> bool:
    from delest.frameworks.keras.building import KerasSchema

    keras: Any = sys.modules["keras"]
    try:
        seen = KerasSchema(inputs=schema.inputs, target=schema.target)
        return isinstance(factory(seen) if takes_schema(factory) else factory(), keras.Model)
    except Exception:  # said again, in words, by the session that builds it
        return False


def refuse(job: Job, schema: Schema, what: str) -> None:
    """Raise `BadInput` where a job is Keras's and `what` is for torch jobs alone."""
    if is_keras(job, schema):
        raise errors.BadInput(f"{what} does not work with a Keras job yet. What does: {WORKS}.")


def plan_keras(
    place: Workplace,
    *,
    memory: str | int | None,
    device: str | None,
    threads: int | None,
    exact: bool,
    probe: bool,
    say: Progress,
) -> Plan:
    """The batch as it is given, or within `memory` in the fewest parts that fit, by steps on a quarter and a half of it.

    Raises `BadInput` for wishes that only a plan of a torch job can fulfil, `NothingFits` with the smallest budget that works.
    """
    from delest.frameworks.keras.session import unsupported
    from delest.hardware import machine

    wishes = {"--exact": exact, "--probe": probe, "--device": device not in (None, "auto", "cpu")}
    asked = [name for name, given in wishes.items() if given]
    if asked:
        refuse(place.job, place.source.schema, f"{', '.join(asked)} (methods of torch jobs)")
    batch = place.job.batch_size
    plan = Plan(batch_size=batch, micro_batch=batch, threads=threads, notes=(AS_IT_IS,))
    if faults := unsupported(place.job, plan):
        raise errors.BadInput(faults)
    if memory is None:
        return plan
    from delest.planning import probed
    from delest.planning.request import Request

    here = machine.describe()
    whole = here.memory_limit_bytes or here.memory_bytes
    budget = units.read_size(memory, whole)
    if budget > whole:
        raise errors.BadInput(
            f"--memory {units.format_bytes(budget)} is more than this machine has ({units.format_bytes(whole)}): give at most that, or a "
            "share as in 80%."
        )
    examined = _examined(place, batch, threads, say)
    idle = examined["idle_bytes"] + max(0, machine.resident_bytes() - examined["opened_bytes"])
    request = Request(
        job=place.job,
        probe=examined,
        budget_bytes=budget,
        asked=True,
        idle_bytes=idle,
        threads=threads or here.cores,
        isolated=place.job.origin is not None,
    )
    chosen = probed.choose(request, (), ())
    return replace(chosen, threads=threads, code="", notes=(*chosen.notes, NO_METHODS))


def sweep_keras(
    place: Workplace,
    batch_sizes: Sequence[int],
    micro_batch: int | None,
    *,
    device: str | None,
    allocator: str | None,
    threads: int | None,
    say: Progress,
) -> tuple[Footprint, ...]:
    """`estimate` for a Keras job: from steps on a quarter and a half of the largest batch, in a process each."""
    if device not in (None, "auto", "cpu") or allocator not in (None, "glibc"):
        refuse(place.job, place.source.schema, "--device and --allocator (by a trace of the step)")
    if place.job.origin is None:
        raise errors.BadInput("a Keras job given as Python objects cannot be probed in another process: put it in a file.")
    from delest.frameworks.keras.footprint import broken_down
    from delest.planning.probed import Costs

    largest = max(min(batch, micro_batch or batch) for batch in batch_sizes)
    sizes = _sizes(largest, len(place.splits["train"]))
    answers = _measured(place, sizes, threads, say)
    model, kept = answers[-1]["model"], _probe_of(answers)  # where malloc keeps what is given back, at these sizes
    returned: dict[str, Any] | None = None
    rows, found = " and ".join(map(str, sizes)), []
    for batch in batch_sizes:
        part = min(batch, micro_batch or batch)
        costs = Costs(kept["idle_bytes"], kept)
        footprint = costs.footprint(part, batch, costs.seconds(batch), "cpu", True)
        share = _returned_share(model["outputs_bytes_a_row"], sizes[-1], part)
        if share:
            if returned is None:
                returned = _probe_of(_measured(place, sizes, threads, say, environment=malloc.environment("mmap")))
            other = Costs(returned["idle_bytes"], returned).footprint(part, batch, 0.0, "cpu", True)
            footprint = _between(footprint, other, share)
        parts = broken_down(model, part, footprint.runtime_bytes, footprint.peak_bytes)
        notes = (f"by real steps on {rows} rows, in a process each, and the line through them{RETURNED if share else ''}.",)
        found.append(replace(footprint, breakdown=parts, notes=notes))
    return tuple(found)


def _returned_share(outputs: Sequence[float], probed: int, rows: int) -> float:
    """Of what layers give, by bytes: in tensors whose memory goes back to the system at so many rows, and did not where it was probed."""
    crossing = sum(size for size in outputs if size * probed < MAPPED_BYTES <= size * rows)
    return crossing / max(1.0, sum(outputs))


def _between(one: Footprint, other: Footprint, share: float) -> Footprint:
    """A footprint so far from the first to the second."""

    def mixed(a: int, b: int) -> int:
        return int(a + share * (b - a))

    return replace(
        one,
        peak_bytes=mixed(one.peak_bytes, other.peak_bytes),
        low_bytes=mixed(one.low_bytes, other.low_bytes),
        high_bytes=mixed(one.high_bytes, other.high_bytes),
        phases={name: mixed(size, other.phases[name]) for name, size in one.phases.items()},
    )


def measure_keras(
    place: Workplace, *, steps: int, threads: int | None, device: str | None, allocator: str | None, say: Progress
) -> Footprint:
    """`measure` for a Keras job: real steps on whole batches in a process of its own."""
    from delest.records.footprint import Footprint
    from delest.records.form import from_json

    if device not in (None, "auto", "cpu") or allocator not in (None, "glibc"):
        refuse(place.job, place.source.schema, "--device and --allocator")
    say.stage(f"measure: {steps} real steps in a process of its own")
    return from_json(Footprint, _measured(place, [place.job.batch_size], threads, say, steps=steps)[0]["footprint"])


def _examined(place: Workplace, batch: int, threads: int | None, say: Progress) -> dict[str, Any]:
    return _probe_of(_measured(place, _sizes(batch, len(place.splits["train"])), threads, say))


def _probe_of(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    from delest.frameworks.keras.footprint import probe_of

    return probe_of(answers)


def _sizes(batch: int, available: int) -> list[int]:
    """A quarter and a half of a batch: enough to extrapolate from, too small to run out of memory first."""
    least = 2 if batch > 1 else 1
    return sorted({min(available, max(least, batch // 4)), min(available, max(least, batch // 2))})


def _measured(
    place: Workplace,
    sizes: Sequence[int],
    threads: int | None,
    say: Progress,
    *,
    steps: int = 3,
    environment: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """What steps on so many rows take, in a fresh process each."""
    from delest.verbs.workplace import preprocessing_json

    found = []
    for rows in sizes:
        if len(sizes) > 1:
            say.stage(f"probing {steps + 1} steps on {rows} rows in a process of its own")
        index = [int(row) for row in place.splits["train"][: rows * (steps + 3)]]
        arguments: dict[str, Any] = {
            "preprocessing": preprocessing_json(place),
            "index": index,
            "rows": rows,
            "threads": threads,
            "steps": steps,
        }
        function = "delest.frameworks.keras.footprint:measure_job"
        found.append(processes.call(function, place.job, timeout=3600.0, environment=dict(environment or {}), **arguments))
    return found
