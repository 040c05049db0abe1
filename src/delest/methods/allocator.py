"""Take CPU tensors from another malloc than the C library's default, which keeps freed blocks and then holds far more than lives.

With `mmap` (a fixed threshold) each large block goes back to the system when it is freed: least memory, paid for in page faults.
tcmalloc and jemalloc keep some of what is freed, and cost less or nothing. What it saves and costs is measured on the job itself.

Source: https://man7.org/linux/man-pages/man3/mallopt.3.html, M_MMAP_THRESHOLD.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from delest import malloc

if TYPE_CHECKING:
    from delest.methods import Configs, Settings, Stage
    from delest.records.plan import Keeps

STAGE: Stage = "process"
SETTINGS: Settings = {"name": malloc.NAMES}


def keeps(config: dict[str, Any], *, batch_statistics: bool) -> Keeps:
    return "bitwise"


def conflicts(config: dict[str, Any], others: Configs) -> str | None:
    return None


def environment(config: dict[str, Any]) -> dict[str, str]:
    """What a process must be started with; raises `BadInput` for an allocator that is not on this system."""
    return malloc.environment(config["name"])


def waits(config: dict[str, Any]) -> bool:
    """A threshold can still be fixed in a process that has glibc's malloc; a library must come before it."""
    now = malloc.current()
    return now != config["name"] and (config["name"] in malloc.LIBRARIES or now in malloc.LIBRARIES)


def code(config: dict[str, Any]) -> str:
    name = config["name"]
    variables = {"mmap": f"MALLOC_MMAP_THRESHOLD_={malloc.THRESHOLD_BYTES}"}
    wanted = variables.get(name) or f"LD_PRELOAD=PATH/{malloc.LIBRARIES.get(name, ('',))[0]}"
    return f"# start it as: {wanted} python train.py"
