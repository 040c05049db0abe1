"""Jobs whose model is Keras's: how they are told from torch jobs without loading Keras, what is planned for them, what they cannot do yet."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delest import errors, methods, processes
from delest.job import Job, takes_schema
from delest.records.plan import Choice, Plan
from delest.records.source import Schema

if TYPE_CHECKING:
    from delest.records.footprint import Footprint
    from delest.training.progress import Progress
    from delest.verbs.workplace import Workplace

WORKS = "inspect, estimate, measure, plan, train and run (--memory too), compare, shrink, report, predict, verify and load"
MAPPED_BYTES = (
    32 << 20
)  # from which on malloc gives a tensor pages of its own, which go back when it does (mallopt(3), M_MMAP_THRESHOLD)
MAPPED = Choice(method="allocator", config={"name": "mmap"}, keeps="bitwise", why="malloc gives blocks back")
RETURNED = ", as far as tensors are large enough here through steps with malloc giving blocks back"


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
    sizes = sizes_of(largest, len(place.splits["train"]))
    answers = measured(place, sizes, threads, say)
    model, kept = answers[-1]["model"], probe_of(answers)  # where malloc keeps what is given back, at these sizes
    returned: dict[str, Any] | None = None
    rows, found = " and ".join(map(str, sizes)), []
    for batch in batch_sizes:
        part = min(batch, micro_batch or batch)
        costs = Costs(kept["idle_bytes"], kept)
        footprint = costs.footprint(part, batch, costs.seconds(batch), "cpu", True)
        share = _returned_share(model["outputs_bytes_a_row"], sizes[-1], part)
        if share:
            if returned is None:
                returned = probe_of(measured(place, sizes, threads, say, choices=[MAPPED]))
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
    return from_json(Footprint, measured(place, [place.job.batch_size], threads, say, steps=steps)[0]["footprint"])


def probe_of(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `measured` found, in the form in which plans are made from it."""
    from delest.frameworks.keras import footprint

    return footprint.probe_of(answers)


def sizes_of(batch: int, available: int) -> list[int]:
    """A quarter and a half of a batch: enough to extrapolate from, too small to run out of memory first."""
    least = 2 if batch > 1 else 1
    return sorted({min(available, max(least, batch // 4)), min(available, max(least, batch // 2))})


def measured(
    place: Workplace,
    sizes: Sequence[int],
    threads: int | None,
    say: Progress,
    *,
    steps: int = 3,
    choices: Sequence[Choice] = (),
    compared: bool = False,
) -> list[dict[str, Any]]:
    """What steps on so many rows take by these choices of a plan, in a fresh process each; in the first, methods are `compared` too."""
    from delest.records.form import to_json
    from delest.verbs.workplace import preprocessing_json

    found: list[dict[str, Any]] = []
    for rows in sizes:
        if len(sizes) > 1:
            by = "".join(f" by {choice.method}" for choice in choices)
            say.stage(f"probing {steps + 1} steps on {rows} rows{by} in a process of its own")
        index = [int(row) for row in place.splits["train"][: rows * (steps + 3)]]
        arguments: dict[str, Any] = {
            "preprocessing": preprocessing_json(place),
            "index": index,
            "rows": rows,
            "threads": threads,
            "steps": steps,
            "choices": [to_json(choice) for choice in choices],
            "compared": compared and not found,
        }
        environment = methods.environment(Plan(batch_size=rows, micro_batch=rows, choices=tuple(choices)))
        function = "delest.frameworks.keras.footprint:measure_job"
        found.append(processes.call(function, place.job, timeout=3600.0, environment=environment, **arguments))
    return found
