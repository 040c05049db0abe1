"""The plan that was found, with its reasons: what each choice saves and costs, what else was compared, why the rest was not taken."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from delest import methods
from delest.planning.candidates import REWRITES, Candidate, Judge, keeps_of
from delest.planning.request import EXACT, Request, make_choice, notes
from delest.records.footprint import Footprint
from delest.records.plan import KEEPS, Choice, Option, Plan, Rejection
from delest.records.trace import Trace
from delest.units import format_bytes, format_seconds

SHOWN = 6  # runners-up
TELLING = 0.02  # share of memory that two points of a frontier differ by at the least


def account_for(
    found: Candidate, candidates: Sequence[Candidate], base: tuple[Choice, ...], plain: Trace, judges: Mapping[str, Judge]
) -> Plan:
    """The plan of a candidate, beside the plain step with `base` alone, whose trace is `plain`; judges by allocator, the process's first."""
    judge = next(iter(judges.values()))
    request = judge.request
    candidates = _beside(found, candidates)
    batch = request.job.batch_size
    without = Candidate(base, batch, judge.held_bytes(plain, batch), judge.seconds(plain, batch))
    choices = _explained(found, without, plain, judges)
    fitting_first = sorted(candidates, key=lambda one: one.grown_bytes > request.most_grown_bytes)
    considered = tuple(_option(one, request) for one in _distinct([found, *fitting_first])[: SHOWN + 1])
    return Plan(
        choices=choices,
        batch_size=batch,
        micro_batch=found.rows,
        memory_bytes=request.budget_bytes if request.asked else None,
        predicted=_footprint(found, request),
        plain=_footprint(without, request),
        rejected=tuple(_rejections(found, candidates, judge)),
        threads=request.threads,
        device=request.probe["device"],
        frontier=_frontier(candidates, request),
        considered=considered,
        code="\n".join(methods.named(choice.method).code(choice.config) for choice in choices),
        notes=notes(request, found.rows),
    )


def _beside(found: Candidate, candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates with seconds as a closer look at the one that was found would have them."""
    first = next((one.seconds for one in candidates if one.choices == found.choices and one.rows == found.rows), found.seconds)
    return [replace(one, seconds=one.seconds * found.seconds / first) for one in candidates]


def _explained(found: Candidate, without: Candidate, plain: Trace, judges: Mapping[str, Judge]) -> tuple[Choice, ...]:
    """The choices in the order in which they are applied, each with what it saves and costs after those before it."""
    request, trace = next(iter(judges.values())).request, plain
    judge = judges[found.allocator(request.allocator)]  # which is the first to save
    fit = f"the plain step would need up to {format_bytes(request.high_bytes(without.grown_bytes))}"
    parts = math.ceil(request.job.batch_size / found.rows)
    wanted = {choice.method: choice for choice in found.choices}
    if parts > 1:
        why = f"{fit}; {parts} parts of at most {found.rows} rows are held one after the other"
        wanted["micro_batch"] = make_choice("micro_batch", {"rows": found.rows}, request.probe, why)
    choices = [choice for choice in found.choices if choice.why]
    grown, seconds, rows = without.grown_bytes, without.seconds, without.rows
    order = ("allocator", *REWRITES, "micro_batch", "activation_checkpointing", "layered_accumulation")
    steps = [name for name in order if name in wanted]
    for name in steps:
        trace = REWRITES[name](trace, wanted[name].config) if name in REWRITES else trace
        rows = found.rows if name == "micro_batch" else rows
        last = name == steps[-1]
        after = found.grown_bytes if last else judge.held_bytes(trace, rows, found.choices)
        then = found.seconds if last else judge.seconds(trace, rows)
        why = wanted[name].why or _WHY[name].format(fit=fit, **_facts(wanted[name]))
        choices.append(replace(wanted[name], why=why, saved_bytes=int(grown - after), cost_seconds=then - seconds))
        grown, seconds = after, then
    return tuple(sorted(choices, key=lambda choice: methods.NAMES.index(choice.method)))


def _facts(choice: Choice) -> dict[str, Any]:
    config = choice.config
    found = {"blocks": len(config.get("modules", ())), "nor": ", nor with 8 bits" if config.get("bits") == 4 else ""}
    return found | {name: config.get(name) for name in ("parts", "name", "bits")}


_WHY = {
    "allocator": "{fit}; {name} holds less beside what lives than the default malloc, which keeps what is freed",
    "activation_checkpointing": "{fit}; the activations of {blocks} blocks are computed again instead of being kept",
    "chunked_loss": "{fit}; logits are made and used up in {parts} parts",
    "layered_accumulation": "{fit}; {blocks} blocks are computed again and differentiated in {parts} parts of the batch, one after the other",
    "optimizer_in_backward": "{fit}; each gradient is used and freed as soon as it is complete",
    "optimizer_state": "{fit}, and nothing that keeps the results fits{nor}; AdamW's moments take {bits} bits",
    "factored_state": "{fit}, and nothing that keeps Adam's rule fits; of its moments only means of the second's rows and columns stay",
}


def _footprint(candidate: Candidate, request: Request) -> Footprint:
    peak = request.idle_bytes + int(candidate.grown_bytes)
    margin = request.high_bytes(candidate.grown_bytes) - peak
    return Footprint(
        peak_bytes=peak,
        runtime_bytes=request.idle_bytes,
        low_bytes=max(request.idle_bytes, peak - margin),
        high_bytes=peak + margin,
        step_seconds=candidate.seconds,
        batch_size=request.job.batch_size,
        micro_batch=candidate.rows,
        device=request.probe["device"],
        allocator=candidate.allocator(request.allocator) if request.probe["device"] == "cpu" else "cuda",
        basis="estimate",
        how="trace",
        isolated=request.isolated,
    )


def _option(candidate: Candidate, request: Request) -> Option:
    names = [choice.method for choice in candidate.choices]
    return Option(
        methods=tuple(names),
        blocks=next((len(one.config["modules"]) for one in candidate.choices if "modules" in one.config), 0),
        micro_batch=candidate.rows,
        peak_bytes=request.idle_bytes + int(candidate.grown_bytes),
        step_seconds=candidate.seconds,
        fits=candidate.grown_bytes <= request.most_grown_bytes,
        keeps=max((*(choice.keeps for choice in candidate.choices), keeps_of(candidate, request)), key=KEEPS.index),
        bits=_bits(candidate),
        choices=candidate.choices,
    )


def _bits(candidate: Candidate) -> int | None:
    """Of each of the optimizer's moments, where a method says how many."""
    return next((choice.config["bits"] for choice in candidate.choices if "bits" in choice.config), None)


def _frontier(candidates: Sequence[Candidate], request: Request) -> tuple[Option, ...]:
    """What no other combination beats in both memory and time, from the least memory to the shortest step."""
    found: list[Candidate] = []
    for one in candidates:  # fastest first
        whole = request.idle_bytes + one.grown_bytes
        if not found or whole < (1 - TELLING) * (request.idle_bytes + found[-1].grown_bytes):
            found.append(one)
    return tuple(_option(one, request) for one in reversed(found))


def _distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """One of each combination of methods: the first."""
    seen: dict[tuple[Any, ...], Candidate] = {}
    for one in candidates:
        key = (tuple(choice.method for choice in one.choices), _bits(one), one.rows)
        seen.setdefault(key, one)
    return list(seen.values())


def _rejections(found: Candidate, candidates: Sequence[Candidate], judge: Judge) -> Iterator[Rejection]:
    """Of each method that was not taken the best that it could do."""
    request = judge.request
    for name in ("allocator", "activation_checkpointing", "layered_accumulation", *REWRITES, "micro_batch"):
        if found.uses(name) or (name == "micro_batch" and found.rows < request.job.batch_size):
            continue
        having = [one for one in candidates if one.uses(name) or (name == "micro_batch" and one.rows < request.job.batch_size)]
        if not having:
            yield Rejection(method=name, why=judge.refused.get(name, "").removeprefix(f"{name}: ") or _not_here(name, request))
            continue
        fitting = [one for one in having if one.grown_bytes <= request.most_grown_bytes]
        fitting.sort(key=lambda one: keeps_of(one, request) not in EXACT)
        if not fitting:
            least = min(having, key=lambda one: one.grown_bytes)
            yield Rejection(
                method=name, why=f"does not fit even with it: {format_bytes(request.high_bytes(least.grown_bytes))}"
            )
        elif name == "optimizer_state" and found.uses("factored_state"):
            yield Rejection(method=name, why="it seemed to fit, and did not when it was traced with all that goes with it")
        elif keeps_of(fitting[0], request) not in EXACT and keeps_of(found, request) in EXACT:
            yield Rejection(method=name, why="it fits only with what changes the results, and another plan fits without that")
        else:
            pace = f"{format_seconds(fitting[0].seconds)} a step against {format_seconds(found.seconds)}"
            yield Rejection(method=name, why=f"the fastest plan with it that fits is expected to take {pace}")


def _not_here(name: str, request: Request) -> str:
    """Why no combination has a method."""
    if name == "allocator":
        return f"no other than {request.allocator} was probed here"
    if name not in REWRITES or name == "chunked_loss":
        blocks = "the model has no blocks (modules that hold modules) to recompute"
        logits = "no last linear layer has outputs that are much of the peak"
        known = {"activation_checkpointing": blocks, "layered_accumulation": blocks, "chunked_loss": logits}
        return known.get(name, "the batch cannot be split further")
    reasons = methods.conflicts({name: {}}, methods.of_recipe(request.job.recipe))
    if reasons:
        return reasons[0].partition(": ")[2]
    if request.exact:
        return "it changes the results, and exact ones are asked for"
    return "it gives up more of Adam's rule than moments in few bits do, and another plan fits without that"
