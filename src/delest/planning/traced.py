"""The fastest plan for a budget that the plain step does not fit: combinations of methods, compared on traces.

Every combination is first judged by arithmetic on one trace of the plain step; the fastest that seem to fit are traced again with their
methods applied, and the fastest of those that do fit is taken. What a trace leaves out (the allocator's own, libraries' buffers, this
machine's speed) comes from real steps that were probed: its bytes and seconds are scaled by what the probe took more.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from delest import errors, methods
from delest.planning.account import account_for
from delest.planning.candidates import SMALLER_STATES, Candidate, Judge, all_candidates, configs_of, keeps_of
from delest.planning.parts import PARTS
from delest.planning.request import EXACT, SLACK_BYTES, Request, make_choice
from delest.records.form import to_json
from delest.records.hardware import Roofline
from delest.records.plan import Choice, Plan
from delest.records.trace import Trace
from delest.units import format_bytes, format_seconds

Retrace = Callable[[tuple[Choice, ...]], Trace]  # the job's step with these methods applied
Judges = Mapping[str, Judge]  # by allocator; first that of the process which was probed
Refusal = Callable[[tuple[Choice, ...]], str | None]  # why a real step with these methods is refused

LOOKED_AT = 4  # of the combinations that seem to fit, once one does,
LOOKING_SECONDS = 10.0  # and for how long
FAR = 1.5  # times what a budget leaves: what is thought to take more than that is not looked at
WORTH = 0.98  # of the time of the fastest that was found: what gains less is not looked at, as that takes seconds


def choose(
    request: Request,
    base: tuple[Choice, ...],
    retrace: Retrace,
    roofline: Roofline,
    refusal: Refusal | None = None,
) -> Plan:
    """The fastest plan that fits; `base` are the choices that were made before, as a probe saw them gain.

    Methods that change the results enter only where nothing else fits, and never where `request.exact`: first 8-bit moments, then each of
    `SMALLER_STATES`.
    Raises `NothingFits` with the smallest budget that works and what it takes to keep it.
    """
    retrace = _once(retrace)
    plain = retrace(base)
    judges = {name: Judge(plain, request, roofline, name) for name in (request.allocator, *request.allocators)}
    refused = _refused(plain, base, judges[request.allocator], refusal or _by_trace(retrace))
    for judge in judges.values():
        judge.refused = refused
    groups: list[list[Candidate]] = []
    candidates: list[Candidate] = []
    for group, candidates in _groups(plain, base, judges):
        groups.append(group)
        if (found := _fastest(group, judges, retrace)) is not None:
            return account_for(found, candidates, base, plain, judges)
    least = _closely(min(candidates, key=lambda one: one.grown_bytes), judges, retrace)
    smallest = request.high_bytes(least.grown_bytes) + SLACK_BYTES
    for judge in judges.values():
        judge.request = replace(judge.request, budget_bytes=smallest)
    best = next((one for group in groups if (one := _fastest(group, judges, retrace)) is not None), least)
    raise _nothing(best, request, account_for(best, candidates, base, plain, judges), smallest)


def _groups(plain: Trace, base: tuple[Choice, ...], judges: Judges) -> Iterator[tuple[list[Candidate], list[Candidate]]]:
    """Candidates in groups, the preferred first, each with all that are compared by then; smaller states are enumerated when they are asked for."""
    request, candidates = _request(judges), _candidates(plain, base, judges, None)
    kept = [one for one in candidates if keeps_of(one, request) in EXACT]
    yield kept, kept if request.exact else candidates
    if request.exact:
        return
    yield [one for one in candidates if keeps_of(one, request) not in EXACT], candidates
    for state in SMALLER_STATES:
        group = _candidates(plain, base, judges, state)
        candidates = sorted([*candidates, *group], key=lambda one: one.seconds)
        yield group, candidates


def _candidates(
    plain: Trace, base: tuple[Choice, ...], judges: Judges, state: Mapping[str, dict[str, Any]] | None
) -> list[Candidate]:
    """Combinations under each allocator, fastest first."""
    found = [one for judge in judges.values() for one in all_candidates(plain, (*_allocator(judge), *base), judge, state)]
    return sorted(found, key=lambda one: one.seconds)


def _allocator(judge: Judge) -> tuple[Choice, ...]:
    """The choice of a judge's allocator where it is another than the process's own."""
    request = judge.request
    if judge.allocator == request.allocator:
        return ()
    return (make_choice("allocator", {"name": judge.allocator}, request.probe, ""),)


def _refused(plain: Trace, base: tuple[Choice, ...], judge: Judge, refusal: Refusal) -> dict[str, str]:
    """Methods that not every model takes, tried: their reasons by name where this one does not."""
    request = judge.request
    blocks = [block.name for block in judge.blocks(plain, request.job.batch_size)]
    tried = {"layered_accumulation": {"modules": blocks, "parts": PARTS[0]}} if blocks else {}
    tried |= {name: config for name, config in configs_of(plain, judge).items() if name == "chunked_loss"}
    choices = {name: make_choice(name, config, request.probe, "") for name, config in tried.items()}
    if len(choices) > 1 and refusal((*base, *choices.values())) is None:  # most models take all of them, in one step
        return {}
    reasons = {name: refusal((*base, choice)) for name, choice in choices.items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _by_trace(retrace: Retrace) -> Refusal:
    def refusal(choices: tuple[Choice, ...]) -> str | None:
        try:
            retrace(choices)
        except errors.BadInput as error:
            return error.faults[0]
        return None

    return refusal


def _once(retrace: Retrace) -> Retrace:
    """Each combination of choices is traced once, whatever it does before a process starts."""
    traces: dict[str, Trace] = {}

    def trace(choices: tuple[Choice, ...]) -> Trace:
        choices = tuple(choice for choice in choices if methods.named(choice.method).STAGE != "process")
        key = repr([(choice.method, choice.config) for choice in choices])
        if key not in traces:
            traces[key] = retrace(choices)
        return traces[key]

    return trace


def _fastest(group: Sequence[Candidate], judges: Judges, retrace: Retrace) -> Candidate | None:
    """Of the candidates that seem to fit, fastest first, some looked at closely; the fastest that still fits."""
    request, started = _request(judges), time.monotonic()
    most, best, close = request.most_grown_bytes, None, 0
    more = dict.fromkeys(judges, 1.0)  # by allocator: what those that were looked at took beyond what was thought
    longer: dict[tuple[str, ...], float] = {}  # by methods: how many times as long as was thought
    for candidate in group:
        name, kind = candidate.allocator(request.allocator), tuple(choice.method for choice in candidate.choices)
        seconds = longer.get(kind, 1.0) * candidate.seconds
        if more[name] * candidate.grown_bytes > most or (best is not None and seconds >= WORTH * best.seconds):
            continue
        if best is not None and (close >= LOOKED_AT or time.monotonic() - started > LOOKING_SECONDS):
            break
        checked, close = _closely(candidate, judges, retrace), close + 1
        longer[kind] = checked.seconds / candidate.seconds
        if checked.grown_bytes > most:
            more[name] = max(more[name], checked.grown_bytes / candidate.grown_bytes)
        elif best is None or checked.seconds < best.seconds:
            best = checked
    if best is None and group:  # what others took beyond what was thought need not hold for the smallest
        least = min(group, key=lambda one: one.grown_bytes)
        if least.grown_bytes <= FAR * most:
            least = _closely(least, judges, retrace)
            best = least if least.grown_bytes <= most else None
    return best


def _closely(candidate: Candidate, judges: Judges, retrace: Retrace) -> Candidate:
    """A candidate as a trace of its own has it, with its methods applied, and as the allocator would hold it."""
    trace, judge = retrace(candidate.choices), judges[candidate.allocator(_request(judges).allocator)]
    grown = judge.held_bytes(trace, candidate.rows, candidate.choices)
    seconds = judge.seconds(trace, candidate.rows)
    return replace(candidate, grown_bytes=grown, seconds=seconds)


def _request(judges: Judges) -> Request:
    return next(iter(judges.values())).request


def _nothing(least: Candidate, request: Request, plan: Plan, smallest: int) -> errors.NothingFits:
    words = ", ".join(choice.method for choice in least.choices) or "no other method"
    return errors.NothingFits(
        f"nothing fits {format_bytes(request.budget_bytes)}: the least that was found is up to {format_bytes(smallest)}, of which the "
        f"libraries alone take {format_bytes(request.idle_bytes)} ({least.rows} row{'s' * (least.rows > 1)} at a time, {words}; "
        f"{format_seconds(least.seconds)} a step). The smallest budget that works is --memory {math.ceil(smallest / 2**20)}MiB.",
        smallest,
        to_json(plan),
    )
