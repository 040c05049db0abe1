"""Bytes a second of a processor's common kernels that are slower than the memory they work on: normalisations, softmax, random numbers.

What holds them up is arithmetic that no count of flops describes (exponentials, several passes, a generator that gives one
number after another), so each is timed as training calls it, on operands of the size that activations have.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

from delest.hardware import probes

_SECONDS = 0.04  # for each kernel
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_THRESHOLD = 32 << 20  # mallopt(3): on machines of 64 bits


def hold_memory() -> None:
    """Have glibc keep what this process frees, so that what kernels are timed at is free of page faults, which are a rate of
    their own. Does nothing under another C library."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
        mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)


def time_kernels(torch: Any, clock: Callable[[], float]) -> Iterator[tuple[str, float]]:
    """Name of the kernel with its format, bytes read and written a second; those that raise are left out."""
    for name, (kernel, moved) in _kernels(torch).items():
        seconds = probes.best_seconds(kernel, limit_seconds=_SECONDS, clock=clock)
        if seconds < float("inf"):
            yield f"{name}.fp32", moved / seconds


def _kernels(torch: Any) -> dict[str, tuple[Callable[[], object], float]]:
    """By name a call and the bytes that it moves, each operand once."""
    aten = torch.ops.aten
    images, flowing = (torch.randn(32, 64, 28, 28) for _ in range(2))  # [B, C, H, W], 6.4 MB
    rows, passing = (torch.randn(4096, 384) for _ in range(2))  # [B, D], as large
    scores = rows.log_softmax(1)
    classes = torch.randn(32, 384, 128)  # [B, C, T], as large
    class_scores = classes.log_softmax(1)
    kernel = torch.randn(64, 1, 3, 3)
    weight, bias, mean, deviation = (torch.ones(64) for _ in range(4))
    scale, shift = (torch.ones(384) for _ in range(2))
    _, row_mean, row_deviation = aten.native_layer_norm(rows, [384], scale, shift, 1e-5)
    image, row = 4.0 * images.numel(), 4.0 * rows.numel()
    train = (True, 1e-5, [True, True, True])
    shape = ([1, 1], [1, 1], [1, 1], False, [0, 0], 64)

    def depthwise() -> None:
        aten.convolution(images, kernel, None, *shape)
        aten.convolution_backward(flowing, images, kernel, None, *shape, [True, True, False])

    return {
        "depthwise": (depthwise, 6 * image),  # either gradient reads the output's
        "batch_norm": (lambda: aten.native_batch_norm(images, weight, bias, mean, deviation, True, 0.1, 1e-5), 2 * image),
        "batch_norm_backward": (
            lambda: aten.native_batch_norm_backward(flowing, images, weight, mean, deviation, mean, deviation, *train),
            3 * image,
        ),
        "layer_norm": (lambda: aten.native_layer_norm(rows, [384], scale, shift, 1e-5), 2 * row),
        "layer_norm_backward": (
            lambda: aten.native_layer_norm_backward(passing, rows, [384], row_mean, row_deviation, scale, shift, [True] * 3),
            3 * row,
        ),
        # A quarter as many values and positions, which have eight bytes.
        "max_pool": (lambda: aten.max_pool2d_with_indices(images, [2, 2], [2, 2]), image * (1 + 1 / 4 + 2 / 4)),
        "softmax": (lambda: aten._log_softmax(rows, 1, False), 2 * row),
        "softmax_backward": (lambda: aten._log_softmax_backward_data(passing, scores, 1, torch.float32), 3 * row),
        "softmax_across": (lambda: aten._log_softmax(classes, 1, False), 2 * row),
        "softmax_across_backward": (
            lambda: aten._log_softmax_backward_data(classes, class_scores, 1, torch.float32),
            3 * row,
        ),
        "activation": (lambda: aten.gelu(rows), 2 * row),
        "activation_backward": (lambda: aten.gelu_backward(passing, rows), 3 * row),
        "random": (lambda: torch.empty_like(rows).bernoulli_(0.5), row),
        "reduction": (lambda: rows.sum(0), row),
    }
