"""The few best plans by real steps: each in a process of its own, the fastest that keeps the budget is taken."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from delest import errors, methods, processes
from delest.planning.request import EXACT, MARGIN_BYTES, Request, make_choice
from delest.records.footprint import Footprint
from delest.records.form import to_json
from delest.records.plan import KEEPS, Option, Plan, Rejection
from delest.units import format_seconds
from delest.verbs.workplace import Workplace, preprocessing_json

if TYPE_CHECKING:
    from delest.training.progress import Progress

OTHERS = 2  # that are measured beside the chosen one
FASTEST = "the fastest of those that real steps were made with"


def by_real_steps(place: Workplace, chosen: Plan, request: Request, say: Progress) -> Plan:
    """The plan, or one of the fastest others that are expected to fit and change no more of the results, whichever was fastest among those
    that kept the budget; `considered` has what was measured.

    A plan whose steps fail, as where memory ran out, counts as one that does not keep it. Where none keeps it the plan stays, and a note says so.
    """
    most = request.budget_bytes - request.idle_bytes - MARGIN_BYTES
    measured: list[tuple[Plan, Option]] = []
    for plan, option in itertools.chain([(chosen, _own_option(chosen))], _others(chosen, request)):
        say.stage(
            "plan: real steps with it in a process of its own" if not measured else "plan: real steps with another that fits"
        )
        try:
            sample = _measure(place, plan)
        except errors.ProbeFailed as error:
            say.note(f"real steps failed, so it is left out ({', '.join(option.methods) or 'no method'}): {error}")
            continue
        grown = max(sample[phase] for phase in ("first", "steady", "evaluation"))
        seen = replace(
            option, measured_bytes=request.idle_bytes + grown, measured_seconds=sample["seconds"], fits=grown <= most
        )
        measured.append((plan, seen))
    fitting = [(plan, option) for plan, option in measured if option.fits]
    if not fitting:
        note = "with real steps neither this plan nor another that was tried kept the budget with its margin: the guard will take smaller parts."
        return replace(chosen, considered=_beside(chosen, [option for _, option in measured]), notes=(*chosen.notes, note))
    best, option = min(fitting, key=lambda pair: pair[1].measured_seconds or 0.0)
    options = [option, *(one for _, one in measured if one is not option)]
    return replace(
        best,
        predicted=_footprint(best, option, request),
        rejected=tuple(_rejections(chosen, best, options)),
        considered=_beside(chosen, options),
    )


def _others(chosen: Plan, request: Request) -> Iterator[tuple[Plan, Option]]:
    allowed = {*EXACT, *KEEPS[: KEEPS.index(_own_option(chosen).keeps) + 1]}
    suitable = [one for one in chosen.considered[1:] if one.fits and one.keeps in allowed]
    for option in suitable[:OTHERS]:
        choices = [replace(one, why=one.why or FASTEST) for one in option.choices]
        if option.micro_batch < chosen.batch_size:
            choices.append(make_choice("micro_batch", {"rows": option.micro_batch}, request.probe, FASTEST))
        choices.sort(key=lambda one: methods.NAMES.index(one.method))
        code = "\n".join(methods.named(one.method).code(one.config) for one in choices)
        yield replace(chosen, choices=tuple(choices), micro_batch=option.micro_batch, code=code), option


def _own_option(plan: Plan) -> Option:
    """A plan as one of those that were compared; one from a probe's figures alone was compared with none."""
    if plan.considered:
        return plan.considered[0]
    assert plan.predicted is not None
    choices = tuple(one for one in plan.choices if one.method != "micro_batch")
    return Option(
        methods=tuple(one.method for one in choices),
        blocks=0,
        micro_batch=plan.micro_batch,
        peak_bytes=plan.predicted.peak_bytes,
        step_seconds=plan.predicted.step_seconds or 0.0,
        fits=True,
        keeps=max((one.keeps for one in plan.choices), key=KEEPS.index, default="bitwise"),
        choices=choices,
    )


def _measure(place: Workplace, plan: Plan) -> dict[str, Any]:
    found: dict[str, Any] = processes.call(
        "delest.footprint.probe:examine_plan",
        place.job,
        environment=methods.environment(plan),
        plan=to_json(plan),
        preprocessing=preprocessing_json(place),
        index=[int(row) for row in place.splits["train"][: plan.batch_size]],
    )
    return found


def _beside(chosen: Plan, options: list[Option]) -> tuple[Option, ...]:
    """Those that were measured, then the others that were compared."""
    known = {(one.methods, one.micro_batch, one.bits) for one in options}
    return (*options, *(one for one in chosen.considered if (one.methods, one.micro_batch, one.bits) not in known))


def _footprint(plan: Plan, option: Option, request: Request) -> Footprint:
    """What was measured, with the margin by which another process may differ."""
    assert plan.predicted is not None
    assert option.measured_bytes is not None
    return replace(
        plan.predicted,
        peak_bytes=option.measured_bytes,
        low_bytes=max(request.idle_bytes, option.measured_bytes - MARGIN_BYTES),
        high_bytes=option.measured_bytes + MARGIN_BYTES,
        phases={},
        step_seconds=option.measured_seconds,
        micro_batch=plan.micro_batch,
        basis="measurement",
        how="probe",
    )


def _rejections(chosen: Plan, best: Plan, options: list[Option]) -> Iterator[Rejection]:
    """The reasons of before for what is not in the plan, and what was measured for what was to be."""
    taken = {one.method for one in best.choices}
    yield from (one for one in chosen.rejected if one.method not in taken)
    before = next((one for one in options[1:] if one.methods == _own_option(chosen).methods), None)
    for name in [one.method for one in chosen.choices if one.method not in taken]:
        pace = "" if before is None else f": {format_seconds(before.measured_seconds or 0.0)} a step"
        yield Rejection(
            method=name,
            why=f"real steps with another plan were faster{pace} against {format_seconds(options[0].measured_seconds or 0.0)}",
        )
