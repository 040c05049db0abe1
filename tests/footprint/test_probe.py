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
