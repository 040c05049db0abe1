"""The roofline of this machine: what its kernels and its memory reach, by micro-probes that run once and are kept.

Rates are those of the operators that training spends its time in, called as training calls them (forward and backward,
from Python, on ordinary contiguous tensors): not the most that the hardware could do.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from delest import errors, processes
from delest.hardware import machine, probes, slow_kernels
from delest.records.form import from_json
from delest.records.hardware import Hardware, Roofline

_FORMATS = {
    "cpu": {"fp32": "float32", "bf16": "bfloat16"},
    "cuda": {"fp32": "float32", "tf32": "float32", "fp16": "float16", "bf16": "bfloat16"},
}
BUSY = "measured while the machine was busy: times are too long"
_HOPELESS = 10.0  # a format this many times slower than fp32 is timed once: nobody will choose it
_PROBE_SECONDS = 0.1  # for each rate; eight kernels, four bandwidths and torch's import stay near six seconds
_FLOAT_BYTES = 4


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Operands that keep a GPU, or one core, busy for some milliseconds, so that what a launch costs does not show."""

    rows: int  # of the left matrix
    matmul: int  # side of the right one, which is square
    convolution: tuple[int, int, int]  # batch, channels, side of the image; 3x3 kernels
    depthwise: tuple[int, int, int]
    attention: tuple[int, int, int, int]  # batch, heads, tokens, features of a head
    memory_bytes: int  # of one tensor, far beyond the last cache


_SIZES = {
    "cpu": _Sizes(512, 512, (4, 64, 28), (4, 144, 56), (2, 8, 256, 64), 64 << 20),
    "cuda": _Sizes(4096, 4096, (64, 256, 28), (64, 384, 28), (16, 16, 1024, 64), 256 << 20),
}


def measure_roofline(threads: int | None = None, *, device: str = "cpu") -> Roofline:
    """What this machine reaches with so many threads (default: all its cores), or its first GPU with `device="cuda"`.

    The first time it takes about six seconds in a process of its own; then it is read from the cache, which is by
    processor, instruction sets, torch version, threads and GPU. Rates are a second: `flops` by kind (matmul, convolution,
    depthwise, attention) and format, where a kernel that raises is left out; a multiply-add is 2. fp32 is what PyTorch
    does unless told otherwise, so on a GPU convolutions use TF32 units where there are some and matrix products do not.

    Raises `BadInput` for an unknown device, a GPU that cannot be used, or less than one thread; `ProbeFailed`.
    """
    threads = _check(threads, device)
    known, busy = _kept(threads, device), _is_busy()
    if known is not None and (BUSY not in known.source or busy):
        return known
    fixed = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)} if threads else {}
    measured = processes.call("delest.hardware.roofline:_probe", None, environment=fixed, threads=threads, device=device)
    if busy:
        measured["source"] += f", {BUSY}"
    probes.keep("roofline", _key(threads, device), measured)
    return from_json(Roofline, measured)


def _is_busy() -> bool:
    """Whether others have kept this machine busy in the last minute: threads that wait for each other then show far too low
    rates, and a quiet moment must measure anew."""
    return os.getloadavg()[0] > 0.6 * (os.cpu_count() or 1)


def known_roofline(threads: int | None = None, *, device: str = "cpu") -> Roofline | None:
    """What `measure_roofline` kept for these threads and this device, None where it has not run."""
    return _kept(_check(threads, device), device)


def _kept(threads: int | None, device: str) -> Roofline | None:
    known = probes.kept("roofline", _key(threads, device))
    try:
        return None if known is None else from_json(Roofline, known)
    except errors.BadInput:  # of another version of delest
        return None


def _check(threads: int | None, device: str) -> int | None:
    """The number of threads that is meant, None for a GPU, whose rates do not depend on it."""
    if device not in _FORMATS:
        raise errors.BadInput(f"a roofline of {device!r} cannot be measured: use {' or '.join(_FORMATS)}.")
    if threads is not None and threads < 1:
        raise errors.BadInput(f"{threads} threads cannot compute: give 1 or more.")
    if device == "cpu":
        return threads or machine.describe().cores
    from delest.hardware.accelerators import find_accelerators

    found = find_accelerators()
    if not any(gpu.usable for gpu in found):
        why = "; ".join(f"{gpu.name}: {gpu.remedy}" for gpu in found) or "no GPU was found on this machine"
        raise errors.BadInput(f"a roofline of cuda cannot be measured: {why}. `delest doctor` says more.")
    return None


def _key(threads: int | None, device: str) -> list[Any]:
    if device == "cpu":
        return probes.machine_key(threads)
    from delest.hardware.accelerators import find_accelerators

    names = [gpu.name for gpu in find_accelerators()]
    return probes.machine_key(threads, device, os.environ.get("CUDA_VISIBLE_DEVICES", ""), *names)


def _probe(threads: int | None, device: str) -> dict[str, Any]:
    """Measure in this process, which is thought to do nothing else; the record as plain data."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    slow_kernels.hold_memory()
    clock = _clock(torch, threads, device)
    sizes, here, on_gpu = _SIZES[device], machine.describe(), device == "cuda"
    beyond = min(max(sizes.memory_bytes, *here.cache_bytes.values(), 0), here.available_bytes // 8)  # three of them are needed
    reused = _added_bytes(torch, device, beyond, clock)
    return dataclasses.asdict(
        Roofline(
            device=torch.cuda.get_device_name() if on_gpu else here.processor,
            threads=threads,
            flops=dict(_time_kernels(torch, device, _widened(sizes, threads or 1), clock)),
            reused_bytes=reused,
            fresh_bytes=reused if on_gpu else _fresh_bytes(torch, sizes.memory_bytes, clock),
            cached_bytes=_added_bytes(torch, device, _cached_size(torch, here, device), clock),
            overhead_seconds=_overhead_seconds(torch, device, clock),
            kernel_bytes={} if on_gpu else dict(slow_kernels.time_kernels(torch, clock)),
            host_to_device_bytes=_host_to_device_bytes(torch, sizes.memory_bytes, clock) if on_gpu else None,
            source=f"micro-probes under torch {torch.__version__}",
        )
    )


def _widened(sizes: _Sizes, threads: int) -> _Sizes:
    """The same work for each thread: batches so many times larger, up to eight, which stays below a gigabyte."""
    times = min(threads, 8)
    convolution, depthwise, attention = (
        (shape[0] * times, *shape[1:]) for shape in (sizes.convolution, sizes.depthwise, sizes.attention)
    )
    return dataclasses.replace(
        sizes, rows=sizes.rows * times, convolution=convolution, depthwise=depthwise, attention=attention
    )


def _clock(torch: Any, threads: int | None, device: str) -> Callable[[], float]:
    """Seconds: of one thread its CPU time, which a busy neighbour disturbs less; of a GPU after it has finished."""
    if device == "cuda":

        def finished() -> float:
            torch.cuda.synchronize()
            return time.perf_counter()

        return finished
    return time.process_time if threads == 1 else time.perf_counter


def _time_kernels(torch: Any, device: str, sizes: _Sizes, clock: Callable[[], float]) -> Iterator[tuple[str, float]]:
    """Flops a second of each kind and format; formats that raise are left out."""
    builders = {"matmul": _matmul, "convolution": _convolution, "depthwise": _depthwise, "attention": _attention}
    for kind, build in builders.items():
        plain = float("inf")
        for name, dtype in _FORMATS[device].items():
            if name == "tf32" and kind != "matmul":
                continue  # fp32 convolutions use it already, the rest cannot
            kernel, flops = build(torch, sizes, getattr(torch, dtype), device)
            torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
            seconds = probes.best_seconds(kernel, _HOPELESS * plain, limit_seconds=_PROBE_SECONDS, clock=clock)
            if name == "fp32":
                plain = seconds
            if seconds < float("inf"):
                yield f"{kind}.{name}", flops / seconds


def _matmul(torch: Any, sizes: _Sizes, dtype: Any, device: str) -> tuple[Callable[[], object], float]:
    left, right = (torch.ones(rows, sizes.matmul, dtype=dtype, device=device) for rows in (sizes.rows, sizes.matmul))
    return lambda: left @ right, 2.0 * sizes.rows * sizes.matmul**2


def _convolution(torch: Any, sizes: _Sizes, dtype: Any, device: str) -> tuple[Callable[[], object], float]:
    return _convolve(torch, sizes.convolution, sizes.convolution[1], dtype, device)


def _depthwise(torch: Any, sizes: _Sizes, dtype: Any, device: str) -> tuple[Callable[[], object], float]:
    return _convolve(torch, sizes.depthwise, 1, dtype, device)


def _convolve(
    torch: Any, shape: tuple[int, int, int], inputs_each: int, dtype: Any, device: str
) -> tuple[Callable[[], object], float]:
    """A 3x3 convolution, each output channel of which reads `inputs_each` input channels; the backward pass does it twice."""
    batch, channels, side = shape
    images = torch.ones(batch, channels, side, side, dtype=dtype, device=device, requires_grad=True)  # [B, C, H, W]
    weight = torch.ones(channels, inputs_each, 3, 3, dtype=dtype, device=device, requires_grad=True)
    groups = channels // inputs_each
    gradient = torch.ones_like(images)

    def forward_and_backward() -> object:
        output = torch.nn.functional.conv2d(images, weight, padding=1, groups=groups)
        return torch.autograd.grad(output, (images, weight), gradient)

    return forward_and_backward, 3 * 2.0 * batch * channels * inputs_each * 9 * side**2


def _attention(torch: Any, sizes: _Sizes, dtype: Any, device: str) -> tuple[Callable[[], object], float]:
    """Two matrix products forward; five backward, since the scores are computed again (arXiv 2205.14135, algorithm 4)."""
    batch, heads, tokens, features = shape = sizes.attention
    parts = tuple(torch.ones(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3))  # each [B, H, T, D]
    gradient = torch.ones_like(parts[0])

    def forward_and_backward() -> object:
        output = torch.nn.functional.scaled_dot_product_attention(*parts)
        return torch.autograd.grad(output, parts, gradient)

    return forward_and_backward, 7 * 2.0 * batch * heads * tokens**2 * features


def _added_bytes(torch: Any, device: str, size: int, clock: Callable[[], float]) -> float:
    """Bytes a second, read and written, of adding two tensors of `size` bytes into a third that has been written before."""
    left, right, total = (torch.ones(size // _FLOAT_BYTES, device=device) for _ in range(3))
    repeats = max(1, (8 << 20) // size)  # a small addition ends before the clock ticks

    def add() -> None:
        for _ in range(repeats):
            torch.add(left, right, out=total)

    return 3.0 * size * repeats / probes.best_seconds(add, limit_seconds=_PROBE_SECONDS, clock=clock)


def _cached_size(torch: Any, here: Hardware, device: str) -> int:
    """Bytes of a tensor of which three fill a quarter of the last cache: it is shared with other cores."""
    if device == "cuda":
        cache = torch.cuda.get_device_properties(0).L2_cache_size
    else:
        cache = max(here.cache_bytes.values(), default=1 << 20)
    return int(cache) // 12 // 64 * 64


def _fresh_bytes(torch: Any, size: int, clock: Callable[[], float]) -> float:
    """Bytes a second written into memory that the system maps for it, as glibc does for every tensor above 32 MiB
    (mallopt(3), M_MMAP_THRESHOLD): each page is faulted in and cleared first, and given back in the end."""

    def write() -> None:
        with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as fresh:
            tensor = torch.frombuffer(fresh, dtype=torch.float32)
            tensor.fill_(1.0)
            del tensor  # a mapping in use cannot be closed

    return size / probes.best_seconds(write, limit_seconds=_PROBE_SECONDS, clock=clock)


def _overhead_seconds(torch: Any, device: str, clock: Callable[[], float]) -> float:
    """Seconds that a small operator costs, forward and backward averaged: a chain of products of 16 numbers."""
    start, factor, calls = torch.ones(16, device=device, requires_grad=True), torch.ones(16, device=device), 200

    def chain() -> None:
        value = start
        for _ in range(calls):
            value = value * factor
        torch.autograd.grad(value, start, factor)

    return probes.best_seconds(chain, limit_seconds=_PROBE_SECONDS, clock=clock) / (2 * calls)


def _host_to_device_bytes(torch: Any, size: int, clock: Callable[[], float]) -> float:
    """Bytes a second of a copy from page-locked memory to the GPU."""
    host = torch.ones(size // _FLOAT_BYTES, pin_memory=True)
    there = torch.empty_like(host, device="cuda")
    return size / probes.best_seconds(lambda: there.copy_(host, non_blocking=True), limit_seconds=_PROBE_SECONDS, clock=clock)
