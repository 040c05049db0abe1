from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from delest import errors
from delest.hardware import probes


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DELEST_CACHE", str(tmp_path))
    return tmp_path / "probes"


def test_kernels_are_timed_once_a_machine(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = probes.time_precisions()
    assert set(first) == {"matmul_fp32", "matmul_bf16", "convolution_fp32", "convolution_bf16"}
    assert all(0 < seconds < 10 for name, seconds in first.items() if name.endswith("fp32"))
    monkeypatch.setattr(probes, "_time_kernels", lambda torch: pytest.fail("timed again"))
    assert probes.time_precisions() == first


def test_formats_are_timed_on_one_thread_whatever_torch_has(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    threads, seen = torch.get_num_threads(), []
    monkeypatch.setattr(
        probes, "_time_kernels", lambda torch: seen.append(torch.get_num_threads()) or dict.fromkeys(probes._KERNELS, 1.0)
    )
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            probes.time_precisions()
            assert torch.get_num_threads() == count
            next(cache.iterdir()).unlink()
    finally:
        torch.set_num_threads(threads)
    assert seen == [1, 1]


def test_a_damaged_file_is_timed_anew(cache: Path) -> None:
    probes.time_precisions()
    (file,) = cache.iterdir()
    for damaged in ('{"format": 1, "probed": {"matmul_fp32"', '{"format": 1, "probed": {"matmul_fp32": 1.0}}'):
        file.write_text(damaged)
        probes.time_precisions()
        assert set(json.loads(file.read_text())["probed"]) == set(probes.time_precisions())


def test_a_cache_that_cannot_be_used_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DELEST_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(errors.BadInput, match="Set DELEST_CACHE to a folder that you may write"):
        probes.time_precisions()


def test_a_format_that_is_refused_is_infinite_and_stays_so_in_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(torch: object, dtype: object) -> object:
        def kernel() -> None:
            if "bfloat16" in str(dtype):
                raise RuntimeError("not implemented for 'BFloat16'")

        return kernel

    monkeypatch.setattr(probes, "_convolution", refuse)
    assert probes.time_precisions()["convolution_bf16"] == math.inf
    assert probes.time_precisions()["convolution_bf16"] == math.inf
    assert probes.bf16_gains() is False


@pytest.mark.parametrize(
    ("matmul", "convolution", "gains"), [(0.5, 0.5, True), (0.5, 0.95, False), (1.2, 0.5, False), (0.5, 3.0, False)]
)
def test_bf16_gains_only_where_both_kernels_do(
    matmul: float, convolution: float, gains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {"matmul_fp32": 1.0, "matmul_bf16": matmul, "convolution_fp32": 1.0, "convolution_bf16": convolution}
    monkeypatch.setattr(probes, "time_precisions", lambda: seconds)
    assert probes.bf16_gains() is gains


def test_a_hopeless_kernel_is_not_timed_twenty_times() -> None:
    calls = []
    probes.best_seconds(lambda: calls.append(1))
    assert len(calls) == 21
    calls.clear()
    probes.best_seconds(lambda: calls.append(1), hopeless_seconds=-1.0)
    assert len(calls) == 2
    calls.clear()
    hours = iter(range(0, 10**6, 3600))
    assert probes.best_seconds(lambda: calls.append(1), hopeless_seconds=1.0, clock=lambda: next(hours)) == 3600
    assert len(calls) == 1


def test_one_slow_call_does_not_decide_which_format_is_faster() -> None:
    """Of two equal kernels the second is held up by another process in most of its calls, and at the first."""
    now, calls = [0.0], [0]

    def steady() -> None:
        now[0] += 1.0

    def held_up() -> None:
        calls[0] += 1
        now[0] += 0.5 if calls[0] == 5 else 100.0

    found = probes.best_by_turns({"fp32": steady, "bf16": held_up}, clock=lambda: now[0])
    assert found == {"fp32": 1.0, "bf16": 0.5}
    assert calls[0] == 9  # one to build it, and no more than the fewest


def test_a_kernel_that_is_refused_is_not_called_again() -> None:
    calls: list[int] = []

    def refused() -> None:
        calls.append(1)
        raise RuntimeError("not implemented")

    assert probes.best_by_turns({"bf16": refused}) == {"bf16": math.inf}
    assert len(calls) == 1
