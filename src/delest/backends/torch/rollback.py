"""What a step that failed must leave as it was, and how an allocation that failed is told from other errors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from delest.backends.torch import randomness

Before = tuple[Callable[[], None], list[Tensor]]

_NO_MEMORY = ("DefaultCPUAllocator", "could not create a memory", "bad_alloc")
# oneDNN's words for memory that it could not get, as for much else: believed where a limit is held.
_NO_MEMORY_UNDER_LIMIT = ("could not create a primitive", "could not execute a primitive")


def remember(model: nn.Module) -> Before:
    """Random state and buffers, copied."""
    return randomness.hold(), [buffer.clone() for buffer in model.buffers()]


def restore(model: nn.Module, before: Before) -> None:
    """Random state and buffers as `remember` found them."""
    before[0]()
    with torch.no_grad():
        for buffer, kept in zip(model.buffers(), before[1], strict=True):
            buffer.copy_(kept)


def is_out_of_memory(error: BaseException, limited: bool) -> bool:
    """CUDA has a class for it, Python and NumPy have one; on a CPU torch raises a plain RuntimeError with these words.

    `limited`: this process's memory is held within a limit.
    """
    words = str(error)
    known = _NO_MEMORY + (_NO_MEMORY_UNDER_LIMIT if limited else ())
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "descriptor" not in words and any(some in words for some in known)
    )


def first_line(error: BaseException) -> str:
    """Its message without what torch appends to it."""
    return next(iter(str(error).splitlines()), "")
