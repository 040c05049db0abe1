"""Which device to take for a training: for each the plan by which it fits there, its time and its cost, from traces alone.

A plan is sought in the order of what it costs: the whole batch, fewer rows at once, then every block recomputed besides. Where even the
fewest rows do not fit, the states are thought of as sharded over several devices (Rajbhandari et al., "ZeRO", arXiv 1910.02054,
stage 3): each keeps its share of weights, gradients and optimizer state, and gathers one block at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from delest import methods
from delest.footprint.composition import Lives
from delest.footprint.replay import replay
from delest.footprint.time import operator_seconds, step_time
from delest.planning.blocks import find_blocks
from delest.planning.request import EXACT, make_choice
from delest.records.devices import DeviceComparison, DeviceOption
from delest.records.footprint import Footprint
from delest.records.hardware import Device, Roofline
from delest.records.plan import Choice, Plan
from delest.records.trace import Trace
from delest.units import format_bytes, format_seconds

ALLOCATOR = "cuda"
STATES = ("parameters", "gradients", "optimizer")
GATHERED = 3  # times a block's weights are there whole: its own, the next one's while it computes, and its gradients
EVALUATION = 3  # the step of a trace
NOTES = (
    "nothing was measured: memory is traced as on each device, in fp32 where the recipe leaves the precision open",
    "times are a datasheet's rates at stated efficiencies; reading data and copying it to the device are not counted",
    "a run has all its epochs here; it may end earlier",
)


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A device that can be had."""

    device: Device
    roofline: Roofline
    runtime_bytes: int  # context and libraries' workspaces
    budget_bytes: int
    price: float | None = None  # of an hour


@dataclass(frozen=True, kw_only=True)
class Work:
    """The whole training."""

    batch_size: int
    steps: int
    epochs: int
    validation_rows: int
    base: tuple[Choice, ...] = ()  # what the recipe asks for
    exact: bool = False


Retrace = Callable[[Device, tuple[Choice, ...]], Trace]  # the job's step on a device, with these methods applied


@dataclass(frozen=True)
class _Foreseen:
    """A way to train on one device."""

    choices: tuple[Choice, ...]  # without micro_batch
    trace: Trace
    footprint: Footprint


def compare_devices(
    offers: Sequence[Offer], work: Work, retrace: Retrace, *, within_seconds: float | None = None
) -> DeviceComparison:
    """An option for each offer, and the one to take: the cheapest where prices are given, else the fastest, of those that end in time."""
    options = tuple(_option(offer, work, retrace) for offer in offers)
    recommended, why = _recommend(options, within_seconds)
    return DeviceComparison(
        options=options, recommended=recommended, why=why, batch_size=work.batch_size, steps=work.steps, notes=NOTES
    )


def _option(offer: Offer, work: Work, retrace: Retrace) -> DeviceOption:
    least: _Foreseen | None = None
    for found in _ways(offer, work, retrace):
        if found.footprint.high_bytes <= offer.budget_bytes:
            return _alone(found, offer, work)
        if least is None or found.footprint.high_bytes < least.footprint.high_bytes:
            least = found
    assert least is not None
    return _sharded(least, offer, work)


def _ways(offer: Offer, work: Work, retrace: Retrace) -> Iterator[_Foreseen]:
    """Ways to train, the cheaper in time first."""
    trace = retrace(offer.device, work.base)
    rows = _row_counts(work, trace)
    yield from (_foreseen(offer, work, work.base, trace, count) for count in rows)
    names = [block.name for block in find_blocks(trace, _seconds(trace, offer, rows[-1]), rows[-1])]
    if names:
        chosen = (*work.base, _choice("activation_checkpointing", {"modules": names}, trace))
        trace = retrace(offer.device, chosen)
        yield from (_foreseen(offer, work, chosen, trace, count) for count in rows)


def _row_counts(work: Work, trace: Trace) -> list[int]:
    """Rows at once: all, then halves of it down to the fewest."""
    least = min(work.batch_size, 2 if _normalises(trace) else 1)
    most_parts = work.batch_size // least
    if work.exact and _choice("micro_batch", {"rows": least}, trace).keeps not in EXACT:
        most_parts = 1
    parts = [2**k for k in range(most_parts.bit_length()) if 2**k < most_parts]
    return [math.ceil(work.batch_size / count) for count in [*parts, most_parts]]


def _foreseen(offer: Offer, work: Work, choices: tuple[Choice, ...], trace: Trace, rows: int) -> _Foreseen:
    footprint = replay(
        trace,
        rows=rows,
        allocator=ALLOCATOR,
        runtime_bytes=offer.runtime_bytes,
        batch_size=work.batch_size,
        device=offer.device.name,
    )
    return _Foreseen(choices, trace, replace(footprint, how="trace", timeline=None))


def _alone(found: _Foreseen, offer: Offer, work: Work) -> DeviceOption:
    rows = found.footprint.micro_batch
    step = _step_seconds(found, offer, work.batch_size)
    seconds = work.steps * step + _evaluating(found, offer, work, rows)
    size = format_bytes(found.footprint.high_bytes)
    return _built(found, offer, work, 1, step, seconds, f"up to {size} of {format_bytes(offer.budget_bytes)}")


def _sharded(least: _Foreseen, offer: Offer, work: Work) -> DeviceOption:
    """Several devices: each keeps its share of the states, has all else whole, and computes its share of the batch."""
    footprint = least.footprint
    states, beside = _apart(least, work)
    beside += GATHERED * _largest_block_bytes(least)
    room, most = offer.budget_bytes - beside, work.batch_size // _row_counts(work, least.trace)[-1]
    if room <= 0:
        what = f"{format_bytes(beside)} that cannot be sharded (activations, a gathered block, the runtime)"
        return _none(least, offer, f"{what} leave nothing of {format_bytes(offer.budget_bytes)}")
    count = max(2, math.ceil(states / room))
    if count > most:
        return _none(least, offer, f"{count} devices would be needed for the states, and the batch has rows for {most}")
    step = _step_seconds(least, offer, math.ceil(work.batch_size / count))
    seconds = work.steps * step + _evaluating(least, offer, work, footprint.micro_batch) / count
    why = (
        f"one would need up to {format_bytes(footprint.high_bytes)}; {count} by arithmetic, {format_bytes(states)} of weights, gradients and "
        f"optimizer state sharded, 1/{count} each; communication not counted"
    )
    each = beside + math.ceil(states / count)
    peak = each - (footprint.high_bytes - footprint.peak_bytes)
    return _built(
        replace(least, footprint=replace(footprint, peak_bytes=peak, high_bytes=each)), offer, work, count, step, seconds, why
    )


def _apart(found: _Foreseen, work: Work) -> tuple[int, int]:
    """Bytes of states and of all else, the runtime and the interval's upper end included: each where it is highest by itself, since
    sharded states move the peak."""
    rows = found.footprint.micro_batch
    series = Lives(found.trace, rows=rows, evaluation_rows=rows, split=rows < work.batch_size).series()
    states = [sum(sizes) for sizes in zip(*(series[name] for name in STATES), strict=True)]
    others = [sum(sizes) for sizes in zip(*(sizes for name, sizes in series.items() if name not in STATES), strict=True)]
    live = max(map(sum, zip(states, others, strict=True)))
    return max(states), max(others) + found.footprint.high_bytes - live


def _built(found: _Foreseen, offer: Offer, work: Work, count: int, step: float, seconds: float, why: str) -> DeviceOption:
    rows = min(found.footprint.micro_batch, math.ceil(work.batch_size / count))
    choices = found.choices
    if rows * count < work.batch_size:
        choices += (_choice("micro_batch", {"rows": rows}, found.trace, why),)
    plan = Plan(
        choices=tuple(sorted(choices, key=lambda choice: methods.NAMES.index(choice.method))),
        batch_size=work.batch_size,
        micro_batch=rows,
        predicted=None if count > 1 else replace(found.footprint, step_seconds=step, modules=()),
        device="cuda",
        code="\n".join(methods.named(choice.method).code(choice.config) for choice in choices),
    )
    return DeviceOption(
        name=offer.device.name,
        title=offer.device.title,
        budget_bytes=offer.budget_bytes,
        count=count,
        plan=plan,
        peak_bytes=found.footprint.peak_bytes,
        high_bytes=found.footprint.high_bytes,
        step_seconds=step,
        seconds=seconds,
        price=offer.price,
        cost=None if offer.price is None else offer.price * count * seconds / 3600,
        basis="trace" if count == 1 else "arithmetic",
        why=why,
    )


def _none(least: _Foreseen, offer: Offer, why: str) -> DeviceOption:
    return DeviceOption(
        name=offer.device.name,
        title=offer.device.title,
        budget_bytes=offer.budget_bytes,
        count=None,
        plan=None,
        peak_bytes=least.footprint.peak_bytes,
        high_bytes=least.footprint.high_bytes,
        step_seconds=None,
        seconds=None,
        price=offer.price,
        cost=None,
        basis="arithmetic",
        why=why,
    )


def _recommend(options: Sequence[DeviceOption], within_seconds: float | None) -> tuple[str | None, str]:
    """The device to take, and why."""
    possible = [one for one in options if one.count is not None and one.seconds is not None]
    if not possible:
        return None, "it fits on none of them, whatever their number"
    timely = [one for one in possible if within_seconds is None or _seconds_of(one) <= within_seconds]
    if not timely:
        fastest = min(possible, key=_seconds_of)
        return None, f"none ends in time: the fastest, {fastest.name}, takes {format_seconds(_seconds_of(fastest))}"
    priced = [one for one in timely if one.cost is not None]
    if priced:
        best = min(priced, key=lambda one: (one.cost, one.seconds))
        unpriced = f"; {len(timely) - len(priced)} without a price not weighed" if len(priced) < len(timely) else ""
        return best.name, f"the cheapest of {len(priced)} with a price that will do{unpriced}"
    best = min(timely, key=lambda one: (one.count, one.seconds))
    fewest = "" if best.count == 1 else ", on as few as possible"
    return (
        best.name,
        f"the fastest of {sum(one.count == best.count for one in timely)} that will do{fewest}; prices would tell the cheapest",
    )


def _seconds_of(option: DeviceOption) -> float:
    assert option.seconds is not None
    return option.seconds


def _step_seconds(found: _Foreseen, offer: Offer, batch: int) -> float:
    """Of so much of the batch as one device has."""
    rows = min(found.footprint.micro_batch, batch)
    return step_time(found.trace, offer.roofline, rows=rows, parts=math.ceil(batch / rows), allocator=ALLOCATOR).seconds


def _evaluating(found: _Foreseen, offer: Offer, work: Work, rows: int) -> float:
    """Seconds of all evaluations."""
    seconds, steps = _seconds(found.trace, offer, rows), found.trace.operators.step
    once = sum(each for each, step in zip(seconds, steps, strict=True) if step == EVALUATION)
    return work.epochs * math.ceil(work.validation_rows / rows) * once


def _seconds(trace: Trace, offer: Offer, rows: int) -> list[float]:
    return operator_seconds(trace, offer.roofline, rows=rows, allocator=ALLOCATOR)


def _largest_block_bytes(found: _Foreseen) -> int:
    """Weights of the largest block, of the largest layer where there are no blocks."""
    names = {share.name for share in found.footprint.modules}
    layers = names - {name.rpartition(".")[0] for name in names}
    blocks = {name for choice in found.choices for name in choice.config.get("modules", ())} or layers
    return max((share.parameter_bytes for share in found.footprint.modules if share.name in blocks), default=0)


def _normalises(trace: Trace) -> bool:
    return any("BatchNorm" in kind for kind in trace.modules.values())


def _choice(method: str, config: Mapping[str, object], trace: Trace, why: str = "it would not fit otherwise") -> Choice:
    return make_choice(method, dict(config), {"batch_statistics": _normalises(trace)}, why)
