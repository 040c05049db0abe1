"""How a Keras job would be trained within a budget: in which parts, in bf16 or not, with which malloc, each by steps that were made in processes of their own."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from delest import errors, malloc, units
from delest.records.form import from_json
from delest.records.plan import Choice, Plan
from delest.verbs import kept_plans
from delest.verbs.keras_jobs import measured, probe_of, refuse, sizes_of
from delest.verbs.workplace import Workplace

if TYPE_CHECKING:
    from delest.planning.request import Request
    from delest.records.plan import Rejection
    from delest.training.progress import Progress

AS_IT_IS = "a Keras job without a budget is trained as it is, with whole batches: nothing was estimated, and no methods were compared (plan --probe does)."
COMPARED = (
    "a Keras job fits a budget by parts of its batches, bf16 where steps gain by it, and another malloc where nothing else fits (on TensorFlow where parts "
    "can be larger): no other methods were compared."
)


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
    """The batch as it is given, or, within `memory` or with `probe`, in the fewest parts that fit and the precision that is faster, by steps on a quarter
    and a half of it; `exact` leaves out what changes the results by more than rounding.

    Raises `BadInput` for wishes that only a plan of a torch job can fulfil, `NothingFits` with the smallest budget that works.
    """
    from delest.frameworks.keras.session import unsupported
    from delest.hardware import machine
    from delest.planning import probed

    if device not in (None, "auto", "cpu"):
        refuse(place.job, place.source.schema, "--device")
    batch, lowered = place.job.batch_size, place.job.recipe.precision == "bf16"
    asked = Choice(method="precision", config={"dtype": "bf16"}, keeps="changed", why="the recipe asks for it")
    plan = Plan(batch_size=batch, micro_batch=batch, threads=threads, choices=(asked,) if lowered else (), notes=(AS_IT_IS,))
    if faults := unsupported(place.job, plan):
        raise errors.BadInput(faults)
    if memory is None and not probe:
        return replace(plan, code=_code(plan), made_for=kept_plans.made_for(place, machine.describe()))
    began, here = time.monotonic(), machine.describe()
    whole = here.memory_limit_bytes or here.memory_bytes
    budget = here.available_bytes + machine.resident_bytes() if memory is None else units.read_size(memory, whole)
    if memory is not None and budget > whole:
        raise errors.BadInput(
            f"--memory {units.format_bytes(budget)} is more than this machine has ({units.format_bytes(whole)}): give at most that, or a "
            "share as in 80%."
        )
    wanted = {"budget_bytes": budget, "asked": memory is not None, "threads": threads or here.cores, "exact": exact}
    plain = _request(place, wanted, threads, say, compared=not exact)
    faster, rejected = probed.faster(plain)
    followed = plain if not faster or lowered else _request(place, wanted, threads, say, choices=faster)
    try:
        chosen = _within(place, followed, faster, rejected, wanted, threads, say)
    except errors.NothingFits as error:
        if error.plan is not None:
            error.plan["code"] = _code(from_json(Plan, error.plan))
        raise
    notes = (*chosen.notes, COMPARED)
    place.seconds["planning"] = time.monotonic() - began
    at_first = replace(probed.plain_footprint(plain, ()), step_seconds=probed.predicted_seconds(plain, ()))
    made_for = kept_plans.made_for(place, here)
    return replace(chosen, plain=at_first, threads=threads, code=_code(chosen), notes=notes, made_for=made_for)


def _within(
    place: Workplace,
    request: Request,
    faster: Sequence[Choice],
    rejected: Sequence[Rejection],
    wanted: Mapping[str, Any],
    threads: int | None,
    say: Progress,
) -> Plan:
    """The plan with the malloc that there is; where nothing fits so, and on TensorFlow where whole batches do not, with one that gives blocks back if larger parts fit then."""
    from delest.frameworks.keras.engines import scatters_freed_blocks
    from delest.planning import probed
    from delest.planning.request import make_choice

    found: list[Plan | errors.NothingFits] = []

    def choose(asked: Request, choices: Sequence[Choice]) -> None:
        try:
            found.append(probed.choose(asked, choices, rejected))
        except errors.NothingFits as error:
            found.append(error)

    choose(request, faster)
    first = found[0]
    parts = isinstance(first, Plan) and first.micro_batch < first.batch_size
    other = isinstance(first, errors.NothingFits) or (parts and scatters_freed_blocks())
    if other and malloc.started_with() == "glibc" and malloc.is_glibc() and place.job.origin is not None:
        what = "whole batches do not fit" if parts else "nothing fits"
        why = f"{what} {units.format_bytes(request.budget_bytes)} with malloc as it comes"
        say.note(f"{why}: steps once more with one that gives blocks back")
        choices = [make_choice("allocator", {"name": "mmap"}, request.probe, why), *faster]
        try:
            choose(_request(place, wanted, threads, say, choices=choices), choices)
        except errors.DelestError as error:
            if not parts:
                raise
            say.note(f"steps with the other malloc failed: {error}")
    plans = [one for one in found if isinstance(one, Plan)]
    if plans:
        return max(plans, key=lambda one: one.micro_batch)
    raise min((one for one in found if isinstance(one, errors.NothingFits)), key=lambda one: one.smallest_bytes or 0) from None


def _request(
    place: Workplace,
    wanted: Mapping[str, Any],
    threads: int | None,
    say: Progress,
    *,
    choices: Sequence[Choice] = (),
    compared: bool = False,
) -> Request:
    """What is asked of the planner, with steps that were made by these choices; their effect is then in what was measured."""
    from delest.hardware import machine
    from delest.planning.request import Request

    sizes = sizes_of(place.job.batch_size, len(place.splits["train"]))
    found = probe_of(measured(place, sizes, threads, say, choices=choices, compared=compared))
    idle = found["idle_bytes"] + max(0, machine.resident_bytes() - found["opened_bytes"])
    return Request(
        job=place.job, probe=found, idle_bytes=idle, isolated=place.job.origin is not None, recomputes=False, **wanted
    )


def _code(plan: Plan) -> str:
    """What a plan does, for a script with `model.fit`."""
    from delest.methods import allocator

    parts = -(-plan.batch_size // plan.micro_batch)
    lines = {
        "allocator": lambda config: allocator.code(config),
        "precision": lambda config: 'keras.config.set_dtype_policy("mixed_bfloat16")  # before the model is built',
        "micro_batch": lambda config: (
            f"optimizer = keras.optimizers.AdamW(..., gradient_accumulation_steps={parts})\n"
            f"model.fit(..., batch_size={plan.micro_batch})"
        ),
    }
    return "\n".join(lines[choice.method](choice.config) for choice in plan.choices)
