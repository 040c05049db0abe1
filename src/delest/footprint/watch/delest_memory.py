"""Memory of this process and sizes of tensors, read without touching any of them. Bytes throughout."""

from __future__ import annotations

import collections.abc
import ctypes
import os
import resource
from typing import Any

import torch

READ_SECONDS = 0.25  # at most so often, since reading takes some ten microseconds

_PAGE = os.sysconf("SC_PAGE_SIZE")


class _Heap(ctypes.Structure):
    """`struct mallinfo2` (https://man7.org/linux/man-pages/man3/mallinfo.3.html)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def _find_mallinfo() -> Any:
    try:
        function = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):
        return None  # before glibc 2.33, or another C library
    function.restype = _Heap
    return function


_mallinfo = _find_mallinfo()


def uses_cuda() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def heap(cuda: bool) -> tuple[int, int] | None:
    """(in use, kept free by the allocator); None where the allocator does not say."""
    if cuda:
        used = torch.cuda.memory_allocated()
        return used, torch.cuda.memory_reserved() - used
    if _mallinfo is None:
        return None
    told = _mallinfo()
    return told.uordblks + told.hblkhd, told.fordblks


def resident() -> int:
    """What this process has in RAM now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * _PAGE


def peak_resident() -> int:
    """The most that it has had since it began or `reset_peak` succeeded."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak() -> bool:
    """Start `peak_resident` anew; False where the system does not permit it."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def tensor_bytes(tensor: Any) -> int:
    """Of one tensor; of the tensors inside where it is a subclass that packs others."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) and hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(tensor_bytes(getattr(tensor, name)) for name in names)
    return int(tensor.nbytes)


def tensors_in(value: Any, depth: int = 0) -> list[Any]:
    """The tensors of a batch or of an optimizer's state: in mappings and sequences, four levels down."""
    if isinstance(value, torch.Tensor):
        return [value]
    if depth > 4 or isinstance(value, (str, bytes)):
        return []
    if isinstance(value, collections.abc.Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for item in value for tensor in tensors_in(item, depth + 1)]


class Peaks:
    """The highest memory of the process, that of steady training steps apart from all else."""

    def __init__(self) -> None:
        self.whole = self.steady = 0
        self.cuda = (0, 0)  # allocated, reserved; torch's own counters, which the script may reset and nobody else
        self.is_steady = False  # whether what is being counted belongs to training steps alone
        self.can_reset = True
        self.read_at = 0.0

    def step_ended(self, now: float, must_read: bool) -> None:
        """After a step past warm-up: from here on, or still, the peak is that of steady steps."""
        if self.is_steady:
            if must_read or now - self.read_at > READ_SECONDS:
                self.read(now)
        elif self.can_reset:
            self.read(now)
            self.is_steady = self.can_reset = reset_peak()

    def leave_steps(self) -> None:
        """Something else begins: another loader is drawn from, an epoch has ended."""
        if self.is_steady:
            self.read(self.read_at)
            self.is_steady = False

    def read(self, now: float, cuda: bool = False) -> None:
        self.read_at = now
        peak = peak_resident()
        self.whole = max(self.whole, peak)
        if self.is_steady:
            self.steady = max(self.steady, peak)
        if cuda:
            held = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            self.cuda = max(self.cuda[0], held[0]), max(self.cuda[1], held[1])

    def told(self, cuda: bool) -> dict[str, Any]:
        return {
            "peak_bytes": self.whole,
            "steady_peak_bytes": self.steady or None,
            "cuda_allocated_bytes": self.cuda[0] if cuda else None,
            "cuda_reserved_bytes": self.cuda[1] if cuda else None,
        }
