"""The fastest plan for a budget that the plain step does not fit: combinations of methods, compared on traces.

Every combination is first judged by arithmetic on one trace of the plain step; the fastest that seem to fit are traced again with their
methods applied, and the fastest of those that do fit is taken. What a trace leaves out (the allocator's own, libraries' buffers, this
machine's speed) comes from real steps that were probed: its bytes and seconds are scaled by what the probe took more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from delest import errors, methods
from delest.footprint import heap
from delest.footprint.composition import Lives
from delest.footprint.time import StepTime, operator_seconds, scale, step_time
from delest.planning.blocks import Block, choose_blocks, find_blocks
from delest.planning.request import EXACT, SLACK_BYTES, Request, make_choice
from delest.records.footprint import Footprint
from delest.records.hardware import Roofline
from delest.records.plan import Choice, Option, Plan, Rejection
from delest.records.trace import Trace
from delest.units import format_bytes, format_seconds

Retrace = Callable[[tuple[Choice, ...]], Trace]  # the job's step with these methods applied

ALLOCATOR = "exact"  # live tensors alone: the probe says what a process holds beyond them
LOOKED_AT = 4  # of the combinations that seem to fit, once one does
TELLING = 0.02  # share of memory that two points of a frontier differ by at the least
# Of fp32 moments, in 8 bits with a scale for each 256 of them.
STATE_SHARE = 0.26


@dataclass(frozen=True)
class Candidate:
    """A combination of methods at a number of rows, with what it would take."""

    choices: tuple[Choice, ...]  # without micro_batch
    rows: int
    grown_bytes: float  # above the idle process, at the peak
    seconds: float  # a step on the whole batch

    def uses(self, method: str) -> bool:
        return any(choice.method == method for choice in self.choices)


class Judge:
    """Bytes and seconds of a trace, scaled by what real steps took."""

    def __init__(self, plain: Trace, request: Request, roofline: Roofline):
        self.request, self.roofline = request, roofline
        sample = request.probe["samples"][-1]
        rows = sample["rows"]
        grown = max(sample[phase] for phase in ("first", "steady", "evaluation"))
        self.ratio = max(1.0, grown / max(1, self._live(plain, rows, rows)))
        self._heap_ratio = max(1.0, grown / max(1, self._held(plain, rows, rows)))
        self._probe_seconds: float = sample["seconds"]
        self._probe_time = self._time(plain, rows, 1)

    def bytes(self, trace: Trace, rows: int) -> float:
        """Above the idle process, at the peak of a step on the whole batch in parts of `rows`."""
        return self.ratio * self._live(trace, rows, self.request.job.batch_size)

    def held_bytes(self, trace: Trace, rows: int) -> float:
        """The same with the allocator's own share as its replay has it: smaller blocks than the probe's wait in its heap for reuse."""
        held = self._heap_ratio * self._held(trace, rows, self.request.job.batch_size)
        return max(held, self.bytes(trace, rows))

    def seconds(self, trace: Trace, rows: int) -> float:
        """Of a step on the whole batch in parts of `rows`."""
        return scale(
            self._probe_seconds, self._probe_time, self._time(trace, rows, math.ceil(self.request.job.batch_size / rows))
        )

    def recomputing(self, blocks: Sequence[Block], names: Sequence[str], parts: int) -> float:
        """Seconds that recomputing these blocks adds to a step."""
        factor = self._probe_seconds / self._probe_time.seconds
        return factor * parts * sum(block.seconds for block in blocks if block.name in names)

    def blocks(self, trace: Trace, rows: int) -> list[Block]:
        """The trace's blocks with bytes as this process would hold them; seconds as the roofline has them."""
        seconds = operator_seconds(trace, self.roofline, rows=rows, allocator=ALLOCATOR)
        return [replace(block, saved_bytes=int(self.ratio * block.saved_bytes)) for block in find_blocks(trace, seconds, rows)]

    def _time(self, trace: Trace, rows: int, parts: int) -> StepTime:
        return step_time(trace, self.roofline, rows=rows, parts=parts, allocator=ALLOCATOR)

    def _live(self, trace: Trace, rows: int, batch: int) -> int:
        return max(Lives(trace, rows=rows, evaluation_rows=rows, split=rows < batch).totals())

    def _held(self, trace: Trace, rows: int, batch: int) -> int:
        if not heap.is_here():
            return self._live(trace, rows, batch)
        return max(heap.hold(Lives(trace, rows=rows, evaluation_rows=rows, split=rows < batch, resident=True))[1])


def choose(request: Request, base: tuple[Choice, ...], retrace: Retrace, roofline: Roofline) -> Plan:
    """The fastest plan that fits; `base` are the choices that were made before, as a probe saw them gain.

    Methods that change the results enter only where nothing else fits, and never where `request.exact`.
    Raises `NothingFits` with the smallest budget that works and the plan for it.
    """
    retrace = _once(retrace)
    plain = retrace(base)
    judge = Judge(plain, request, roofline)
    candidates = _candidates(plain, base, judge)
    kept = [one for one in candidates if _keeps(one, request) in EXACT]
    candidates = kept if request.exact else candidates
    for group in (kept, [one for one in candidates if _keeps(one, request) not in EXACT]):
        if (found := _fastest(group, judge, retrace)) is not None:
            return _plan(found, candidates, base, plain, judge)
    raise _nothing(candidates, judge, retrace)


def _once(retrace: Retrace) -> Retrace:
    """Each combination of choices is traced once."""
    traces: dict[str, Trace] = {}

    def trace(choices: tuple[Choice, ...]) -> Trace:
        key = repr([(choice.method, choice.config) for choice in choices])
        if key not in traces:
            traces[key] = retrace(choices)
        return traces[key]

    return trace


def _candidates(plain: Trace, base: tuple[Choice, ...], judge: Judge) -> list[Candidate]:
    """Every combination at every number of parts, with as few blocks recomputed as the budget asks for, and with all of them."""
    request, found = judge.request, []
    for configs in _combinations(request):
        trace = plain
        for name in configs:
            trace = _REWRITES[name](trace)
        chosen = (*base, *(make_choice(name, config, request.probe, "") for name, config in configs.items()))
        whole = bool(methods.conflicts({**configs, "micro_batch": {"rows": 1}}))
        for parts in [1] if whole else _part_counts(request):
            rows = math.ceil(request.job.batch_size / parts)
            grown, seconds = judge.bytes(trace, rows), judge.seconds(trace, rows)
            found.append(Candidate(chosen, rows, grown, seconds))
            blocks = judge.blocks(trace, rows)
            wanted = {choose_blocks(blocks, grown - request.most_grown_bytes), tuple(block.name for block in blocks)}
            for recomputed in sorted(names for names in wanted if names):
                saved = [block.saved_bytes for block in blocks if block.name in recomputed]
                found.append(
                    Candidate(
                        (*chosen, _checkpoints(recomputed, request.probe)),
                        rows,
                        grown - (sum(saved) - max(saved)),
                        seconds + judge.recomputing(blocks, recomputed, parts),
                    )
                )
    return sorted(found, key=lambda one: one.seconds)


def _combinations(request: Request) -> Iterator[dict[str, dict[str, Any]]]:
    """Methods that go together with each other and with the recipe, with their configurations; first none."""
    recipe = methods.of_recipe(request.job.recipe)
    for count in range(len(_CONFIGS) + 1):
        for names in itertools.combinations(_CONFIGS, count):
            configs = {name: _CONFIGS[name] for name in names}
            if not methods.conflicts(configs, recipe):
                yield configs


def _part_counts(request: Request) -> list[int]:
    """1 to 8, then in steps of a half or a third, up to the fewest rows that a part may have."""
    most = max(1, request.job.batch_size // request.least_rows)
    return sorted(
        {count for k in range(12) for count in (2**k, 3 * 2**k) if count <= most} | {min(most, n) for n in (5, 7)} | {most}
    )


def _fastest(group: Sequence[Candidate], judge: Judge, retrace: Retrace) -> Candidate | None:
    """Of the candidates that seem to fit, fastest first, some looked at closely; the fastest that still fits."""
    most, best, close = judge.request.most_grown_bytes, None, 0
    more = 1.0  # what those that were looked at took beyond what was thought
    for candidate in group:
        if more * candidate.grown_bytes > most or (best is not None and candidate.seconds >= best.seconds):
            continue
        if best is not None and close >= LOOKED_AT:
            break
        checked, close = _closely(candidate, judge, retrace), close + 1
        if checked.grown_bytes > most:
            more = max(more, checked.grown_bytes / candidate.grown_bytes)
        elif best is None or checked.seconds < best.seconds:
            best = checked
    return best


def _closely(candidate: Candidate, judge: Judge, retrace: Retrace) -> Candidate:
    """A candidate as a trace of its own has it, with its methods applied, and as the allocator would hold it."""
    trace = retrace(candidate.choices)
    grown, seconds = judge.held_bytes(trace, candidate.rows), judge.seconds(trace, candidate.rows)
    return replace(candidate, grown_bytes=grown, seconds=seconds)


def _plan(found: Candidate, candidates: Sequence[Candidate], base: tuple[Choice, ...], plain: Trace, judge: Judge) -> Plan:
    request = judge.request
    batch = request.job.batch_size
    without = Candidate(base, batch, judge.held_bytes(plain, batch), judge.seconds(plain, batch))
    choices = _explained(found, without, plain, judge)
    considered = tuple(_option(one, request) for one in _distinct([found, *candidates])[: _SHOWN + 1])
    return Plan(
        choices=choices,
        batch_size=batch,
        micro_batch=found.rows,
        memory_bytes=request.budget_bytes if request.asked else None,
        predicted=_footprint(found, request),
        plain=_footprint(without, request),
        rejected=tuple(_rejections(found, candidates, request)),
        threads=request.threads,
        device=request.probe["device"],
        frontier=_frontier(candidates, request),
        considered=considered,
        code="\n".join(methods.named(choice.method).code(choice.config) for choice in choices),
    )


_SHOWN = 6


def _explained(found: Candidate, without: Candidate, plain: Trace, judge: Judge) -> tuple[Choice, ...]:
    """The choices in the order in which they are applied, each with what it saves and costs after those before it."""
    request, trace = judge.request, plain
    fit = f"the plain step would need up to {format_bytes(request.high_bytes(without.grown_bytes))}"
    parts = math.ceil(request.job.batch_size / found.rows)
    wanted = {choice.method: choice for choice in found.choices}
    if parts > 1:
        why = f"{fit}; {parts} parts of at most {found.rows} rows are held one after the other"
        wanted["micro_batch"] = make_choice("micro_batch", {"rows": found.rows}, request.probe, why)
    choices = [choice for choice in found.choices if choice.why]
    grown, seconds, rows = without.grown_bytes, without.seconds, without.rows
    steps = [name for name in (*_REWRITES, "micro_batch", "activation_checkpointing") if name in wanted]
    for name in steps:
        trace = _REWRITES[name](trace) if name in _REWRITES else trace
        rows = found.rows if name == "micro_batch" else rows
        last = name == steps[-1]
        after = found.grown_bytes if last else judge.bytes(trace, rows)
        then = found.seconds if last else judge.seconds(trace, rows)
        why = wanted[name].why or _WHY[name].format(fit=fit, **_facts(wanted[name]))
        choices.append(replace(wanted[name], why=why, saved_bytes=int(grown - after), cost_seconds=then - seconds))
        grown, seconds = after, then
    return tuple(sorted(choices, key=lambda choice: methods.NAMES.index(choice.method)))


def _facts(choice: Choice) -> dict[str, Any]:
    return {"blocks": len(choice.config.get("modules", ()))}


_WHY = {
    "activation_checkpointing": "{fit}; the activations of {blocks} blocks are computed again instead of being kept",
    "optimizer_in_backward": "{fit}; each gradient is used and freed as soon as it is complete",
    "optimizer_state": "{fit}, and nothing that keeps the results fits; AdamW's moments take 8 bits",
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
        basis="estimate",
        how="trace",
        isolated=request.isolated,
    )


def _option(candidate: Candidate, request: Request) -> Option:
    names = [choice.method for choice in candidate.choices]
    return Option(
        methods=tuple(names),
        blocks=next((len(one.config["modules"]) for one in candidate.choices if one.method == "activation_checkpointing"), 0),
        micro_batch=candidate.rows,
        peak_bytes=request.idle_bytes + int(candidate.grown_bytes),
        step_seconds=candidate.seconds,
        fits=candidate.grown_bytes <= request.most_grown_bytes,
        keeps=max((*(choice.keeps for choice in candidate.choices), _keeps(candidate, request)), key=_ORDER.index),
    )


def _frontier(candidates: Sequence[Candidate], request: Request) -> tuple[Option, ...]:
    """What no other combination beats in both memory and time, from the least memory to the shortest step."""
    found: list[Candidate] = []
    for one in candidates:  # fastest first
        if not found or one.grown_bytes < (1 - TELLING) * found[-1].grown_bytes:
            found.append(one)
    return tuple(_option(one, request) for one in reversed(found))


def _distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """One of each combination of methods: the first."""
    seen: dict[tuple[Any, ...], Candidate] = {}
    for one in candidates:
        key = (tuple(choice.method for choice in one.choices), one.rows)
        seen.setdefault(key, one)
    return list(seen.values())


def _rejections(found: Candidate, candidates: Sequence[Candidate], request: Request) -> Iterator[Rejection]:
    """Of each method that was not taken the best that it could do."""
    for name in ("activation_checkpointing", *_CONFIGS, "micro_batch"):
        if found.uses(name) or (name == "micro_batch" and found.rows < request.job.batch_size):
            continue
        having = [one for one in candidates if one.uses(name) or (name == "micro_batch" and one.rows < request.job.batch_size)]
        if not having:
            changes = (
                request.exact and name in _CONFIGS and make_choice(name, _CONFIGS[name], request.probe, "").keeps not in EXACT
            )
            why = "it changes the results, and exact ones are asked for" if changes else _NOT_HERE[name]
            yield Rejection(method=name, why=why)
            continue
        fitting = [one for one in having if one.grown_bytes <= request.most_grown_bytes]
        fitting.sort(key=lambda one: _keeps(one, request) not in EXACT)
        if not fitting:
            least = min(having, key=lambda one: one.grown_bytes)
            yield Rejection(
                method=name, why=f"does not fit even with it: {format_bytes(request.high_bytes(least.grown_bytes))}"
            )
        elif _keeps(fitting[0], request) not in EXACT and _keeps(found, request) in EXACT:
            yield Rejection(method=name, why="it changes the results, and another plan fits that leaves them as they are")
        else:
            pace = f"{format_seconds(fitting[0].seconds)} a step against {format_seconds(found.seconds)}"
            yield Rejection(method=name, why=f"the fastest plan with it that fits is expected to take {pace}")


_NOT_HERE = {
    "activation_checkpointing": "the model has no blocks (modules that hold modules) to recompute",
    "optimizer_in_backward": "needs AdamW, Adam or SGD, and no clipping of the whole gradient",
    "optimizer_state": "needs AdamW",
    "micro_batch": "the batch cannot be split further",
}


def _keeps(candidate: Candidate, request: Request) -> Any:
    """What a combination does to the mathematics: the most that one of its methods does. What the probe chose for speed is not counted
    here: it was chosen before."""
    keeps = [choice.keeps for choice in candidate.choices if choice.method in _AGAIN]
    if candidate.rows < request.job.batch_size:
        keeps.append(make_choice("micro_batch", {"rows": candidate.rows}, request.probe, "").keeps)
    return max(keeps, key=_ORDER.index, default="bitwise")


_ORDER = ("bitwise", "rounding", "distribution", "changed")


def _nothing(candidates: Sequence[Candidate], judge: Judge, retrace: Retrace) -> errors.NothingFits:
    request = judge.request
    least = _closely(min(candidates, key=lambda one: one.grown_bytes), judge, retrace)
    smallest = request.high_bytes(least.grown_bytes) + SLACK_BYTES
    words = ", ".join(choice.method for choice in least.choices) or "no other method"
    return errors.NothingFits(
        f"nothing fits {format_bytes(request.budget_bytes)}: the least that was found is up to {format_bytes(smallest)}, of which the "
        f"libraries alone take {format_bytes(request.idle_bytes)} ({least.rows} row{'s' * (least.rows > 1)} at a time, {words}; "
        f"{format_seconds(least.seconds)} a step). The smallest budget that works is --memory {math.ceil(smallest / 2**20)}MiB.",
        smallest,
    )


# Rewriting a trace: what a method does to it, near enough to rank combinations


def _in_backward(trace: Trace) -> Trace:
    """Each gradient is gone once its parameter is updated, right after it was made."""
    storages = trace.storages
    dies = [
        min(dies, born + 2) if category == "gradients" else dies
        for born, dies, category in zip(storages.born, storages.dies, storages.category, strict=True)
    ]
    return replace(trace, storages=replace(storages, dies=dies))


def _in_eight_bits(trace: Trace) -> Trace:
    storages = trace.storages
    sizes = [
        size * STATE_SHARE if category == "optimizer" and size > 4 * 4096 else size
        for size, category in zip(storages.fixed_bytes, storages.category, strict=True)
    ]
    return replace(trace, storages=replace(storages, fixed_bytes=sizes))


_REWRITES: Mapping[str, Callable[[Trace], Trace]] = {
    "optimizer_in_backward": _in_backward,
    "optimizer_state": _in_eight_bits,
}
_CONFIGS: Mapping[str, dict[str, Any]] = {"optimizer_in_backward": {}, "optimizer_state": {"bits": 8}}
_AGAIN = (*_REWRITES, "activation_checkpointing")


def _checkpoints(names: Sequence[str], probe: Mapping[str, Any]) -> Choice:
    return make_choice("activation_checkpointing", {"modules": list(names)}, probe, "")
