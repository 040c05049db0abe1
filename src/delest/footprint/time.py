"""How long a step takes: every traced operator held to the rates of a device. Pure: a trace and a roofline go in.

An operator costs the larger of its arithmetic at the rate of its kind and its bytes at the rate of the memory they lie in (roofline:
Williams, Waterman, Patterson, 2009, doi:10.1145/1498765.1498785), plus what launching it takes, plus the page faults of
memory that the system has to give it. On a processor the libraries' kernels copy their operands first, which adds up instead.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from delest import errors
from delest.footprint import heap
from delest.footprint.allocators import Mapped
from delest.footprint.composition import Lives
from delest.records.hardware import Roofline
from delest.records.trace import Trace

Bound = Literal["compute", "memory traffic", "overhead"]
BOUNDS: tuple[Bound, ...] = ("compute", "memory traffic", "overhead")
STEADY = 2  # the step of a trace that has the optimizer's state
# The rate that stands in for one that a roofline lacks.
_STAND_INS = {"recurrent": "matmul", "attention": "matmul", "convolution": "matmul", "depthwise": "convolution"}
_FORMAT_STAND_INS = {"tf32": "fp32", "fp64": "fp32", "int": "fp32", "fp16": "bf16", "bf16": "fp32"}


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds and flops of one steady training step."""

    seconds: float
    phases: dict[str, float]  # seconds of forward, backward, update
    bounds: dict[Bound, float]  # seconds of the operators that each binds
    modules: dict[str, float]  # seconds by dotted name; a module's include those of the modules inside it
    module_flops: dict[str, float]
    flops: float
    utilisation: float | None  # share of the highest rate that the device has in the formats used
    bound_by: Bound  # which takes most of the seconds


def step_time(
    trace: Trace,
    roofline: Roofline,
    *,
    rows: int,
    parts: int = 1,
    allocator: str = "glibc",
    measured: Mapping[str, float] | None = None,
) -> StepTime:
    """Predict one steady step of `parts` micro-batches of `rows` rows each, with one update.

    `allocator` says which memory is new to the process in every step: "glibc", "mmap" (a fixed threshold of 64 KiB), or
    any other name for one that keeps what it has. `measured` has seconds for operators that a roofline describes badly, by
    their `signature`; they count instead of it.

    Raises `BadInput` for less than one row or part.
    """
    faults = [
        f"a step of {count} {what} cannot be predicted: give 1 or more."
        for what, count in (("rows", rows), ("parts", parts))
        if count < 1
    ]
    if faults:
        raise errors.BadInput(faults)
    operators = trace.operators
    seconds_of, flops_of = _operator_seconds(trace, roofline, rows, allocator, measured or {}), operators.flops(rows)
    phases = dict.fromkeys(("forward", "backward", "update"), 0.0)
    bounds: dict[Bound, float] = dict.fromkeys(BOUNDS, 0.0)
    modules, module_flops = dict.fromkeys(trace.modules, 0.0), dict.fromkeys(trace.modules, 0.0)
    total_flops = 0.0
    for k in _steady(trace):
        times = 1 if operators.phase[k] == "update" else parts
        seconds, bound = seconds_of[k]
        phases[operators.phase[k]] = phases.get(operators.phase[k], 0.0) + times * seconds
        bounds[bound] += times * seconds
        total_flops += times * flops_of[k]
        for name in _enclosing(operators.module[k]):
            modules[name] = modules.get(name, 0.0) + times * seconds
            module_flops[name] = module_flops.get(name, 0.0) + times * flops_of[k]
    adding = (parts - 1) * _accumulation_seconds(trace, roofline, rows)
    phases["backward"] += adding
    bounds["memory traffic"] += adding
    total = sum(phases.values())
    return StepTime(
        seconds=total,
        phases=phases,
        bounds=bounds,
        modules=modules,
        module_flops=module_flops,
        flops=total_flops,
        utilisation=_utilisation(trace, roofline, total_flops, total),
        bound_by=max(BOUNDS, key=lambda bound: bounds[bound]),
    )


def scale(probe_seconds: float | Mapping[str, float], probe: StepTime, wanted: StepTime) -> float:
    """Seconds of a step that was not run, from one that was: what the model got wrong there, it is taken to get wrong here.

    `probe_seconds` is the measured step whose prediction is `probe`, as a whole or by phase (forward, backward, update);
    `wanted` is the prediction of the other step, at another batch size or with another optimizer. By phase, each is
    corrected by its own factor, so that an update that weighs more or less does not shift what the rest is taken for.

    Raises `BadInput` where the measured step took no time.
    """
    if not isinstance(probe_seconds, Mapping):
        return wanted.seconds * _factor(probe_seconds, probe.seconds)
    known = {phase: seconds for phase, seconds in probe_seconds.items() if probe.phases.get(phase)}
    whole = _factor(sum(known.values()), sum(probe.phases[phase] for phase in known))
    return sum(
        seconds * (_factor(known[phase], probe.phases[phase]) if phase in known else whole)
        for phase, seconds in wanted.phases.items()
    )


def _factor(measured: float, predicted: float) -> float:
    if measured <= 0 or predicted <= 0:
        raise errors.BadInput(
            f"a step measured at {measured:g} s and predicted at {predicted:g} s says nothing of another one."
        )
    return measured / predicted


def operator_seconds(
    trace: Trace, roofline: Roofline, *, rows: int, allocator: str = "glibc", measured: Mapping[str, float] | None = None
) -> list[float]:
    """Seconds of every operator of the trace, in order."""
    return [seconds for seconds, _ in _operator_seconds(trace, roofline, rows, allocator, measured or {})]


def _operator_seconds(
    trace: Trace, roofline: Roofline, rows: int, allocator: str, measured: Mapping[str, float]
) -> list[tuple[float, Bound]]:
    """Of each operator its seconds and what bounds them."""
    operators = trace.operators
    flops, moved, fresh = operators.flops(rows), operators.moved_bytes(rows), _fresh_bytes(trace, rows, allocator)
    made = _made_bytes(trace, rows)
    fault_seconds = max(0.0, 1 / roofline.fresh_bytes - 1 / roofline.reused_bytes)  # of a byte
    found: list[tuple[float, Bound]] = []
    for k, kind in enumerate(operators.kind):
        if kind == "view":
            found.append((0.0, "overhead"))
            continue
        compute = _compute_seconds(roofline, kind, operators.dtype[k], flops[k])
        memory = _memory_seconds(roofline, kind, operators.dtype[k], moved[k], made[k])
        working = compute + memory if roofline.threads and kind in _PACKING else max(compute, memory)
        if (known := measured.get(operators.signature[k])) is not None:
            working = max(0.0, known - roofline.overhead_seconds)
        faulting = fresh[k] * fault_seconds
        bound: Bound = "compute" if compute >= memory + faulting else "memory traffic"
        if roofline.overhead_seconds > working + faulting:
            bound = "overhead"
        found.append((working + faulting + roofline.overhead_seconds, bound))
    return found


# A processor's libraries copy operands into panels or blocks of their own before they compute (Goto, van de Geijn, 2008,
# doi:10.1145/1356052.1356053), in which time nothing is computed: operands are read, written, and read once more. Operators of
# the zoo's tuning cases, timed one by one on an AVX2 core, took 3.0 (products) and 3.8 times (convolutions) their traffic.
_PACKING = ("matmul", "convolution", "recurrent")
_PACKED = 3.0


def _compute_seconds(roofline: Roofline, kind: str, dtype: str, flops: float) -> float:
    if not flops:
        return 0.0
    # Moving bytes is what depthwise kernels are slow at; a larger kernel of more flops takes hardly longer.
    by_bytes = kind == "depthwise" and _slow_rate(roofline, kind, dtype)
    return flops / _rate(roofline, "convolution" if by_bytes else kind, dtype)


def _memory_seconds(roofline: Roofline, kind: str, dtype: str, moved: float, made: float) -> float:
    """Of `moved` bytes, `made` of which are written where the cache has nothing yet."""
    if not roofline.threads:
        return moved / roofline.reused_bytes
    if kind in _PACKING:
        return _PACKED * moved / roofline.reused_bytes
    # A processor reads a line before it writes to it: an addition of two tensors into a third, by which the rate was
    # measured, moves four for three; so does an operator for each byte of its output, and none that works in place.
    memory = (moved + made) / (roofline.reused_bytes * 4 / 3)
    slow = _slow_rate(roofline, kind, dtype)
    return max(memory, moved / slow) if slow else memory


def _slow_rate(roofline: Roofline, kind: str, dtype: str) -> float | None:
    return roofline.kernel_bytes.get(f"{kind}.{dtype}") or roofline.kernel_bytes.get(f"{kind}.fp32")


def _made_bytes(trace: Trace, rows: int) -> list[float]:
    """Bytes of the storages that each operator makes."""
    made = [0.0] * len(trace.operators)
    for size, born in zip(trace.storages.sizes(rows), trace.storages.born, strict=True):
        if born < len(made):
            made[born] += size
    return made


def _steady(trace: Trace) -> list[int]:
    return [k for k, step in enumerate(trace.operators.step) if step == STEADY]


def _enclosing(module: str) -> list[str]:
    """A module's dotted name and those of all modules around it, "" last."""
    names = [module]
    while names[-1]:
        names.append(names[-1].rpartition(".")[0])
    return names


def _rate(roofline: Roofline, kind: str, dtype: str) -> float:
    """Flops a second; where the device's rate of a kind or format is not known, that of the nearest known one."""
    wanted: str | None = kind
    while wanted is not None:
        format_: str | None = dtype
        while format_ is not None:
            if rate := roofline.flops.get(f"{wanted}.{format_}"):
                return rate
            format_ = _FORMAT_STAND_INS.get(format_)
        wanted = _STAND_INS.get(wanted)
    raise errors.BadInput(
        f"the roofline of {roofline.device} has no rate for {kind} in {dtype}: it needs at least matmul.fp32."
    )


def _accumulation_seconds(trace: Trace, roofline: Roofline, rows: int) -> float:
    """Of adding one more micro-batch's gradients to those that are there: two reads and a write."""
    sizes, step = trace.storages.sizes(rows), trace.operators.step
    born = [
        size
        for size, category, at in zip(sizes, trace.storages.category, trace.storages.born, strict=True)
        if category == "gradients" and at < len(step) and step[at] == STEADY
    ]
    return 3 * sum(born) / roofline.reused_bytes


def _utilisation(trace: Trace, roofline: Roofline, flops: float, seconds: float) -> float | None:
    formats = {
        format_
        for kind, format_, step in zip(trace.operators.kind, trace.operators.dtype, trace.operators.step, strict=True)
        if step == STEADY and kind not in ("memory", "view")
    }
    rates = [rate for name, rate in roofline.flops.items() if name.rpartition(".")[2] in formats]
    return flops / seconds / max(rates) if rates and seconds else None


def _fresh_bytes(trace: Trace, rows: int, allocator: str) -> list[float]:
    """Bytes that the process gets from the system while each operator runs: pages to be cleared and mapped one by one."""
    lives = Lives(trace, rows=rows, evaluation_rows=rows, resident=True)
    if allocator == "glibc":
        before, most, _ = heap.hold(lives, seeds=heap.SEEDS[:1])
        return [float(held - at_first) for held, at_first in zip(most, before, strict=True)]
    fresh = [0.0] * lives.count
    if allocator == "mmap":
        mapped = Mapped()
        for k, (births, scratch) in enumerate(zip(lives.events()[0], lives.scratch, strict=True)):
            before_bytes = mapped.held_bytes
            for size in [*(lives.sizes[number] for number in births), *([scratch] if scratch else [])]:
                mapped.allocate(size)
            fresh[k] = float(mapped.held_bytes - before_bytes)
    return fresh


def spread(seconds: list[float]) -> float:
    """The interquartile range, 0 of a single value."""
    if len(seconds) < 2:
        return 0.0
    lower, _, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    return upper - lower
