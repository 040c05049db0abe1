from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from delest import errors, processes
from delest.hardware import accelerators, roofline
from delest.records.hardware import Accelerator, Roofline

KINDS = ("matmul", "convolution", "depthwise", "attention")
TINY = roofline._Sizes(8, 8, (1, 4, 6), (1, 4, 6), (1, 2, 8, 4), 1 << 20)
MEASURED = Roofline(
    device="A processor",
    threads=3,
    flops={"matmul.fp32": 1e11},
    reused_bytes=2e10,
    fresh_bytes=4e9,
    cached_bytes=6e10,
    overhead_seconds=4e-6,
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DELEST_CACHE", str(tmp_path))
    return tmp_path / "probes"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What children were asked for; they answer at once."""
    noted: list[dict[str, Any]] = []

    def call(function: str, job: None, **arguments: Any) -> dict[str, Any]:
        noted.append({"function": function, **arguments})
        return {**asdict(MEASURED), "threads": arguments["threads"]}

    monkeypatch.setattr(processes, "call", call)
    return noted


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Probes of almost nothing, in this process, which gets its threads back."""
    monkeypatch.setitem(roofline._SIZES, "cpu", TINY)
    monkeypatch.setattr(roofline, "_PROBE_SECONDS", 0.0)
    threads, tf32 = torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32
    yield
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = tf32


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_is_busy", lambda: False)


def test_rates_of_a_busy_moment_are_said_to_be_so_and_measured_anew_in_a_quiet_one(
    cache: Path, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roofline, "_is_busy", lambda: True)
    assert roofline.BUSY in roofline.measure_roofline(3).source
    assert roofline.BUSY in roofline.measure_roofline(3).source
    assert len(asked) == 1
    monkeypatch.setattr(roofline, "_is_busy", lambda: False)
    assert roofline.BUSY not in roofline.measure_roofline(3).source
    assert len(asked) == 2


def test_this_machine_is_measured_in_another_process_and_known_afterwards(cache: Path) -> None:
    assert roofline.known_roofline(1) is None
    measured = roofline.measure_roofline(1)
    assert {f"{kind}.fp32" for kind in KINDS} <= measured.flops.keys()
    rates = [*measured.flops.values(), measured.reused_bytes, measured.fresh_bytes, measured.cached_bytes]
    assert all(rate > 0 for rate in rates)
    assert 0 < measured.overhead_seconds < 1
    assert (measured.threads, measured.basis) == (1, "measurement")
    assert torch.__version__ in measured.source
    assert roofline.known_roofline(1) == measured


def test_it_is_measured_once_for_each_number_of_threads(cache: Path, asked: list[dict[str, Any]]) -> None:
    assert [roofline.measure_roofline(threads).threads for threads in (3, 2, 3, 2)] == [3, 2, 3, 2]
    assert [call["threads"] for call in asked] == [3, 2]
    assert asked[0]["environment"]["OMP_NUM_THREADS"] == "3"
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("damage", ['{"format": 1, "prob', '{"format": 1, "probed": {"device": "x"}}', '{"format": 1}'])
def test_a_damaged_file_is_not_known_and_is_measured_anew(damage: str, cache: Path, asked: list[dict[str, Any]]) -> None:
    roofline.measure_roofline(3)
    (file,) = cache.iterdir()
    file.write_text(damage)
    assert roofline.known_roofline(3) is None
    assert roofline.measure_roofline(3) == MEASURED
    assert len(asked) == 2


def test_a_kernel_that_raises_is_left_out(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary = roofline._attention

    def refusing(torch: Any, sizes: Any, dtype: Any, device: str) -> Any:
        def refuse() -> None:
            raise NotImplementedError("not implemented for 'BFloat16'")

        return (refuse, 1.0) if "bfloat16" in str(dtype) else ordinary(torch, sizes, dtype, device)

    monkeypatch.setattr(roofline, "_attention", refusing)
    flops = roofline._probe(1, "cpu")["flops"]
    assert "attention.bf16" not in flops
    assert {"attention.fp32", "matmul.bf16"} <= flops.keys()


def test_the_probe_uses_the_threads_that_were_asked_for(quick: None) -> None:
    assert roofline._probe(2, "cpu")["threads"] == torch.get_num_threads() == 2


@pytest.mark.parametrize("kind", ["matmul", "convolution"])
def test_flops_are_those_that_torch_counts(kind: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    kernel, flops = getattr(roofline, f"_{kind}")(torch, roofline._widened(TINY, 2), torch.float32, "cpu")
    with FlopCounterMode(display=False) as counter:
        kernel()
    assert counter.get_total_flops() == flops


def test_flops_that_torch_does_not_count() -> None:
    assert roofline._depthwise(torch, TINY, torch.float32, "cpu")[1] == 3 * 2 * 4 * 9 * 6 * 6
    assert roofline._attention(torch, TINY, torch.float32, "cpu")[1] == (2 + 5) * 2 * 2 * 8 * 8 * 4


def test_the_work_grows_with_the_threads() -> None:
    one, four, many = (
        roofline._matmul(torch, roofline._widened(TINY, threads), torch.float32, "cpu")[1] for threads in (1, 4, 64)
    )
    assert (four, many) == (4 * one, 8 * one)


def test_threads_and_devices_that_cannot_be_are_refused(cache: Path) -> None:
    with pytest.raises(errors.BadInput, match="0 threads cannot compute: give 1 or more"):
        roofline.measure_roofline(0)
    with pytest.raises(errors.BadInput, match="'tpu' cannot be measured: use cpu or cuda"):
        roofline.known_roofline(device="tpu")


def test_a_gpu_that_cannot_be_used_is_refused_with_its_remedy(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerators, "find_accelerators", lambda: ())
    with pytest.raises(errors.BadInput, match="no GPU was found"):
        roofline.measure_roofline(device="cuda")
    gpu = Accelerator(name="A100", memory_bytes=1, remedy="install another torch")
    monkeypatch.setattr(accelerators, "find_accelerators", lambda: (gpu,))
    with pytest.raises(errors.BadInput, match="A100: install another torch"):
        roofline.measure_roofline(device="cuda")


def test_each_gpu_has_its_own_rates(cache: Path, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("A100", "H100", "A100"):
        gpu = Accelerator(name=name, memory_bytes=1, usable=True)
        monkeypatch.setattr(accelerators, "find_accelerators", lambda gpu=gpu: (gpu,))
        roofline.measure_roofline(4, device="cuda")
    assert [(call["device"], call["threads"]) for call in asked] == [("cuda", None)] * 2


def test_a_cache_that_cannot_be_used_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DELEST_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(errors.BadInput, match="Set DELEST_CACHE to a folder that you may write"):
        roofline.measure_roofline(1)
