"""The malloc that a process has, by name: how the environment of a process that starts asks for one, and which one this process has.

PyTorch takes CPU tensors from it. `glibc` is the C library's as it comes, which keeps freed blocks; `mmap` the same with a fixed threshold
from which on each block is a mapping that goes back when it is freed (mallopt(3)); `tcmalloc` and `jemalloc` come before it as
libraries (ld.so(8), LD_PRELOAD), where the system has them.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

from delest import errors

LIBRARIES = {
    "tcmalloc": ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4"),
    "jemalloc": ("libjemalloc.so.2",),
}
NAMES = ("glibc", "mmap", *LIBRARIES)
THRESHOLD_BYTES = 64 << 10
_LARGEST_THRESHOLD_BYTES = 32 << 20  # up to which glibc's own threshold moves on machines of 64 bits
_THRESHOLD_VARIABLE, _TUNABLE = "MALLOC_MMAP_THRESHOLD_", "glibc.malloc.mmap_threshold"
_FOLDERS = ("/usr/lib", "/usr/lib64", "/lib", "/usr/local/lib", f"/usr/lib/{platform.machine()}-linux-gnu")
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of mallopt(3)
_TRIM_THRESHOLD_BYTES, _MOST_MAPPINGS = 128 << 10, 65536  # its defaults
_BEYOND_CACHES_BYTES = 16 << 10  # of a block that no thread's cache has
_NOT_MAIN_HEAP = 4  # in the word before a block (glibc's malloc.c: NON_MAIN_ARENA)
_ALL_ARENAS = b"arena.4096.purge"  # jemalloc(3), MALLCTL_ARENAS_ALL
_fixed = _kept = False  # this process's threshold, and what it frees, after it started


def is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"


def others() -> tuple[str, ...]:
    """What this machine can give a process in place of its default, by name."""
    if not is_glibc():
        return ()
    return ("mmap", *(name for name in LIBRARIES if _library(name) is not None))


def environment(name: str, given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that a process must be started with so that it has this malloc; none for the default.

    `given` is the environment that they go over. Raises `BadInput` for a name that is not known and for a library that is not here.
    """
    if name not in NAMES:
        raise errors.BadInput(f"unknown allocator {name!r}: use {', '.join(NAMES)}.")
    if name == "glibc":
        return {}
    if name == "mmap":
        return {_THRESHOLD_VARIABLE: str(THRESHOLD_BYTES)}
    found = _library(name)
    if found is None:
        raise errors.BadInput(
            f"the allocator {name} is not on this system ({' or '.join(LIBRARIES[name])} in {', '.join(map(str, _folders()))}): "
            "install it with the system's packages, or make a plan here."
        )
    return {"LD_PRELOAD": ":".join([str(found), *filter(None, [given.get("LD_PRELOAD")])])}


def started_with(variables: Mapping[str, str] = os.environ) -> str:
    """The malloc that an environment asks for."""
    loaded = variables.get("LD_PRELOAD", "")
    for name, files in LIBRARIES.items():
        if any(file.partition(".so")[0] in loaded for file in files):
            return name
    fixed = _THRESHOLD_VARIABLE in variables or _TUNABLE in variables.get("GLIBC_TUNABLES", "")
    return "mmap" if fixed else "glibc"


def current() -> str:
    """The malloc that this process has."""
    this = ctypes.CDLL(None)
    for name, function in (("tcmalloc", "MallocExtension_ReleaseFreeMemory"), ("jemalloc", "mallctl")):
        if hasattr(this, function):
            return name
    started = started_with()
    return "mmap" if _fixed or started == "mmap" else "glibc"


def is_tuned(variables: Mapping[str, str] = os.environ) -> bool:
    """Whether somebody has said how this process's malloc treats what is freed: by another library, a variable, or `fix_threshold`."""
    asked = any(name.startswith("MALLOC_") and name.endswith("_") for name in variables)
    return asked or "glibc.malloc." in variables.get("GLIBC_TUNABLES", "") or current() != "glibc"


def fix_threshold() -> bool:
    """Fix the threshold in this process, for as long as it lives; False where its malloc has none."""
    global _fixed, _kept
    if current() in LIBRARIES or not _mallopt(THRESHOLD_BYTES, _TRIM_THRESHOLD_BYTES):
        return False
    _fixed, _kept = True, False
    give_back()
    return True


def move_threshold() -> bool:
    """Have the threshold where glibc itself moves it to in a process that allocates large blocks: what is freed is kept.

    For the two to be timed beside each other in one process, which glibc's own moving of it does not survive.
    """
    global _fixed, _kept
    moved = current() not in LIBRARIES and _mallopt(_LARGEST_THRESHOLD_BYTES, 2 * _LARGEST_THRESHOLD_BYTES)
    _fixed, _kept = _fixed and not moved, _kept and not moved
    return moved


def keep_freed() -> bool:
    """Keep what is freed, large blocks too, until `move_threshold` or `fix_threshold`: no page is cleared twice. (In a heap of a thread's own blocks of 64 MiB and more are mapped
    all the same.) What is free goes back before each fork, whose child has its own way. False where that cannot be asked for."""
    global _fixed, _kept
    kept = current() not in LIBRARIES and _mallopt(_LARGEST_THRESHOLD_BYTES, -1, 0)
    _fixed, _kept = _fixed and not kept, _kept or kept
    return kept


def _before_fork() -> None:
    if _kept:  # else both processes would have a copy of what is free, once it is used again
        give_back()


def _in_child() -> None:
    if _kept:
        move_threshold()


os.register_at_fork(before=_before_fork, after_in_child=_in_child)


def free_bytes() -> int:
    """What malloc holds of the heap that no block takes, resident or not; 0 where it does not say (glibc 2.33 and later do, mallinfo2(3))."""
    told = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if told is None or current() in LIBRARIES:
        return 0
    told.restype = _Told
    return int(told().free)


def has_main_heap() -> bool:
    """Whether this thread takes its blocks from the heap of the process's first thread; True where malloc is not glibc's. Else it has one of its own, and what is free in either
    is no room for the other."""
    if not is_glibc() or current() in LIBRARIES:
        return True
    this = ctypes.CDLL(None)
    this.malloc.restype, this.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
    block = this.malloc(ctypes.c_size_t(_BEYOND_CACHES_BYTES))
    if not block:
        return True
    sizes = ctypes.c_size_t.from_address(block - ctypes.sizeof(ctypes.c_size_t)).value
    this.free(block)
    return not sizes & _NOT_MAIN_HEAP


class _Told(ctypes.Structure):
    """mallinfo2's answer: ten sizes, of which the ninth is free."""

    _fields_ = (("before", ctypes.c_size_t * 8), ("free", ctypes.c_size_t), ("top", ctypes.c_size_t))


def give_back() -> None:
    """Have malloc give back to the system what is free; other C libraries keep theirs."""
    this = ctypes.CDLL(None)
    if hasattr(this, "MallocExtension_ReleaseFreeMemory"):
        this.MallocExtension_ReleaseFreeMemory()
    elif hasattr(this, "mallctl"):
        this.mallctl(_ALL_ARENAS, None, None, None, ctypes.c_size_t(0))
    elif hasattr(this, "malloc_trim"):
        this.malloc_trim(0)


def _mallopt(threshold_bytes: int, trim_bytes: int, mappings: int = _MOST_MAPPINGS) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not is_glibc():
        return False
    asked = {_MMAP_THRESHOLD: threshold_bytes, _TRIM_THRESHOLD: trim_bytes, _MMAP_MAX: mappings}
    return all(mallopt(option, value) for option, value in asked.items())


def _library(name: str) -> Path | None:
    return next((path for file in LIBRARIES[name] for folder in _folders() if (path := folder / file).is_file()), None)


def _folders() -> list[Path]:
    named = [Path(folder) for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":") if folder]
    return [*named, Path(sys.prefix, "lib"), *map(Path, _FOLDERS)]
