"""Peak memory of training from a trace: its storages are born and die in order in an allocator, without a framework.

At each operator the storages that die there are freed first, then those born there are allocated in order, then the kernel's
scratch is allocated and freed while they live.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from delest import errors
from delest.footprint import heap
from delest.footprint.allocators import Allocator, Caching, Exact, Mapped
from delest.footprint.composition import LASTING, Lives, Moment, break_down, draw_timeline, share_out
from delest.records.footprint import PHASES, Footprint
from delest.records.trace import Trace

STEPS = ("start", "first_step", "steady_step", "evaluation")  # the phase of each step of a trace


@dataclass(frozen=True)
class Simulation:
    """The allocator that stands for one kind, None for the real malloc, and the interval around what it holds.

    It reaches from `below` to `above` times the peak, and `slack_bytes` higher; the runtime is not counted.
    """

    allocator: Callable[[], Allocator] | None
    below: float
    above: float
    slack_bytes: int = 0


_SLACK = 8 << 20  # code of libraries and small buffers that the warm idle process had not touched
SIMULATIONS = {
    # What a trace misses is small where freed blocks do not wait for reuse.
    "exact": Simulation(Exact, 0.97, 1.03, _SLACK),
    "mmap": Simulation(Mapped, 0.97, 1.03, _SLACK),
    "cuda": Simulation(Caching, 0.97, 1.03, _SLACK),
    # A quarter of its midpoint wide: processes that run the same steps differ by up to a fifth. It lies as high as it can without losing one of
    # the thirty tuning cases of benchmarks/footprint.py, in trials with three sets of seeds: too much costs less than too little.
    "glibc": Simulation(None, 0.903, 1.152),
}
# What hangs on a node of the graph outside tensors' memory, under torch 2.13: the growth of the resident set over 4,000 small operators
# in a row, less their tensors', was 530 bytes each for views, 560 to 930 for elementwise operators, 1,025 for products.
NODE_BYTES = 750


def replay(
    trace: Trace,
    *,
    rows: int,
    allocator: str,
    runtime_bytes: int = 0,
    batch_size: int | None = None,
    evaluation_rows: int | None = None,
    device: str = "cpu",
    phases: Sequence[str] = PHASES,
) -> Footprint:
    """Predict the memory of training with `rows` rows at once, in bytes; allocator is `exact`, `mmap`, `glibc` or `cuda`.

    `runtime_bytes`, those of a warm idle process, count to every phase and to the peak. `batch_size` is the effective one,
    else `rows`; where it is larger, gradients of earlier parts stay while the next is computed (see `Lives`). Phases:

    - `start`: the most while setting up, at least the weights, buffers and state that the first step begins with;
    - `first_step`, `steady_step`: the most in each of the two traced steps;
    - `evaluation`: the most with `evaluation_rows` rows, else `rows`, on top of what the steps leave;
    - `saving`, `resuming`: what the steps leave and a copy of `state_bytes`, in pieces in proportion to the storages that are
      copied; with `cuda` without the copy, which is in the host's memory.

    The peak is the highest of those named in `phases`. In its breakdown, scratch and what the allocator holds beyond live bytes are temporaries.
    Modules' figures are of what lives at the peak. `allocated_bytes` is the highest sum of live bytes (of blocks: `cuda`).

    Raises `BadInput` for sizes below 1, a batch smaller than its parts, an allocator that is not known.
    """
    _check(rows, allocator, runtime_bytes, batch_size, evaluation_rows)
    split = batch_size is not None and rows < batch_size
    resident, evaluation_rows = allocator in ("glibc", "mmap"), evaluation_rows or rows
    lives = Lives(trace, rows=rows, evaluation_rows=evaluation_rows, split=split, resident=resident)
    simulation, copied_bytes = SIMULATIONS[allocator], 0 if allocator == "cuda" else trace.state_bytes
    run = _run(simulation.allocator, lives, copied_bytes)
    totals = lives.totals()
    moments = _moments(trace, lives, run, totals)
    whole = Lives(trace, rows=rows, evaluation_rows=evaluation_rows, split=split) if trace.storages.touched else lives
    live_bytes = max(total for total, step in zip(whole.totals(), trace.operators.step, strict=True) if STEPS[step] in phases)
    peak = max(
        (moment for name, moment in moments.items() if name in phases),
        key=lambda moment: (moment.held_bytes, sum(lives.sizes[i] for i in moment.live)),
    )
    return Footprint(
        peak_bytes=peak.held_bytes + runtime_bytes,
        runtime_bytes=runtime_bytes,
        low_bytes=int(peak.held_bytes * simulation.below) + runtime_bytes,
        high_bytes=int(peak.held_bytes * simulation.above) + simulation.slack_bytes + runtime_bytes,
        phases={name: moment.held_bytes + runtime_bytes for name, moment in moments.items()},
        breakdown={**break_down(lives, peak), "runtime": runtime_bytes},
        modules=share_out(trace, lives, peak),
        timeline=draw_timeline(trace, lives),
        allocated_bytes=live_bytes if run.allocated_bytes is None else run.allocated_bytes,
        batch_size=batch_size or rows,
        micro_batch=rows,
        device=device,
        allocator=allocator,
        basis="estimate",
        how="replay",
        notes=trace.notes,
    )


def _check(rows: int, allocator: str, runtime_bytes: int, batch_size: int | None, evaluation_rows: int | None) -> None:
    faults = []
    if allocator not in SIMULATIONS:
        faults.append(f"allocator {allocator!r} is not known: choose one of {', '.join(SIMULATIONS)}.")
    if rows < 1:
        faults.append(f"rows is {rows}: at least 1 row must be in memory at once.")
    if batch_size is not None and batch_size < max(1, rows):
        faults.append(f"batch_size is {batch_size}, less than the {max(1, rows)} rows in memory at once: give a larger one.")
    if evaluation_rows is not None and evaluation_rows < 1:
        faults.append(f"evaluation_rows is {evaluation_rows}: evaluate at least 1 row at once.")
    if runtime_bytes < 0:
        faults.append(f"runtime_bytes is {runtime_bytes}: give the bytes of an idle process, 0 to leave them out.")
    if faults:
        raise errors.BadInput(faults)


@dataclass(frozen=True)
class _Run:
    held: list[int]  # while each operator runs
    copied: int  # at rest, with a copy of the state
    allocated_bytes: int | None  # the most in blocks, where the allocator counts them


def _run(make: Callable[[], Allocator] | None, lives: Lives, copied_bytes: int) -> _Run:
    rest = set(lives.at_rest())
    state = [lives.sizes[number] for number in sorted(rest) if lives.category[number] in LASTING]
    copies = _in_proportion(copied_bytes, state)
    if make is None:
        least = _run(Exact, lives, copied_bytes)  # what a process has free from its start can hold a few small blocks
        _, held, copied = heap.hold(lives, [size for size in copies if size])
        return _Run([max(pair) for pair in zip(held, least.held, strict=True)], max(copied, least.copied), None)
    allocator = make()
    births, deaths = lives.events()
    handles: dict[int, int] = {}
    held = []
    for k in range(lives.count):
        for number in deaths[k]:
            allocator.free(handles.pop(number))
        for number in births[k]:
            handles[number] = allocator.allocate(lives.sizes[number])
        held.append(_held_with(allocator, [lives.scratch[k]]))
    if make is Mapped:
        held = [size + NODE_BYTES * nodes for size, nodes in zip(held, lives.nodes(), strict=True)]
    for number in [number for number in handles if number not in rest]:
        allocator.free(handles.pop(number))
    return _Run(held, _held_with(allocator, copies), getattr(allocator, "peak_allocated_bytes", None))


def mapped_bytes(lives: Lives) -> list[int]:
    """Bytes held while each operator runs under a fixed mmap threshold."""
    return _run(Mapped, lives, 0).held


def _held_with(allocator: Allocator, sizes: Sequence[int]) -> int:
    """What is held once these blocks are allocated too; they are freed again."""
    handles = [allocator.allocate(size) for size in sizes if size]
    held = allocator.held_bytes
    for handle in handles:
        allocator.free(handle)
    return held


def _in_proportion(total: int, parts: Sequence[int]) -> list[int]:
    """A total split as `parts` are, to the byte; whole where there are none."""
    whole = sum(parts)
    pieces = [total * part // whole for part in parts] if whole else []
    return [*pieces, total - sum(pieces)]


def _moments(trace: Trace, lives: Lives, run: _Run, totals: list[int]) -> dict[str, Moment]:
    """The highest moment of each phase that the trace holds; of equally high ones that when most lives."""
    steps = trace.operators.step
    highest: dict[str, int] = {}
    for k, step in enumerate(steps):
        name = STEPS[step]
        best = highest.get(name, k)
        if best == k or (run.held[k], totals[k]) > (run.held[best], totals[best]):
            highest[name] = k
    moments = {
        name: Moment(run.held[k], lives.live(k), lives.scratch[k], trace.operators.module[k]) for name, k in highest.items()
    }
    if 1 in steps:
        ready = [number for number in lives.live(steps.index(1)) if lives.category[number] in LASTING]
        size = sum(lives.sizes[number] for number in ready)
        if "start" not in moments or size > moments["start"].held_bytes:
            moments["start"] = Moment(size, ready)
    rest = lives.at_rest()
    moments["saving"] = moments["resuming"] = Moment(run.copied, rest)
    order = ("start", "first_step", "steady_step", "evaluation", "saving", "resuming")
    return {name: moments[name] for name in order if name in moments}
