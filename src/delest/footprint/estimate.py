"""Memory and time of training before anything runs: traced on fake tensors, replayed through an allocator, held to rates."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from delest import errors
from delest.backends.torch.as_cuda import as_cuda
from delest.backends.torch.loops import Loop
from delest.backends.torch.trace import NeedsProbe, trace_loop
from delest.footprint import cuda, heap
from delest.footprint.replay import replay
from delest.footprint.runtime import Runtime, measure_runtime
from delest.footprint.scratch import scratch
from delest.footprint.time import step_time
from delest.hardware.catalogue import find_device, roofline_of
from delest.hardware.roofline import BUSY, measure_roofline
from delest.records.footprint import PHASES, Footprint
from delest.records.hardware import Device, Roofline
from delest.records.trace import Trace

ALLOCATORS = ("glibc", "mmap", "exact", "cuda")
STEPS = ("start", "first_step", "steady_step")
UNOPENED = "the job's data could not be opened in a process of their own: the memory that they hold is not counted"
JOB_SLACK_BYTES = 8 << 20  # higher end of a job's interval: its process reads ahead and loads code as it goes
# Processors and GPUs on which a committed result of benchmarks/footprint.py backs estimates of memory.
VALIDATED_ON: tuple[str, ...] = ("AMD EPYC",)


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where the training is thought to run."""

    name: str  # "cpu", or the catalogue's
    allocator: str
    threads: int
    device: Device | None = None  # of the catalogue; None: this machine's processor

    @property
    def implementation(self) -> dict[str, bool]:
        """How optimizers that are only named work through their parameters."""
        return {} if self.device is None else cuda.DEFAULT_IMPLEMENTATION

    def roofline(self) -> Roofline:
        return measure_roofline(self.threads) if self.device is None else roofline_of(self.device)

    def runtime(self) -> Runtime:
        if self.device is None:
            return measure_runtime(self.threads)
        context = cuda.context_bytes(self.device.capability)
        return Runtime(context, context, cuda.workspace_bytes(self.device.capability))


def choose_target(device: str | None, allocator: str | None, threads: int | None) -> Target:
    """The target of a device's name and an allocator. Raises `BadInput` for unknown ones, naming the nearest."""
    faults: list[str] = []
    found: Device | None = None
    if device not in (None, "auto", "cpu"):
        try:
            found = find_device(_here() if device == "cuda" else str(device))
        except errors.BadInput as error:
            faults += error.faults
    if allocator is not None and allocator not in ALLOCATORS:
        faults.append(f"unknown allocator {allocator!r}: use {', '.join(ALLOCATORS)}.")
    elif allocator in ("glibc", "mmap") and found is not None:
        faults.append(f"the allocator {allocator} is a processor's; {found.name} is a GPU: leave it out, or use exact.")
    elif allocator == "cuda" and found is None and not faults:
        faults.append("the allocator cuda is a GPU's: name one with --device.")
    if faults:
        raise errors.BadInput(faults)
    usual = "glibc" if heap.is_here() else "mmap"
    chosen = allocator or (usual if found is None else "cuda")
    return Target(
        name="cpu" if found is None else found.name, allocator=chosen, threads=threads or torch.get_num_threads(), device=found
    )


def _here() -> str:
    """The name of this machine's GPU."""
    if not torch.cuda.is_available():
        raise errors.BadInput("there is no GPU here that torch can use: name a device, as a100-80 or t4; it need not be here.")
    return torch.cuda.get_device_name()


def estimate_loop(
    build: Callable[[Any], Loop],
    sizes: Sequence[tuple[int, int]],
    target: Target,
    *,
    evaluation_rows: Callable[[int], int] | None = None,
    precision: str = "fp32",
    watched: Callable[[], Trace],
    whole: bool = True,
    isolated: bool = True,
    idle: Callable[[], int | None] = lambda: None,
) -> list[Footprint]:
    """One footprint for each (batch, micro-batch) of `sizes`, all from two traces.

    `evaluation_rows` gives those of an evaluation batch for a micro-batch (default: the same). `build` gives the loop for a fake
    mode. `watched` gives a trace of real steps on few rows, for a model that branches on data; `isolated` says whether it does so
    in another process. `idle` gives the resident bytes of the very process before it trains on a processor, None where they are
    not known: those of a bare one then count. Unless `whole` the peak is that of the steps, and nothing is counted for
    checkpoints: how a script of the user's own evaluates, saves and loads is not known.
    Raises `BadInput` where the model cannot be built or does not take its inputs.
    """
    with _threads(target.threads):
        growing = len({rows for _, rows in sizes}) > 1 or evaluation_rows is not None
        trace, how = trace_on(build, max(rows for _, rows in sizes), target, watched, growing)
        isolated = isolated or how == "trace"
        trace = replace(trace, precision=precision, state_bytes=trace.state_bytes if whole else 0)
        phases = PHASES if whole else STEPS
        known = idle() if target.device is None else None  # before rates are measured, which wants a quiet machine
        roofline, runtime = target.roofline(), target.runtime()
        warm = known or (runtime.lean_bytes if whole else runtime.idle_bytes)
        beside = (0, 0) if target.allocator == "exact" else (warm, warm + runtime.touched_bytes)
        if whole and known is None and beside != (0, 0) and target.device is None:
            trace = replace(trace, notes=(*trace.notes, UNOPENED))
        return [
            replace(
                _footprint(trace, target, roofline, beside, batch, rows, (evaluation_rows or int)(rows), phases),
                how=how,
                isolated=isolated,
            )
            for batch, rows in sizes
        ]


def trace_on(
    build: Callable[[Any], Loop], rows: int, target: Target, watched: Callable[[], Trace], growing: bool
) -> tuple[Trace, Literal["trace", "probe"]]:
    """A trace of the loop on a target, and how it was come by; raises as `estimate_loop` does."""
    try:
        if target.device is None:
            return trace_loop(build, rows, scratch=scratch, growing=growing), "trace"
        with as_cuda(target.device.capability):
            return trace_loop(build, rows, scratch=cuda.scratch, growing=growing), "trace"
    except NeedsProbe as error:
        why = f"the model reads values of tensors ({error}): real steps on few rows were watched instead of a trace"
        trace = watched()
        return replace(trace, notes=(*trace.notes, why)), "probe"


def _footprint(
    trace: Trace,
    target: Target,
    roofline: Roofline,
    beside: tuple[int, int],
    batch: int,
    rows: int,
    evaluation_rows: int,
    phases: Sequence[str],
) -> Footprint:
    allocator = target.allocator
    found = replay(
        trace,
        rows=rows,
        allocator=allocator,
        runtime_bytes=beside[1],
        batch_size=batch,
        evaluation_rows=evaluation_rows,
        device=target.name,
        phases=phases,
    )
    predicted = step_time(trace, roofline, rows=rows, parts=-(-batch // rows), allocator=allocator)
    seconds = {name: predicted.modules.get(name) for name in trace.modules}
    modules = tuple(
        replace(share, seconds=seconds.get(share.name), flops=predicted.module_flops.get(share.name)) for share in found.modules
    )
    slack = JOB_SLACK_BYTES if phases == PHASES and allocator == "glibc" else 0
    notes = (*found.notes, f"rates were {BUSY}; a quiet moment measures them anew") if BUSY in roofline.source else found.notes
    validated = tuple(name for name in VALIDATED_ON if name == roofline.device)
    return replace(
        found,
        runtime_bytes=beside[0],
        high_bytes=found.high_bytes + slack,
        modules=modules,
        step_seconds=predicted.seconds,
        bound_by=predicted.bound_by,
        flops=predicted.flops,
        utilisation=predicted.utilisation,
        validated_on=validated,
        notes=notes,
    )


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """So many threads while kernels are looked up and probed: what they take depends on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
