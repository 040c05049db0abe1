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


def test_another_number_of_threads_is_timed_for_itself(cache: Path) -> None:
    import torch

    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            probes.time_precisions()
    finally:
        torch.set_num_threads(threads)
    assert len(list(cache.iterdir())) == 2


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
