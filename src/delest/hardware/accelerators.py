"""GPUs of this machine, and whether the installed build of torch can use them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from delest.records.hardware import Accelerator

_QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,compute_cap,driver_version", "--format=csv,noheader,nounits")
# The least driver of the CUDA version that PyTorch's wheels are built with
# (https://docs.nvidia.com/cuda/cuda-toolkit-release-notes/, table "CUDA Toolkit and Minimum Required NVIDIA Driver Version").
_WHEEL, _LEAST_DRIVER = "cu130", 580


def find_accelerators() -> tuple[Accelerator, ...]:
    """NVIDIA GPUs that the driver shows, and those of other makers that torch reaches; imports torch where it is installed."""
    listed = _listed()
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
    release = torch.__version__.split("+")[0]
    build = f"pip install --force-reinstall torch=={release} --index-url https://download.pytorch.org/whl/{_WHEEL}"
    driver = int((gpu.driver or "0").split(".")[0] or 0)
    update = f"update the NVIDIA driver to {_LEAST_DRIVER} or newer (it is {gpu.driver})"
    if torch.version.cuda is None:
        remedy = (
            f"torch {torch.__version__} is built without CUDA: {update + ', then ' if driver < _LEAST_DRIVER else ''}{build}"
        )
    elif not torch.cuda.is_available():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if hidden is not None and hidden.strip() in ("", "-1"):
            remedy = f"CUDA_VISIBLE_DEVICES={hidden!r} hides it: unset CUDA_VISIBLE_DEVICES"
        else:
            remedy = f"torch {torch.__version__} (CUDA {torch.version.cuda}) cannot open it: {update}"
    elif gpu.capability is not None and not covers(torch.cuda.get_arch_list(), gpu.capability):
        known = ", ".join(torch.cuda.get_arch_list())
        remedy = f"torch {torch.__version__} is built for {known}, this GPU is sm_{gpu.capability.replace('.', '')}: {build}"
    else:
        return replace(gpu, usable=True, remedy=None)
    return replace(gpu, usable=False, remedy=remedy)


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


def _listed() -> tuple[Accelerator, ...]:
    """What nvidia-smi prints, none where it is missing or fails."""
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
