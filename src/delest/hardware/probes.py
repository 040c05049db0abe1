"""Micro-probes: what a number format costs on this machine, timed once and kept."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from typing import Any

from delest import storage
from delest.hardware import machine

GAIN = 1.1  # a bf16 kernel must be this many times faster: less is lost again in casts
_SLOWER = 3.0  # a kernel that is this many times slower than fp32 is not timed again
_KERNEL_SECONDS = 0.03


def time_precisions() -> dict[str, float]:
    """Seconds of a matrix product and of a convolution's forward and backward in fp32 and bf16, with torch's threads as set.

    Keys: `matmul_fp32`, `matmul_bf16`, `convolution_fp32`, `convolution_bf16`; a format that the processor's kernels
    refuse is infinite. Takes about 0.2 s, once a machine: processor, instruction sets, torch version and threads.
    """
    import torch

    here = machine.describe()
    key = [here.processor, list(here.instruction_sets), torch.__version__, torch.get_num_threads()]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    path = storage.cache_folder("probes") / f"precisions-{name}.json"
    try:
        known = json.loads(path.read_text())
        return {kernel: math.inf if known["seconds"][kernel] is None else known["seconds"][kernel] for kernel in _KERNELS}
    except (OSError, ValueError, KeyError, TypeError):
        seconds = _time_kernels(torch)
    kept = {kernel: value if math.isfinite(value) else None for kernel, value in seconds.items()}
    storage.write_json(path, {"machine": key, "seconds": kept})
    return seconds


def bf16_gains() -> bool:
    """Whether bf16 makes both matrix products and convolutions faster on this machine."""
    seconds = time_precisions()
    return all(seconds[f"{kernel}_fp32"] > GAIN * seconds[f"{kernel}_bf16"] for kernel in ("matmul", "convolution"))


_KERNELS = tuple(f"{kernel}_{precision}" for kernel in ("matmul", "convolution") for precision in ("fp32", "bf16"))


def _time_kernels(torch: Any) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for kernel, build in (("matmul", _matmul), ("convolution", _convolution)):
        plain = seconds[f"{kernel}_fp32"] = _best_seconds(build(torch, torch.float32), math.inf)
        seconds[f"{kernel}_bf16"] = _best_seconds(build(torch, torch.bfloat16), _SLOWER * plain)
    return seconds


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


def _best_seconds(kernel: Callable[[], object], hopeless_seconds: float) -> float:
    """The fastest of up to 20 calls within `_KERNEL_SECONDS`, after one that is not counted: it builds the kernel."""
    try:
        kernel()
    except RuntimeError:
        return math.inf
    best, started = math.inf, time.perf_counter()
    for _ in range(20):
        before = time.perf_counter()
        kernel()
        now = time.perf_counter()
        best = min(best, now - before)
        if best > hopeless_seconds or now - started > _KERNEL_SECONDS:
            break
    return best
