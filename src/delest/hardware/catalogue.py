"""Named devices that the user need not have: memory, bandwidth and dense arithmetic rates from their datasheets.

How datasheets are read:
- A datasheet's GB of device memory is 2^30 bytes, since chips come in powers of two (an A100 80GB reports 81,920 MiB);
  with error correction or firmware in it the driver shows a few per cent less. GB/s and TFLOPS are powers of ten.
- NVIDIA prints rates with 2:4 sparsity for everything since Ampere, alone for H100 and later: here are the dense ones, half.
- fp16 and bf16 are those of the matrix units with fp32 accumulation, which is what PyTorch uses. GeForce cards do that at
  half the rate that is printed for fp16 accumulation.
- fp32 is without TF32; fp64 on matrix units where there are some. A format that a device lacks is left out.
- host_to_device_bytes is one direction of its PCI Express bus, 16 lanes: 8, 16 or 32 GT/s a lane with 128b/130b coding.
"""

from __future__ import annotations

import difflib
import functools
import re

from delest import errors
from delest.records.hardware import Device, Roofline

_GIB = 1 << 30
_PCIE = {3: 15.75e9, 4: 31.5e9, 5: 63.0e9}

_AMD = "https://www.amd.com"
_DOCUMENTS = "https://www.nvidia.com/content/dam/en-zz/Solutions"
_IMAGES = "https://images.nvidia.com"
_PAGES = "https://www.nvidia.com/en-us"
_RESOURCES = "https://resources.nvidia.com"
_A10 = f"{_DOCUMENTS}/Data-Center/a10/pdf/datasheet-new/nvidia-a10-datasheet.pdf"
_A10G = "https://d1.awsstatic.com/product-marketing/ec2/NVIDIA_AWS_A10G_DataSheet_FINAL_02_17_2022.pdf"
_A100_40 = f"{_IMAGES}/aem-dam/en-zz/Solutions/data-center/nvidia-ampere-architecture-whitepaper.pdf"
_A100_80 = f"{_DOCUMENTS}/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
_ADA = f"{_IMAGES}/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
_ADA_PRO = f"{_IMAGES}/aem-dam/en-zz/Solutions/technologies/NVIDIA-ADA-GPU-PROVIZ-Architecture-Whitepaper_1.1.pdf"
_B200 = f"{_RESOURCES}/en-us-blackwell-architecture/datasheet"
_BLACKWELL = f"{_IMAGES}/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf"
_GA102 = "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf"
_H100 = f"{_RESOURCES}/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet"
_H200 = f"{_PAGES}/data-center/h200/"
_L4 = f"{_PAGES}/data-center/l4/"
_L40S = f"{_RESOURCES}/en-us-l40s/l40s-datasheet-28413"
_MI250X = f"{_AMD}/en/products/accelerators/instinct/mi200/mi250x.html"
_MI300X = f"{_AMD}/content/dam/amd/en/documents/instinct-tech-docs/data-sheets/amd-instinct-mi300x-data-sheet.pdf"
_RTX_3060 = f"{_PAGES}/geforce/graphics-cards/30-series/rtx-3060-3060ti/"
_RTX_4070 = f"{_PAGES}/geforce/graphics-cards/40-series/rtx-4070-family/"
_RTX_8000 = f"{_DOCUMENTS}/design-visualization/quadro-product-literature/quadro-rtx-8000-us-nvidia-946977-r1-web.pdf"
_T4 = f"{_DOCUMENTS}/Data-Center/tesla-t4/t4-tensor-core-datasheet-951643.pdf"
_V100 = f"{_IMAGES}/content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf"


def _device(
    name: str,
    title: str,
    gib: int,
    gigabytes_a_second: float,
    capability: str | None,
    released: int,
    pcie: int,
    source: str,
    **teraflops: float,
) -> Device:
    return Device(
        name=name,
        title=title,
        memory_bytes=gib * _GIB,
        bandwidth_bytes=gigabytes_a_second * 1e9,
        flops={kind: rate * 1e12 for kind, rate in teraflops.items()},
        capability=capability,
        released=released,
        source=source,
        host_to_device_bytes=_PCIE[pcie],
    )


def _geforce(
    name: str, title: str, gib: int, bandwidth: float, capability: str, released: int, pcie: int, source: str, fp32: float
) -> Device:
    """A consumer card since Ampere: matrix units do TF32 at the rate of fp32, and fp16 and bf16 with fp32 accumulation at
    twice that (tables of the three whitepapers: 3090 35.6, 35.6, 71; 4090 82.6, 82.6, 165.2; 5090 104.8, 104.8, 209.5)."""
    rates = {"tf32": fp32, "fp16": 2 * fp32, "bf16": 2 * fp32, "fp64": fp32 / 64}
    return _device(
        f"rtx{name}", f"NVIDIA GeForce RTX {title}", gib, bandwidth, capability, released, pcie, source, fp32=fp32, **rates
    )


def _a100(name: str, title: str, gib: int, bandwidth: float, released: int, source: str) -> Device:
    rates = {"tf32": 156, "fp16": 312, "bf16": 312, "fp64": 19.5}
    return _device(name, f"NVIDIA A100 {title}", gib, bandwidth, "8.0", released, 4, source, fp32=19.5, **rates)


def _hopper(name: str, title: str, gib: int, bandwidth: float, released: int, source: str) -> Device:
    """H100 and H200 as SXM modules, which differ in memory only; printed with sparsity: TF32 989, 16 bits 1,979."""
    rates = {"tf32": 989 / 2, "fp16": 1979 / 2, "bf16": 1979 / 2, "fp64": 67}
    return _device(name, title, gib, bandwidth, "9.0", released, 5, source, fp32=67, **rates)


_LISTED = (
    # name, title, GiB, GB/s, compute capability, year, PCI Express, datasheet, TFLOPS by format
    _geforce("3060", "3060 12GB", 12, 360, "8.6", 2021, 4, _RTX_3060, 12.7),  # 3,584 cores at 1.78 GHz, 2 flops each
    _geforce("3090", "3090", 24, 936, "8.6", 2020, 4, _GA102, 35.6),
    _geforce("4070tisuper", "4070 Ti SUPER", 16, 672, "8.9", 2024, 4, _RTX_4070, 44.1),  # 8,448 cores at 2.61 GHz
    _geforce("4080", "4080", 16, 716.8, "8.9", 2022, 4, _ADA, 48.7),
    _geforce("4090", "4090", 24, 1008, "8.9", 2022, 4, _ADA, 82.6),
    _geforce("5090", "5090", 32, 1792, "12.0", 2025, 5, _BLACKWELL, 104.8),
    _device("t4", "NVIDIA T4", 16, 320, "7.5", 2018, 3, _T4, fp32=8.1, fp16=65),
    _device("quadrortx8000", "NVIDIA Quadro RTX 8000", 48, 672, "7.5", 2018, 3, _RTX_8000, fp32=16.3, fp16=130.5),
    _device("v100-16", "NVIDIA V100 16GB SXM2", 16, 900, "7.0", 2017, 3, _V100, fp32=15.7, fp16=125, fp64=7.8),
    _device("v100-32", "NVIDIA V100 32GB SXM2", 32, 900, "7.0", 2018, 3, _V100, fp32=15.7, fp16=125, fp64=7.8),
    _device("a10", "NVIDIA A10", 24, 600, "8.6", 2021, 4, _A10, fp32=31.2, tf32=62.5, fp16=125, bf16=125),
    _device("a10g", "NVIDIA A10G", 24, 600, "8.6", 2021, 4, _A10G, fp32=35, tf32=35, fp16=70, bf16=70),
    _device("rtxa6000", "NVIDIA RTX A6000", 48, 768, "8.6", 2020, 4, _GA102, fp32=38.7, tf32=77.4, fp16=154.8, bf16=154.8),
    _device("rtx6000ada", "NVIDIA RTX 6000 Ada", 48, 960, "8.9", 2022, 4, _ADA_PRO, fp32=91.1, tf32=182, fp16=364, bf16=364),
    _device("l4", "NVIDIA L4", 24, 300, "8.9", 2023, 4, _L4, fp32=30.3, tf32=120 / 2, fp16=242 / 2, bf16=242 / 2),
    _device("l40s", "NVIDIA L40S", 48, 864, "8.9", 2023, 4, _L40S, fp32=91.6, tf32=183, fp16=362, bf16=362),
    _a100("a100-40", "40GB SXM", 40, 1555, 2020, _A100_40),
    _a100("a100-80", "80GB SXM", 80, 2039, 2020, _A100_80),
    _a100("a100-40-pcie", "40GB PCIe", 40, 1555, 2020, _A100_40),
    _a100("a100-80-pcie", "80GB PCIe", 80, 1935, 2021, _A100_80),
    _hopper("h100", "NVIDIA H100 80GB SXM", 80, 3350, 2022, _H100),
    _device(
        *("h100-pcie", "NVIDIA H100 80GB PCIe", 80, 2000, "9.0", 2022, 5, _H100),
        fp32=51,
        tf32=756 / 2,
        fp16=1513 / 2,
        bf16=1513 / 2,
        fp64=51,
    ),
    _hopper("h200", "NVIDIA H200 141GB SXM", 141, 4800, 2024, _H200),
    _device(
        *("b200", "NVIDIA B200 180GB, of an HGX board", 180, 7700, "10.0", 2025, 5, _B200),
        fp32=75,
        tf32=2200 / 2,
        fp16=4500 / 2,
        bf16=4500 / 2,
        fp64=37,
    ),
    _device(  # its two dies are two devices to PyTorch: each has half of what is printed
        *("mi250x", "AMD Instinct MI250X, one of its two dies", 64, 3276.8 / 2, None, 2021, 4, _MI250X),
        fp32=95.7 / 2,
        fp16=383 / 2,
        bf16=383 / 2,
        fp64=95.7 / 2,
    ),
    _device(
        *("mi300x", "AMD Instinct MI300X", 192, 5300, None, 2023, 5, _MI300X),
        fp32=163.4,
        tf32=653.7,
        fp16=1307.4,
        bf16=1307.4,
        fp64=163.4,
    ),
)
DEVICES: dict[str, Device] = {device.name: device for device in _LISTED}
_MOST_COMMON = {"a100": "a100-80", "a100pcie": "a100-80-pcie", "v100": "v100-16"}  # where a name leaves the size open


def find_device(name: str) -> Device:
    """The catalogue's device of that name, however it is written: `a100-40`, `NVIDIA A100-SXM4-40GB`, `RTX 4090`, `4090`.

    Without a size or a form it is the most common one (a100-80, v100-16; SXM where there is PCIe too). Raises `BadInput`
    that names the nearest known ones.
    """
    plain, known = _plain(name), _known()
    ending = {device for word, device in known.items() if len(plain) >= 4 and word.endswith(plain)}
    found = known.get(plain) or (ending.pop() if len(ending) == 1 else None)
    if found is not None:
        return DEVICES[found]
    near = difflib.get_close_matches(plain, known, n=2, cutoff=0.5)  # one of two characters
    meant = " or ".join(dict.fromkeys(known[word] for word in near))
    raise errors.BadInput(f"unknown device {name!r}{f': did you mean {meant}?' if meant else '.'} Known: {', '.join(DEVICES)}.")


@functools.cache
def _known() -> dict[str, str]:
    """Device by plain name, also with its size where that is not part of the name ("h10080pcie")."""
    known = {}
    for device in DEVICES.values():
        plain = _plain(device.name)
        bare = plain.removesuffix("pcie")
        known[f"{bare}{device.memory_bytes // _GIB}{plain.removeprefix(bare)}"] = device.name
        known[plain] = device.name
    return known | _MOST_COMMON


def _plain(name: str) -> str:
    """Letters and digits that tell devices apart: no maker, no series, no `GB`, no form but PCIe, which comes last."""
    words = re.sub(r"\b(nvidia|amd|geforce|instinct|tesla|generation|hbm\d*e?)\b", "", name.lower().replace("_", " "))
    words = re.sub(r"sxm\d?|(?<=\d)\s*gi?b\b", "", words)
    return re.sub(r"[^a-z0-9]", "", words.replace("pcie", "")) + ("pcie" if "pcie" in words else "")


def roofline_of(
    device: Device,
    *,
    matmul: float = 0.7,
    convolution: float = 0.5,
    depthwise: float = 0.1,
    attention: float = 0.5,
    memory: float = 0.8,
    overhead_seconds: float = 7e-6,
) -> Roofline:
    """What training reaches on a device of the catalogue: its datasheet's rates times an efficiency for each kind.

    The defaults are ordinary values, to be replaced where a measurement on that device is known:

    - matmul: the best shapes reach 60 % (MI300X) to 87 % (A100) of the dense bf16 rate, B200 78 %
      (https://github.com/stas00/ml-engineering/tree/master/compute/accelerator#maximum-achievable-matmul-flops-comparison-table);
      shapes of models are smaller than the best ones.
    - attention: fused kernels reach 50 to 73 % on an A100 (arXiv 2307.08691, abstract); the backward pass is at the lower end.
    - convolution: below matrix products, since gathering their operands costs more; an assumption.
    - depthwise: no matrix units, so of the fp32 rate in every format, and bound by memory on most shapes; an assumption.
    - memory: streaming kernels reach about 90 % of the printed bandwidth, the strided and reducing ones of a model less.
    - overhead_seconds: launching one kernel from eager PyTorch takes 5 to 10 microseconds of the processor, which hides
      behind kernels that take longer.

    fp32 convolutions use TF32 units where there are some, matrix products do not: PyTorch's defaults
    (https://docs.pytorch.org/docs/stable/notes/cuda.html, "TensorFloat-32"). Raises `BadInput` for an efficiency outside
    (0, 1] and for an overhead below zero.
    """
    kinds = {"matmul": matmul, "convolution": convolution, "depthwise": depthwise, "attention": attention}
    shares = {**kinds, "memory": memory}
    faults = [
        f"{kind}={share} is no efficiency: give more than 0, at most 1." for kind, share in shares.items() if not 0 < share <= 1
    ]
    if not 0 <= overhead_seconds < 1:
        faults.append(f"overhead_seconds={overhead_seconds} is no time of one kernel: give seconds from 0 to 1.")
    if faults:
        raise errors.BadInput(faults)
    flops = {}
    for name, rate in device.flops.items():
        units = {
            "convolution": device.flops.get("tf32", rate) if name == "fp32" else rate,
            "depthwise": min(rate, device.flops["fp32"]),
        }
        flops.update({f"{kind}.{name}": share * units.get(kind, rate) for kind, share in kinds.items()})
    bandwidth = memory * device.bandwidth_bytes
    stated = ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items())
    return Roofline(
        device=device.title,
        flops=flops,
        reused_bytes=bandwidth,
        fresh_bytes=bandwidth,
        cached_bytes=bandwidth,
        overhead_seconds=overhead_seconds,
        host_to_device_bytes=memory * device.host_to_device_bytes if device.host_to_device_bytes else None,
        basis="datasheet",
        source=f"{device.source} at {stated}, {overhead_seconds * 1e6:g} µs a kernel",
    )
