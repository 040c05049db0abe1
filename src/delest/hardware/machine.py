"""What this machine offers to this process: processor, memory with the limits of control groups, resident memory.

`root` stands for `/` so that another machine's files can be read. Linux only: everything comes from /proc and /sys
(https://docs.kernel.org/filesystems/proc.html, https://docs.kernel.org/admin-guide/cgroup-v2.html).
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from delest import malloc
from delest.records.hardware import Accelerator, Hardware

ROOT = Path("/")
_UNLIMITED = 1 << 60  # version 1 writes the largest number of pages, in bytes, where there is no limit
# Those that decide whether bf16 or int8 arithmetic gains anything; the rest would only make records longer.
INSTRUCTION_SETS = (
    *("sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "amx_fp16"),
    *("asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2", "svebf16", "svei8mm", "sme"),
)


def describe(*, accelerators: bool = False, root: Path = ROOT) -> Hardware:
    """This machine, as far as this process may use it. Sizes in bytes.

    With `accelerators`, GPUs are looked for too, which imports torch where it is installed.
    """
    found: tuple[Accelerator, ...] = ()
    if accelerators:
        from delest.hardware.accelerators import find_accelerators

        found = find_accelerators()
    processor, instruction_sets = _processor(root)
    memory = _sizes(root / "proc/meminfo")
    limits = list(_memory_limits(root, memory["MemTotal"]))
    return Hardware(
        processor=processor,
        cores=_cores(root),
        instruction_sets=instruction_sets,
        memory_bytes=memory["MemTotal"],
        memory_limit_bytes=min((limit for limit, _ in limits), default=None),
        available_bytes=max(0, min([memory["MemAvailable"], *(limit - used for limit, used in limits)])),
        swap_bytes=_swap(root, memory["SwapTotal"]),
        cache_bytes=_caches(root),
        accelerators=found,
    )


def describe_for_report() -> Hardware:
    """This machine with its GPUs. Where Keras computes with another framework in this process torch is not imported, which takes 170 MiB, and does not judge them."""
    if "keras" in sys.modules and "torch" not in sys.modules:
        from delest.hardware.accelerators import listed_accelerators

        return replace(describe(), accelerators=listed_accelerators())
    return describe(accelerators=True)


def resident_bytes() -> int:
    """Memory of this process that is in RAM now."""
    return _sizes(ROOT / "proc/self/status")["VmRSS"]


def peak_resident_bytes() -> int:
    """The most that `resident_bytes` has been since the process began or `reset_peak` succeeded."""
    # Sandboxes that imitate Linux may leave VmHWM out; the kernel's own peak cannot be reset but is never too low.
    peak = _sizes(ROOT / "proc/self/status").get("VmHWM")
    return peak if peak is not None else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def data_and_resident_bytes() -> tuple[int, int] | None:
    """Address space of private data that this process has (what RLIMIT_DATA counts) and what of all its memory is in RAM, at
    one moment; None where the system does not tell the first."""
    sizes = _sizes(ROOT / "proc/self/status")
    return (sizes["VmData"], sizes["VmRSS"]) if "VmData" in sizes else None


class Gauge:
    """This process's own sizes, read again and again from files that stay open: between steps, when caches are full of other things,
    a reading takes a tenth to a quarter of the time of one that opens them. A forked child would read its parent's."""

    def __init__(self) -> None:
        self._statm, self._status = (os.open(f"/proc/self/{name}", os.O_RDONLY) for name in ("statm", "status"))

    def resident_bytes(self) -> int:
        """As the function of that name; the cheapest of all readings."""
        return int(os.pread(self._statm, 128, 0).split(b" ", 2)[1]) * _PAGE_BYTES

    def sizes(self) -> tuple[int, int | None, int | None]:
        """What is resident, what the kernel says was the most, and the address space of private data (`data_and_resident_bytes`), at one
        moment; None for what the system does not tell."""
        found = {name: int(number) * 1024 for name, number in _SIZES.findall(os.pread(self._status, 8192, 0))}
        return found[b"VmRSS"], found.get(b"VmHWM"), found.get(b"VmData")

    def close(self) -> None:
        """Give the files back; once."""
        os.close(self._statm)
        os.close(self._status)


_PAGE_BYTES = resource.getpagesize()
_SIZES = re.compile(rb"(VmRSS|VmHWM|VmData):\s*(\d+) kB")
_ARENA_MAX = -8  # of mallopt(3)


def give_back_unused() -> None:
    """Have malloc give back free memory, where it is one that can."""
    malloc.give_back()


def share_one_heap() -> None:
    """Have glibc give threads that start from now on the heap that is there: one of their own could not use what is free in it."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_ARENA_MAX, 1)


def reset_peak() -> bool:
    """Start `peak_resident_bytes` anew from what is resident now; False where the system does not permit it."""
    try:
        (ROOT / "proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _sizes(path: Path) -> dict[str, int]:
    """The `Name: 123 kB` lines of a /proc file, in bytes."""
    fields = (line.split() for line in path.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in fields if len(words) == 3 and words[2] == "kB"}


def _processor(root: Path) -> tuple[str, tuple[str, ...]]:
    """Name and instruction sets. x86 says `model name` and `flags`, aarch64 `CPU part` and `Features`."""
    fields: dict[str, str] = {}
    for line in (root / "proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or fields.get("Hardware")
    if name is None:
        part = (
            f" (implementer {fields['CPU implementer']}, part {fields.get('CPU part')})" if "CPU implementer" in fields else ""
        )
        name = platform.machine() + part
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return name, tuple(name for name in INSTRUCTION_SETS if name in flags)


def _caches(root: Path) -> dict[str, int]:
    """Bytes of each cache that the first core sees, instructions' left out, by the names that lscpu gives them; none where
    the system does not tell (https://docs.kernel.org/admin-guide/abi-testing.html, /sys/devices/system/cpu/cpuX/cache)."""
    found: dict[str, int] = {}
    for folder in sorted((root / "sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_words(folder / name) for name in ("level", "type", "size"))
        if level and kind and size and kind[0] in ("Data", "Unified") and size[0][:-1].isdigit() and size[0][-1] in "KM":
            found[f"L{level[0]}{'d' if kind[0] == 'Data' else ''}"] = int(size[0][:-1]) << (10 if size[0][-1] == "K" else 20)
    return found


def _cores(root: Path) -> int:
    """Cores that affinity and the quotas of control groups leave; a quota of 1.5 counts as 1, since a second busy thread
    would be held up every period."""
    cores = float(len(os.sched_getaffinity(0)))
    for folder in _groups(root, "cpu"):
        quota, period = _words(folder / "cpu.max"), "100000"
        if quota:
            period = quota[1] if len(quota) > 1 else period
        else:
            quota, period = _words(folder / "cpu.cfs_quota_us"), (_words(folder / "cpu.cfs_period_us") or [period])[0]
        if quota and quota[0].isdigit() and int(period) > 0:
            cores = min(cores, int(quota[0]) / int(period))
    return max(1, int(cores))


def _memory_limits(root: Path, total_bytes: int) -> Iterator[tuple[int, int]]:
    """(limit, used) of each control group above this process that has a limit; file cache that can be dropped is not used.

    Above `memory.high` nothing is killed, but everything waits for pages to be taken away: it is a limit too.
    """
    for folder in _groups(root, "memory"):
        for limit_file, used_file, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.high", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = _words(folder / limit_file), _words(folder / used_file)
            # "max" is version 2's word for none; version 1 has a number far above any machine's memory.
            if limit and used and limit[0].isdigit() and int(limit[0]) < total_bytes:
                pairs = _words(folder / "memory.stat")
                cached = int(dict(zip(pairs[::2], pairs[1::2], strict=False)).get(cache, 0))
                yield int(limit[0]), max(0, int(used[0]) - cached)


def _swap(root: Path, total_bytes: int) -> int:
    """The swap space that the control groups leave to this process; version 1 limits memory and swap together."""
    for folder in _groups(root, "memory"):
        limit = _words(folder / "memory.swap.max")
        if limit and limit[0].isdigit():
            total_bytes = min(total_bytes, int(limit[0]))
        both, memory = _words(folder / "memory.memsw.limit_in_bytes"), _words(folder / "memory.limit_in_bytes")
        if both and memory and int(both[0]) < _UNLIMITED:
            total_bytes = min(total_bytes, max(0, int(both[0]) - int(memory[0])))
    return total_bytes


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the control groups that this process is in, of versions 1 and 2, each with all above it.

    In a container the path names a place on the host and the mount shows the container's own group at its top, which is
    among the folders above.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / (controllers if controllers else "")
        if controllers and not base.is_dir():
            base = root / "sys/fs/cgroup" / controller
        folder = base / path.lstrip("/")
        yield from (folder, *(above for above in folder.parents if above.is_relative_to(base)))


def _words(path: Path) -> list[str]:
    """The words of a small file, none where it cannot be read."""
    try:
        return path.read_text().split()
    except OSError:
        return []
