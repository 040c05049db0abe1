from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from delest.hardware import accelerators, machine
from delest.records.hardware import Accelerator
from delest.reporting.words import machine_facts

LISTING = (
    "NVIDIA H100 80GB HBM3, 81559, 9.0, 580.65.06\nTesla K80, 11441, 3.7, 470.57.02\nOdd, One, 4096, [N/A], 535.1\nnot a line\n"
)
H100 = Accelerator(name="NVIDIA H100", memory_bytes=80 << 30, capability="9.0", driver="580.65.06")


def torch_like(
    cuda: str | None = "13.0", available: bool = True, built_for: tuple[str, ...] = ("sm_80", "sm_90")
) -> SimpleNamespace:
    """What is asked of torch, without a GPU."""
    return SimpleNamespace(
        __version__="2.13.0+cpu" if cuda is None else "2.13.0+cu130",
        version=SimpleNamespace(cuda=cuda, hip=None),
        cuda=SimpleNamespace(is_available=lambda: available, get_arch_list=lambda: list(built_for)),
    )


def test_the_listing_is_read() -> None:
    first, second, third = accelerators.parse_listing(LISTING)
    assert first == Accelerator(name="NVIDIA H100 80GB HBM3", memory_bytes=81559 << 20, capability="9.0", driver="580.65.06")
    assert second.capability == "3.7"
    assert (third.name, third.capability) == ("Odd, One", None)


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (["sm_80", "sm_90"], "9.0", True),
        (["sm_80"], "8.6", True),
        (["sm_86"], "8.0", False),
        (["sm_80", "sm_90"], "7.5", False),
        (["sm_90", "compute_90"], "12.0", True),
        (["sm_90"], "10.0", False),
        (["sm_90a"], "9.0", True),
        (["sm_100a"], "10.3", False),
        (["sm_120"], "12.1", True),
        ([], "9.0", False),
    ],
)
def test_which_builds_run_where(architectures: list[str], capability: str, runs: bool) -> None:
    assert accelerators.covers(architectures, capability) is runs


def test_a_fitting_build_can_use_the_gpu() -> None:
    judged = accelerators.judge(H100, torch_like())
    assert (judged.usable, judged.remedy) == (True, None)


def test_a_build_without_cuda_beside_a_gpu_gets_the_command_that_mends_it() -> None:
    judged = accelerators.judge(H100, torch_like(cuda=None))
    assert not judged.usable
    assert "pip install --force-reinstall torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130" in (
        judged.remedy or ""
    )
    assert "driver" not in (judged.remedy or "")


@pytest.mark.parametrize(
    ("cuda", "driver", "least"), [("13.0", "535.104", 580), ("12.8", "470.57.02", 525), ("11.8", "418.1", 450)]
)
def test_a_driver_too_old_for_the_builds_cuda_is_named(cuda: str, driver: str, least: int) -> None:
    old = Accelerator(name="A", memory_bytes=1, capability="9.0", driver=driver)
    remedy = accelerators.judge(old, torch_like(cuda, available=False)).remedy or ""
    assert f"update the NVIDIA driver to {least} or newer (it is {driver})" in remedy
    # A build for an older CUDA is the other way out, where this driver runs one.
    assert ("/whl/cu126" in remedy) == (driver == "535.104")


def test_a_driver_that_is_new_enough_is_not_blamed() -> None:
    gpu = Accelerator(name="A", memory_bytes=1, capability="9.0", driver="535.104")
    remedy = accelerators.judge(gpu, torch_like("12.6", available=False)).remedy or ""
    assert "driver 535.104 is new enough" in remedy
    assert "update" not in remedy


@pytest.mark.parametrize(
    ("capability", "driver", "words"),
    [
        ("9.0", "580.65.06", "whl/cu130"),
        ("9.0", "535.104", "whl/cu126"),
        ("7.0", "580.65.06", "whl/cu126"),  # CUDA 13 has no code for Volta
        ("12.0", "570.1", "update the NVIDIA driver to 580 or newer (it is 570.1), then pip install"),
        ("9.0", "470.57.02", "update the NVIDIA driver to 525 or newer (it is 470.57.02), then pip install"),
        ("3.7", "580.65.06", "has code for sm_37: train on the processor"),
        (None, "[N/A]", "update the NVIDIA driver to 525 or newer (it is [N/A])"),
    ],
)
def test_the_build_that_fits_the_gpu_and_its_driver_is_named(capability: str | None, driver: str, words: str) -> None:
    gpu = Accelerator(name="A", memory_bytes=1, capability=capability, driver=driver)
    assert words in (accelerators.judge(gpu, torch_like(cuda=None)).remedy or "")


def test_a_hidden_gpu_is_not_blamed_on_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    judged = accelerators.judge(H100, torch_like(available=False))
    assert not judged.usable
    assert "unset CUDA_VISIBLE_DEVICES" in (judged.remedy or "")


def test_a_gpu_that_the_build_has_no_code_for() -> None:
    judged = accelerators.judge(H100, torch_like(built_for=("sm_80",)))
    assert not judged.usable
    assert "built for sm_80, this GPU is sm_90" in (judged.remedy or "")


def test_torch_is_not_imported_beside_another_framework_under_keras(monkeypatch):
    monkeypatch.setattr(accelerators, "listed_accelerators", lambda: accelerators.parse_listing(LISTING))
    monkeypatch.setitem(sys.modules, "keras", ModuleType("keras"))
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    here = machine.describe_for_report()
    assert "torch" not in sys.modules
    first = here.accelerators[0]
    assert (first.driver, first.usable) == ("580.65.06", None)
    told = next(value for name, value in machine_facts(here) if name == "GPU")
    assert told == "NVIDIA H100 80GB HBM3, 80 GiB, which torch was not asked about"
