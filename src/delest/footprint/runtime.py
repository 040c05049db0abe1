"""What a process holds beside the tensors of a training: Python, torch and its libraries, idle and at work."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from delest import malloc, processes
from delest.backends.torch import session as _session  # noqa: F401  a job's process loads it
from delest.backends.torch.lean import bare_step, spare_the_compiler
from delest.data import Feed, Preprocessing, open_job
from delest.hardware import machine, probes
from delest.job import Job
from delest.records.form import from_json

MAPPED = malloc.environment("mmap")  # freed blocks go back at once (mallopt(3)), so that only libraries hold on


Build = Callable[[int, int], tuple[nn.Module, torch.Tensor]]


@dataclass(frozen=True)
class Runtime:
    """Resident bytes."""

    idle_bytes: int  # of a process that has imported torch and has made two tiny steps, with torch's own optimizers
    lean_bytes: int  # the same where optimizers do not load torch's compiler, as in delest's own sessions
    touched_bytes: int  # more while it trains, beyond tensors: libraries' buffers and code that only larger operands call for


def measure_runtime(threads: int) -> Runtime:
    """What this machine's torch holds with so many threads; measured once, in a process of its own, and kept."""
    key = probes.machine_key(threads)
    kept = probes.kept("runtime", key)
    if not isinstance(kept, dict) or "lean" not in kept:
        kept = processes.call(
            f"{__name__}:measure", None, environment={**MAPPED, "OMP_NUM_THREADS": str(threads)}, threads=threads
        )
        probes.keep("runtime", key, kept)
    return Runtime(int(kept["idle"]), int(kept["lean"]), int(kept["touched"]))


def measure(threads: int) -> dict[str, Any]:
    """`measure_runtime` in this process, which is thought to be fresh.

    What is touched is the growth of the resident set over steps of two networks of middling size, less the most that
    torch's allocator had given out meanwhile.
    """
    torch.set_num_threads(threads)
    spare_the_compiler()
    for network in TINY:
        _train(*network)
    lean, touched = _settled(), 0
    importlib.import_module("torch._dynamo")  # what building and stepping torch's optimizers loads otherwise

    for network in TINY:
        _train(*network)
    idle = _settled()
    for network in MIDDLING:
        before = _settled()
        machine.reset_peak()
        _train(*network)
        grown = machine.peak_resident_bytes() - before
        _settled()
        touched += max(0, grown - _allocated(*network))
    return {"idle": idle, "lean": lean, "touched": touched}


def idle_of_job(job: Job, *, preprocessing: dict[str, Any], index: list[int], threads: int) -> int:
    """Resident bytes of this process, thought to be fresh, once it has opened a job's data, read the rows `index` and made tiny steps
    of networks that are not the job's: its own is never built."""
    torch.set_num_threads(threads)
    feed = Feed(open_job(job), np.array(index), from_json(Preprocessing, preprocessing), batch_size=len(index))
    next(iter(feed.ordered()))
    spare_the_compiler()
    for network in TINY:
        _train(*network)
    return _settled()


def _convolutional(channels: int, side: int) -> tuple[nn.Module, torch.Tensor]:
    layers: list[nn.Module] = []
    for given in (3, channels, channels):
        layers += [nn.Conv2d(given, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.LazyLinear(16)), torch.zeros(8, 3, side, side)


def _attending(features: int, tokens: int) -> tuple[nn.Module, torch.Tensor]:
    layer = nn.TransformerEncoderLayer(features, 4, 4 * features, batch_first=True, activation="gelu")
    return nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(16)), torch.zeros(8, tokens, features)


def _dense(features: int, side: int) -> tuple[nn.Module, torch.Tensor]:
    """Matrix products of the size for which libraries copy operands into buffers of their own."""
    layers = (nn.Linear(features * side, 1024), nn.GELU(), nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, 16))
    return nn.Sequential(*layers), torch.zeros(256, features * side)


TINY: tuple[tuple[Build, int, int], ...] = ((_convolutional, 8, 16), (_attending, 16, 8))
MIDDLING: tuple[tuple[Build, int, int], ...] = ((_convolutional, 64, 64), (_attending, 256, 128), (_dense, 64, 64))


def _train(build: Build, size: int, side: int) -> None:
    """Build a network and make two steps; all is given back."""
    model, inputs = build(size, side)
    model(inputs[:2])  # lazy layers take their shape
    optimizer = torch.optim.AdamW(model.parameters())
    targets = torch.zeros(len(inputs), dtype=torch.int64)
    for _ in range(2):
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), targets).backward()
        bare_step(optimizer)()


def _allocated(build: Build, size: int, side: int) -> int:
    """The most that torch's allocator has given out at once during the same."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        _train(build, size, side)
    live = highest = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            highest = max(highest, live)
    return highest


def _settled() -> int:
    gc.collect()
    malloc.give_back()
    return machine.resident_bytes()
