"""Micro-probes: kernels timed once a machine and kept, among them what a number format costs."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from delest import errors, storage
from delest.hardware import machine
from delest.records.form import read_object

GAIN = 1.1  # a bf16 kernel must be this many times faster: less is lost again in casts
_KERNEL_SECONDS = 0.03
_TURNS_SECONDS, _LEAST_CALLS = 0.1, 8
_LONG_SECONDS = 0.1  # a call this long is hardly longer for having built its kernel, which takes some milliseconds


def time_precisions() -> dict[str, float]:
    """Processor seconds of a matrix product and of a convolution's forward and backward in fp32 and bf16, on one thread.

    Keys: `matmul_fp32`, `matmul_bf16`, `convolution_fp32`, `convolution_bf16`; a format that the processor's kernels
    refuse is infinite. Takes about 0.2 s, once a machine: processor, instruction sets and torch version. Several threads would wait
    for each other where others keep the machine busy, and that would be kept.
    """
    import torch

    key = machine_key(1)
    known = kept("precisions", key)
    if known is not None and known.keys() == set(_KERNELS):
        return {kernel: math.inf if seconds is None else seconds for kernel, seconds in known.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        measured = _time_kernels(torch)
    finally:
        torch.set_num_threads(threads)
    keep("precisions", key, {kernel: seconds if math.isfinite(seconds) else None for kernel, seconds in measured.items()})
    return measured


def bf16_gains() -> bool:
    """Whether bf16 makes both matrix products and convolutions faster on this machine."""
    seconds = time_precisions()
    return all(seconds[f"{kernel}_fp32"] > GAIN * seconds[f"{kernel}_bf16"] for kernel in ("matmul", "convolution"))


def machine_key(threads: int | None, *more: str) -> list[Any]:
    """What the time of a kernel depends on: processor, instruction sets, torch version, threads; JSON."""
    here = machine.describe()
    return [here.processor, list(here.instruction_sets), importlib.metadata.version("torch"), threads, *more]


def kept(kind: str, key: list[Any]) -> Any:
    """What `keep` wrote under a kind and a key, JSON; None where it wrote nothing, or where the file is damaged.

    Raises `BadInput` for a cache folder that cannot be used.
    """
    path = _path(kind, key)
    try:
        return read_object(path).get("probed")
    except (errors.BadInput, OSError):
        return None


def keep(kind: str, key: list[Any], probed: Any) -> None:
    """Write what was probed, a record or a mapping, into the cache. Raises `BadInput` where it cannot be used."""
    with storage.cache_reported():
        storage.write_json(_path(kind, key), {"machine": key, "probed": probed})


def _path(kind: str, key: list[Any]) -> Path:
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    with storage.cache_reported():
        return storage.cache_folder("probes") / f"{kind}-{name}.json"


def best_seconds(
    kernel: Callable[[], object],
    hopeless_seconds: float = math.inf,
    *,
    limit_seconds: float = _KERNEL_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """The fastest of up to 20 calls within `limit_seconds`, after one that is not counted: it builds the kernel.

    A kernel that raises is infinite; one slower than `hopeless_seconds` is not called again.
    """
    before = clock()
    try:
        kernel()
    except RuntimeError:
        return math.inf
    first = clock() - before
    if first > max(hopeless_seconds, _LONG_SECONDS):
        return first
    best, started = math.inf, clock()
    for _ in range(20):
        before = clock()
        kernel()
        now = clock()
        best = min(best, now - before)
        if best > hopeless_seconds or now - started > limit_seconds:
            break
    return best


_KERNELS = tuple(f"{kernel}_{precision}" for kernel in ("matmul", "convolution") for precision in ("fp32", "bf16"))


def _time_kernels(torch: Any) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for kernel, build in (("matmul", _matmul), ("convolution", _convolution)):
        names = {f"{kernel}_fp32": build(torch, torch.float32), f"{kernel}_bf16": build(torch, torch.bfloat16)}
        seconds |= best_by_turns(names)
    return seconds


def best_by_turns(
    kernels: Mapping[str, Callable[[], object]], *, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """The fastest of up to 20 calls of each kernel, by turns, after one that is not counted; infinite where it raises.

    A call right after another process had the core is slower than the next, and what is found here is kept: none is judged by fewer
    than `_LEAST_CALLS`, however long they take.
    """
    best = dict.fromkeys(kernels, math.inf)
    working, started = dict(kernels), clock()
    for number in range(21):
        for name, kernel in list(working.items()):
            before = clock()
            try:
                kernel()
            except RuntimeError:
                del working[name]
                continue
            if number:
                best[name] = min(best[name], clock() - before)
        if number >= _LEAST_CALLS and clock() - started > _TURNS_SECONDS:
            break
    return best


def _matmul(torch: Any, dtype: Any) -> Callable[[], object]:
    left, right = torch.ones(128, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype)
    return lambda: left @ right


def _convolution(torch: Any, dtype: Any) -> Callable[[], object]:
    images = torch.ones(4, 32, 16, 16, dtype=dtype, requires_grad=True)  # [B, C, H, W]
    weight = torch.ones(32, 32, 3, 3, dtype=dtype, requires_grad=True)

    def forward_and_backward() -> object:
        output = torch.nn.functional.conv2d(images, weight, padding=1)
        return torch.autograd.grad(output, (images, weight), torch.ones_like(output))

    return forward_and_backward
