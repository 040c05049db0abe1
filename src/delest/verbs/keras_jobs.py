"""Jobs whose model is Keras's: how they are told from torch jobs without loading Keras, what is planned for them, what they cannot do yet."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delest import errors
from delest.job import Job, takes_schema
from delest.records.plan import Plan
from delest.records.source import Schema

if TYPE_CHECKING:
    from delest.verbs.workplace import Workplace

WORKS = "inspect, plan (without a budget), train, run, shrink --time 0, report, predict and verify"


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
    place: Workplace, *, memory: str | int | None, device: str | None, threads: int | None, exact: bool, probe: bool
) -> Plan:
    """The batch as it is given, and no estimate. Raises `BadInput` for wishes that only a plan of torch jobs can fulfil."""
    from delest.frameworks.keras.session import unsupported

    wishes = {
        "--memory": memory is not None,
        "--exact": exact,
        "--probe": probe,
        "--device": device not in (None, "auto", "cpu"),
    }
    asked = [name for name, given in wishes.items() if given]
    if asked:
        refuse(place.job, place.source.schema, f"{', '.join(asked)} (a plan by what steps take)")
    plan = Plan(
        batch_size=place.job.batch_size,
        micro_batch=place.job.batch_size,
        threads=threads,
        notes=(
            "a Keras job is trained as it is, with whole batches: no memory and no time were estimated, and no methods were compared.",
        ),
    )
    if faults := unsupported(place.job, plan):
        raise errors.BadInput(faults)
    return plan
