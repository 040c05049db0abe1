"""Combinations of methods with the bytes and seconds that they are expected to take, by arithmetic on one trace of the plain step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from delest import methods
from delest.footprint import heap
from delest.footprint.composition import Lives
from delest.footprint.replay import mapped_bytes
from delest.footprint.time import StepTime, operator_seconds, scale, step_time
from delest.planning.blocks import Block, choose_blocks, find_blocks
from delest.planning.parts import PARTS, evaluation_rows, find_head, in_chunks, in_layers, launching
from delest.planning.request import Request, make_choice
from delest.records.hardware import Roofline
from delest.records.plan import KEEPS, Choice, Keeps
from delest.records.trace import Trace

# The one whose fresh memory is charged: where malloc keeps what is freed, pages are new in the first steps alone.
FRESH = {"mmap": "mmap"}
REPLAYS = 4  # of a heap for each combination: what more of them would tell is within the margin
STATE_SHARES = {8: 0.26, 4: 0.133, None: 0.0}  # of fp32 moments, by bits with their scales; None: rows and columns alone
# Other states, looked at in this order and only where nothing else fits: each costs as much comparing as all that goes before.
SMALLER_STATES: tuple[Mapping[str, dict[str, Any]], ...] = ({"optimizer_state": {"bits": 4}}, {"factored_state": {}})


@dataclass(frozen=True)
class Candidate:
    """A combination of methods at a number of rows, with what it would take."""

    choices: tuple[Choice, ...]  # without micro_batch
    rows: int
    grown_bytes: float  # above the idle process, at the peak
    seconds: float  # a step on the whole batch

    def uses(self, method: str) -> bool:
        return any(choice.method == method for choice in self.choices)

    def allocator(self, default: str) -> str:
        """The malloc that it would run under."""
        return next((choice.config["name"] for choice in self.choices if choice.method == "allocator"), default)


class Judge:
    """Bytes and seconds of a trace under one allocator, scaled by what real steps took under it."""

    def __init__(self, plain: Trace, request: Request, roofline: Roofline, allocator: str | None = None):
        self.request, self.roofline = request, roofline
        self.allocator = allocator or request.allocator
        self._fresh = FRESH.get(self.allocator, "exact")
        self.refused: dict[str, str] = {}  # methods that do not suit the model, with the reason
        sample = request.sample(self.allocator)
        rows = sample["rows"]
        grown = max(sample[phase] for phase in ("first", "steady", "evaluation"))
        self.ratio = max(1.0, grown / max(1, self._live(plain, rows, rows)))
        self._heap_ratio = max(1.0, grown / max(1, self._held(plain, rows, rows)))
        self._probe_seconds: float = sample["seconds"]
        self._probe_time = self._time(plain, rows, 1)

    def bytes(self, trace: Trace, rows: int, choices: Sequence[Choice] = ()) -> float:
        """Above the idle process, at the peak of a step on the whole batch in parts of `rows`."""
        batch = self.request.job.batch_size
        return self.ratio * self._live(trace, rows, batch, evaluation_rows(choices, rows, batch))

    def held_bytes(self, trace: Trace, rows: int, choices: Sequence[Choice] = ()) -> float:
        """The same with the allocator's own share as its replay has it: smaller blocks than the probe's wait in its heap for reuse."""
        batch = self.request.job.batch_size
        held = self._heap_ratio * self._held(trace, rows, batch, evaluation_rows(choices, rows, batch))
        return max(held, self.bytes(trace, rows, choices))

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
        seconds = operator_seconds(trace, self.roofline, rows=rows, allocator=self._fresh)
        return [replace(block, saved_bytes=int(self.ratio * block.saved_bytes)) for block in find_blocks(trace, seconds, rows)]

    def _time(self, trace: Trace, rows: int, parts: int) -> StepTime:
        return step_time(trace, self.roofline, rows=rows, parts=parts, allocator=self._fresh)

    def _live(self, trace: Trace, rows: int, batch: int, evaluated: int | None = None) -> int:
        return max(Lives(trace, rows=rows, evaluation_rows=evaluated or rows, split=rows < batch).totals())

    def _held(self, trace: Trace, rows: int, batch: int, evaluated: int | None = None) -> int:
        lives = Lives(trace, rows=rows, evaluation_rows=evaluated or rows, split=rows < batch, resident=True)
        if self.allocator == "mmap":
            return max(mapped_bytes(lives))
        if self.allocator == "glibc" and heap.is_here():
            return max(heap.hold(lives, seeds=heap.SEEDS[:REPLAYS])[1])
        return self._live(trace, rows, batch, evaluated)


def all_candidates(
    plain: Trace, base: tuple[Choice, ...], judge: Judge, state: Mapping[str, dict[str, Any]] | None = None
) -> list[Candidate]:
    """Every combination at every number of parts, with as few blocks recomputed as the budget asks for, and with all of them; with `state`
    those that have this one of `SMALLER_STATES`."""
    request, found = judge.request, []
    for configs in _combinations(request, configs_of(plain, judge), state or {}):
        trace = plain
        for name, config in configs.items():
            trace = REWRITES[name](trace, config)
        chosen = (*base, *(make_choice(name, config, request.probe, "") for name, config in configs.items()))
        whole = bool(methods.conflicts({**configs, "micro_batch": {"rows": 1}}))
        for parts in [1] if whole else _part_counts(request):
            rows = math.ceil(request.job.batch_size / parts)
            grown, seconds = judge.bytes(trace, rows, chosen), judge.seconds(trace, rows)
            found.append(Candidate(chosen, rows, grown, seconds))
            blocks = [block for block in judge.blocks(trace, rows) if _may_recompute(block, configs)]
            if parts == 1:
                found += _layered(trace, chosen, blocks, seconds, judge)
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


def _may_recompute(block: Block, configs: Mapping[str, dict[str, Any]]) -> bool:
    """Whether a block goes with the other methods: one around the layer whose outputs go into a chunked loss does not."""
    return not methods.conflicts({**configs, "activation_checkpointing": {"modules": [block.name]}})


def _layered(
    trace: Trace, chosen: tuple[Choice, ...], blocks: Sequence[Block], seconds: float, judge: Judge
) -> Iterator[Candidate]:
    """The whole batch with all blocks taken in parts, at each number of parts."""
    request, names = judge.request, [block.name for block in blocks]
    if not names or "layered_accumulation" in judge.refused:
        return
    for parts in [count for count in PARTS if count <= request.job.batch_size]:
        choices = (*chosen, make_choice("layered_accumulation", {"modules": names, "parts": parts}, request.probe, ""))
        again = judge.recomputing(blocks, names, 1) + launching(trace, names, parts, judge.roofline)
        rows = request.job.batch_size
        yield Candidate(choices, rows, judge.bytes(in_layers(trace, names, parts), rows, choices), seconds + again)


def configs_of(plain: Trace, judge: Judge) -> dict[str, dict[str, Any]]:
    """Of the methods that are on or off: those that suit the model."""
    head = find_head(plain, judge.request.job.batch_size)
    offered = dict(CONFIGS) if head is None else {**CONFIGS, "chunked_loss": head}
    return {name: config for name, config in offered.items() if name not in judge.refused}


def _combinations(
    request: Request, offered: Mapping[str, dict[str, Any]], state: Mapping[str, dict[str, Any]]
) -> Iterator[dict[str, dict[str, Any]]]:
    """Methods that go together with each other and with the recipe, with their configurations; first none but the `state`."""
    recipe = methods.of_recipe(request.job.recipe)
    offered = {name: config for name, config in offered.items() if not state or name != "optimizer_state"}
    for count in range(len(offered) + 1):
        for names in itertools.combinations(offered, count):
            configs = {**{name: offered[name] for name in names}, **state}
            if not methods.conflicts(configs, recipe):
                yield configs


def _part_counts(request: Request) -> list[int]:
    """1 to 8, then in steps of a half or a third, up to the fewest rows that a part may have."""
    most = max(1, request.job.batch_size // request.least_rows)
    return sorted(
        {count for k in range(12) for count in (2**k, 3 * 2**k) if count <= most} | {min(most, n) for n in (5, 7)} | {most}
    )


def keeps_of(candidate: Candidate, request: Request) -> Keeps:
    """What a combination does to the mathematics: the most that one of its methods does. What the probe chose for speed is not counted
    here: it was chosen before."""
    keeps = [choice.keeps for choice in candidate.choices if choice.method in _AGAIN]
    if candidate.rows < request.job.batch_size:
        keeps.append(make_choice("micro_batch", {"rows": candidate.rows}, request.probe, "").keeps)
    return max(keeps, key=KEEPS.index, default="bitwise")


# Rewriting a trace: what a method does to it, near enough to rank combinations


def _in_backward(trace: Trace, config: Mapping[str, Any]) -> Trace:
    """Each gradient is gone once its parameter is updated, right after it was made."""
    storages = trace.storages
    dies = [
        min(dies, born + 2) if category == "gradients" else dies
        for born, dies, category in zip(storages.born, storages.dies, storages.category, strict=True)
    ]
    return replace(trace, storages=replace(storages, dies=dies))


def _with_small_state(trace: Trace, config: Mapping[str, Any]) -> Trace:
    storages, share = trace.storages, STATE_SHARES[config.get("bits")]
    sizes = [
        size * share if category == "optimizer" and size > 4 * 4096 else size
        for size, category in zip(storages.fixed_bytes, storages.category, strict=True)
    ]
    return replace(trace, storages=replace(storages, fixed_bytes=sizes))


REWRITES: Mapping[str, Callable[[Trace, Mapping[str, Any]], Trace]] = {
    "chunked_loss": in_chunks,
    "optimizer_in_backward": _in_backward,
    "optimizer_state": _with_small_state,
    "factored_state": _with_small_state,
}
CONFIGS: Mapping[str, dict[str, Any]] = {"optimizer_in_backward": {}, "optimizer_state": {"bits": 8}}
_AGAIN = (*REWRITES, "activation_checkpointing", "layered_accumulation")


def _checkpoints(names: Sequence[str], probe: Mapping[str, Any]) -> Choice:
    return make_choice("activation_checkpointing", {"modules": list(names)}, probe, "")
