"""GPUs of this machine, and whether the installed build of torch can use them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from delest.records.hardware import Accelerator

_QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,compute_cap,driver_version", "--format=csv,noheader,nounits")
# The least driver for each major version of CUDA, under which PyTorch's wheels of all its minor versions run
# (https://docs.nvidia.com/cuda/cuda-toolkit-release-notes/, table "CUDA Toolkit and Minimum Required NVIDIA Driver Version
# for CUDA Minor Version Compatibility").
_LEAST_DRIVERS = {11: 450, 12: 525, 13: 580}
# Wheel indexes that have every torch since 2.11, newest first, with the major CUDA version and the compute capabilities
# that they are built for (https://github.com/pytorch/pytorch/blob/main/.ci/manywheel/build_cuda.sh, TORCH_CUDA_ARCH_LIST).
_WHEELS = (
    ("cu130", 13, ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")),
    ("cu126", 12, ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")),
)


def find_accelerators() -> tuple[Accelerator, ...]:
    """NVIDIA GPUs that the driver shows, and those of other makers that torch reaches; imports torch where it is installed."""
    listed = listed_accelerators()
    try:
        import torch
    except (ImportError, OSError) as error:
        remedy = f"torch cannot be imported ({error}): pip install torch"
        return tuple(replace(gpu, remedy=remedy) for gpu in listed)
    if not listed:
        return _seen_by(torch)
    return tuple(judge(gpu, torch) for gpu in listed)


def judge(gpu: Accelerator, torch: Any) -> Accelerator:
    """The GPU with `usable` and, where it is not, what to do, by this build of torch."""
    if torch.version.cuda is None:
        return replace(gpu, usable=False, remedy=f"torch {torch.__version__} is built without CUDA: {_reinstall(gpu, torch)}")
    if not torch.cuda.is_available():
        return replace(gpu, usable=False, remedy=_why_closed(gpu, torch))
    built_for = torch.cuda.get_arch_list()
    if gpu.capability is None or covers(built_for, gpu.capability):
        return replace(gpu, usable=True, remedy=None)
    remedy = f"torch {torch.__version__} is built for {', '.join(built_for)}, this GPU is {_architecture(gpu)}: "
    return replace(gpu, usable=False, remedy=remedy + _reinstall(gpu, torch))


def _why_closed(gpu: Accelerator, torch: Any) -> str:
    """What to do where a build with CUDA does not open the GPU: it is hidden, its driver is too old, or something is broken."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={hidden!r} hides it: unset CUDA_VISIBLE_DEVICES"
    cannot = f"torch {torch.__version__} (CUDA {torch.version.cuda}) cannot open it: "
    major = int(torch.version.cuda.split(".")[0])
    least = _LEAST_DRIVERS.get(major, max(_LEAST_DRIVERS.values()))
    if _driver(gpu) >= least:
        return (
            cannot
            + f"driver {gpu.driver} is new enough, so load its kernel module or restart the machine; `nvidia-smi` says more"
        )
    update = f"update the NVIDIA driver to {least} or newer (it is {gpu.driver})"
    older = _wheel(gpu)
    return cannot + update + (f", or {_install(older, torch)}" if older is not None and _major(older) < major else "")


def _reinstall(gpu: Accelerator, torch: Any) -> str:
    """The command that brings a build of torch for this GPU and its driver; the driver comes first where none runs on it."""
    fitting = _wheel(gpu)
    if fitting is not None:
        return _install(fitting, torch)
    suiting = [tag for tag, _, built_for in _WHEELS if gpu.capability is None or covers(built_for, gpu.capability)]
    if not suiting:
        return f"no wheel of torch has code for {_architecture(gpu)}: train on the processor"
    least = _LEAST_DRIVERS[_major(suiting[-1])]
    return f"update the NVIDIA driver to {least} or newer (it is {gpu.driver}), then {_install(suiting[-1], torch)}"


def _wheel(gpu: Accelerator) -> str | None:
    """The newest wheel index whose builds have code for the GPU and run on its driver."""
    for tag, major, built_for in _WHEELS:
        if _driver(gpu) >= _LEAST_DRIVERS[major] and (gpu.capability is None or covers(built_for, gpu.capability)):
            return tag
    return None


def _install(tag: str, torch: Any) -> str:
    release = torch.__version__.split("+")[0]
    return f"pip install --force-reinstall torch=={release} --index-url https://download.pytorch.org/whl/{tag}"


def _major(tag: str) -> int:
    return next(major for name, major, _ in _WHEELS if name == tag)


def _driver(gpu: Accelerator) -> int:
    """The branch of the driver, 580 of 580.65.06; 0 where it is not known."""
    branch = (gpu.driver or "").split(".")[0]
    return int(branch) if branch.isdigit() else 0


def _architecture(gpu: Accelerator) -> str:
    return "sm_" + (gpu.capability or "").replace(".", "")


def covers(architectures: Sequence[str], capability: str) -> bool:
    """Whether code for `architectures` (`sm_90`, `compute_80`) runs on a GPU of a compute capability (`9.0`).

    Machine code runs on its own major version from its minor version up, PTX on anything newer
    (CUDA C++ Programming Guide, "Binary Compatibility" and "PTX Compatibility"); a suffix `a` or `f` binds it to its own.
    """
    major, minor = (int(part) for part in capability.split("."))
    for architecture in architectures:
        kind, _, number = architecture.partition("_")
        digits = number.rstrip("af")
        built = (int(digits[:-1]), int(digits[-1]))
        if digits != number:
            runs = built == (major, minor)
        elif kind == "compute":
            runs = built <= (major, minor)
        else:
            runs = built[0] == major and built[1] <= minor
        if runs:
            return True
    return False


def listed_accelerators() -> tuple[Accelerator, ...]:
    """What nvidia-smi prints, none where it is missing or fails; whether torch can use them is not known."""
    try:
        printed = subprocess.run(_QUERY, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return parse_listing(printed.stdout) if printed.returncode == 0 else ()


def parse_listing(printed: str) -> tuple[Accelerator, ...]:
    """GPUs of nvidia-smi's comma-separated lines: name, memory in MiB, compute capability, driver."""
    found = []
    for line in printed.splitlines():
        words = [word.strip() for word in line.rsplit(",", 3)]
        if len(words) == 4 and words[1].isdigit():
            capability = words[2] if words[2].replace(".", "", 1).isdigit() and "." in words[2] else None
            found.append(Accelerator(name=words[0], memory_bytes=int(words[1]) << 20, capability=capability, driver=words[3]))
    return tuple(found)


def _seen_by(torch: Any) -> tuple[Accelerator, ...]:
    """GPUs that torch reaches without nvidia-smi (ROCm, or a container without the tool)."""
    if not torch.cuda.is_available():
        return ()
    found = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        capability = None if torch.version.hip else f"{properties.major}.{properties.minor}"
        found.append(
            Accelerator(name=properties.name, memory_bytes=properties.total_memory, capability=capability, usable=True)
        )
    return tuple(found)
