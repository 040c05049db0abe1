"""The machine a result was obtained on, and the rates of devices."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One GPU."""

    name: str
    memory_bytes: int
    capability: str | None = None  # compute capability, "9.0"
    driver: str | None = None
    usable: bool | None = None  # by the installed build of torch; None: torch was not asked
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
    cache_bytes: dict[str, int] = field(default_factory=dict)  # by level as lscpu names them: L1d, L2, L3; of one core's view
    accelerators: tuple[Accelerator, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """Rates that bound a step on one device: what was measured here, or a datasheet's times a stated efficiency."""

    device: str
    threads: int | None = None
    flops: dict[
        str, float
    ]  # a second, by kind and format: "matmul.fp32", "convolution.bf16", "depthwise.fp32", "attention.fp16"
    reused_bytes: float  # a second, read and written together, of memory that was touched before (beyond the caches)
    fresh_bytes: float  # a second, written, into memory that the system has just given (page faults; equal to reused on a GPU)
    cached_bytes: float  # a second, of operands that fit the last cache
    overhead_seconds: float  # of one small operator, forward, launched from Python
    kernel_bytes: dict[str, float] = field(default_factory=dict)
    # a second, read and written, by kernels that are slower than memory: "softmax.fp32", "batch_norm_backward.fp32"
    host_to_device_bytes: float | None = None
    basis: str = "measurement"  # or "datasheet"
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Device:
    """One entry of the catalogue: a device that the user need not have. Dense rates, without sparsity."""

    name: str  # as users type it: "a100-80"
    title: str  # "NVIDIA A100 80GB SXM"
    memory_bytes: int
    bandwidth_bytes: float  # a second
    flops: dict[str, float]  # a second by format: fp32, tf32, fp16, bf16, fp64 (matrix units where it has them)
    capability: str | None
    released: int  # year
    source: str  # the datasheet's address
    host_to_device_bytes: float | None = None  # a second, of its bus


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
    roofline: Roofline | None = None  # of the processor with all its cores, where it has been measured
    cleared_bytes: int | None = None  # that emptying the cache freed, where that was asked for

    @property
    def usable(self) -> bool:
        """Whether every check holds that delest cannot work without."""
        return all(check.ok for check in self.checks if check.essential)
