"""Watching real training steps: every storage, the seconds of every operator, and the highest sum that was allocated.

The recorder that traces fake tensors works on real ones too; here a second mode below it times each kernel. A watched step takes
longer than another, so how long a step takes is measured elsewhere: only the shares of these seconds mean something.
"""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from delest.backends.torch.loops import Loop, tensors_of
from delest.backends.torch.recorder import Recorder
from delest.records.trace import Operators, Storages, Trace

STEADY = 2  # the step whose operators stand for all later ones


@dataclass(frozen=True, kw_only=True)
class Observation:
    """Two steps and an evaluation as they ran. The trace holds this batch only: all its bytes and flops are fixed."""

    trace: Trace
    seconds: list[float]  # of each operator of the trace
    allocated_bytes: int | None  # highest sum of live tensors and kernels' scratch in a third step; None on a GPU


def observe(loop: Loop, rows: int) -> Observation:
    """Run a loop's first two steps and an evaluation on a batch of `rows` rows under watch, then one more step under torch's
    profiler where the device is a CPU."""
    batch = loop.batch(rows)
    recorder = Recorder(loop.model)
    timer = _Timer(recorder, next((parameter.device for parameter in loop.model.parameters()), torch.device("cpu")))
    with timer, recorder:
        recorder.register_model(loop.model)
        recorder.register(tensors_of(batch), "data")
        for step in (1, STEADY):
            for optimizer in loop.optimizers:
                recorder.register_optimizer(optimizer, loop.model)
            recorder.begin(step, "forward")
            loop.step(batch, recorder)
        gc.collect()
        recorder.begin(STEADY + 1, "evaluation")
        loop.evaluate(batch)
    seconds = [timer.seconds[number] for number in range(len(recorder.rows))]
    trace = _trace_of(recorder, loop, rows)
    allocated = None if timer.on_gpu else recorder.live_bytes() + _highest_allocation(loop, batch)
    return Observation(trace=trace, seconds=seconds, allocated_bytes=allocated)


class _Timer(TorchDispatchMode):
    """Seconds of each operator that a recorder, which is entered after this, passes on to its kernel."""

    def __init__(self, recorder: Recorder, device: torch.device):
        super().__init__()
        self.recorder, self.on_gpu = recorder, device.type == "cuda"
        # The CPU time of a single thread is not disturbed by whatever else runs on this machine.
        self._clock = time.process_time if torch.get_num_threads() == 1 and not self.on_gpu else time.perf_counter
        self.seconds: dict[int, float] = defaultdict(float)  # by number of the operator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._wait()
        begin = self._clock()
        outputs = func(*args, **(kwargs or {}))
        self._wait()
        self.seconds[len(self.recorder.rows)] += self._clock() - begin
        return outputs

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def _highest_allocation(loop: Loop, batch: Any) -> int:
    """Bytes that a step adds at most to what is allocated before it: the running sum of the allocator's own events."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        loop.step(batch, Recorder())
    results: Any = profiler.profiler
    total = highest = 0
    for event in results.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            highest = max(highest, total)
    return highest


def _trace_of(recorder: Recorder, loop: Loop, rows: int) -> Trace:
    watched, nothing = recorder.rows, [0.0] * len(recorder.rows)
    state = ("parameters", "buffers", "optimizer")
    return Trace(
        storages=Storages(
            born=list(recorder.born),
            dies=[min(position, len(watched)) for position in recorder.dies],
            fixed_bytes=[float(size) for size in recorder.bytes],
            per_sample_bytes=[0.0] * len(recorder.bytes),
            category=list(recorder.category),
            module=list(recorder.storage_module),
        ),
        operators=Operators(
            name=[row[0] for row in watched],
            module=[row[1] for row in watched],
            phase=[row[2] for row in watched],
            step=[row[3] for row in watched],
            reads=[row[4] for row in watched],
            writes=[row[5] for row in watched],
            kind=[row[6].kind for row in watched],
            dtype=[row[6].dtype for row in watched],
            fixed_flops=[row[6].flops for row in watched],
            per_sample_flops=nothing,
            fixed_moved_bytes=[row[6].moved_bytes for row in watched],
            per_sample_moved_bytes=nothing,
            fixed_scratch_bytes=nothing,
            per_sample_scratch_bytes=nothing,
            signature=[""] * len(watched),
        ),
        rows=(rows, rows),
        how="real tensors",
        optimizer="+".join(type(optimizer).__name__ for optimizer in loop.optimizers),
        state_bytes=sum(size for size, kind in zip(recorder.bytes, recorder.category, strict=True) if kind in state),
        modules={name: type(module).__name__ for name, module in loop.model.named_modules()},
    )


def sum_by_module(operators: Operators, values: list[float]) -> dict[str, float]:
    """What the operators of a steady step sum to by module, those of the modules inside included; "" is the whole step."""
    sums: dict[str, float] = defaultdict(float)
    for step, module, value in zip(operators.step, operators.module, values, strict=True):
        if step != STEADY:
            continue
        sums[""] += value
        while module:
            sums[module] += value
            module = module.rpartition(".")[0]
    return dict(sums)
