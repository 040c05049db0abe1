"""What is tried on a job: one thread beside all of them."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from delest.footprint import probe


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def session(seconds: dict[int, float]) -> SimpleNamespace:
    """Steps that take so long by the number of threads."""

    def step(batch: object, rate: float) -> SimpleNamespace:
        time.sleep(seconds[torch.get_num_threads()])
        return SimpleNamespace(loss=0.0)

    return SimpleNamespace(step=step)


def test_one_thread_is_timed_beside_all_and_threads_are_as_before():
    found = probe._one_thread(session({2: 0.004, 1: 0.002}), None, 2)["threads"]
    assert torch.get_num_threads() == 2
    assert found["with"] >= 0.002
    assert found["plain"] >= 0.004


def test_a_step_in_which_threads_pay_is_not_tried_further():
    calls = session({2: 0.0, 1: probe.LONGEST_FOR_ONE_THREAD + 0.01})
    assert probe._one_thread(calls, None, 2) == {}


@pytest.mark.parametrize(("seconds", "steps"), [(0.0, probe.ROUNDS + 1), (2.5, probe.LEAST_ROUNDS + 1)])
def test_methods_are_compared_in_fewer_rounds_where_steps_are_long(
    seconds: float, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, taken = [0.0], {"plain": 0, "with": 0}
    monkeypatch.setattr(probe, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def session(name: str) -> SimpleNamespace:
        def step(batch: object, rate: float) -> SimpleNamespace:
            taken[name] += 1
            now[0] += seconds * (1 if name == "plain" else 2)
            return SimpleNamespace(loss=0.0)

        return SimpleNamespace(step=step)

    found = probe._by_turns({name: session(name) for name in taken}, None)
    assert found == {"plain": seconds, "with": 2 * seconds}
    assert taken == {"plain": steps, "with": steps}


@pytest.mark.parametrize(
    ("matmul", "convolution", "tried"), [(0.5, 0.95, True), (1.2, 0.98, True), (0.5, float("inf"), True), (12.0, 8.0, False)]
)
def test_bf16_is_tried_where_any_kernel_gains(
    matmul: float, convolution: float, tried: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {"matmul_fp32": 1.0, "matmul_bf16": matmul, "convolution_fp32": 1.0, "convolution_bf16": convolution}
    monkeypatch.setattr(probe.probes, "time_precisions", lambda: seconds)
    assert probe._worth_trying_bf16() is tried
