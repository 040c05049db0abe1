from __future__ import annotations

from types import SimpleNamespace

import pytest

from delest.hardware import accelerators
from delest.records.hardware import Accelerator

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


def test_an_old_driver_is_named() -> None:
    old = Accelerator(name="A", memory_bytes=1, capability="9.0", driver="535.104")
    for torch in (torch_like(cuda=None), torch_like(available=False)):
        assert "update the NVIDIA driver to 580 or newer (it is 535.104)" in (accelerators.judge(old, torch).remedy or "")


def test_a_hidden_gpu_is_not_blamed_on_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    judged = accelerators.judge(H100, torch_like(available=False))
    assert not judged.usable
    assert "unset CUDA_VISIBLE_DEVICES" in (judged.remedy or "")


def test_a_gpu_that_the_build_has_no_code_for() -> None:
    judged = accelerators.judge(H100, torch_like(built_for=("sm_80",)))
    assert not judged.usable
    assert "built for sm_80, this GPU is sm_90" in (judged.remedy or "")
