"""The machine a result was obtained on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One GPU."""

    name: str
    memory_bytes: int
    capability: str | None = None  # compute capability, "9.0"
    driver: str | None = None
    usable: bool = False  # by the installed build of torch
    remedy: str | None = None  # what to install or change where it is not usable


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Processor, memory, accelerators."""

    processor: str
    cores: int  # that this process may use
    instruction_sets: tuple[str, ...]  # those that matter here: avx2, fma, avx512f, avx512_vnni, avx512_bf16, amx_int8, ...
    memory_bytes: int
    memory_limit_bytes: int | None  # of the control group, None where there is none
    available_bytes: int  # what a new allocation can have now, the limit counted
    swap_bytes: int = 0
    accelerators: tuple[Accelerator, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that `doctor` looked at."""

    name: str
    ok: bool
    detail: str
    remedy: str | None = None  # what to do where it is not ok
    essential: bool = False  # delest cannot work where this one is not ok


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What `doctor` found. `extras` says for each optional dependency group whether it is installed."""

    hardware: Hardware
    versions: dict[str, str]
    extras: dict[str, bool]
    checks: tuple[Check, ...]

    @property
    def usable(self) -> bool:
        """Whether every check holds that delest cannot work without."""
        return all(check.ok for check in self.checks if check.essential)
