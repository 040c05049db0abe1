"""The limit that a budget sets: held once, from before the data are opened, given back whole."""

from __future__ import annotations

import resource
import threading

import numpy as np
import pytest

from delest import errors
from delest.hardware import machine
from delest.training import limit

MIB = 1 << 20


def above(size: int) -> int:
    machine.give_back_unused()
    return machine.resident_bytes() + size + limit.MARGIN_BYTES


@pytest.mark.own_process
def test_an_allocation_beyond_it_fails_and_afterwards_all_is_as_before():
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with limit.held(above(50 * MIB)):
        np.ones(4 * MIB)  # 32 MiB
        with pytest.raises(MemoryError):
            np.empty(10 * MIB)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert np.empty(10 * MIB).nbytes == 80 * MIB


@pytest.mark.own_process
def test_one_that_is_open_already_goes_on():
    with limit.held(above(200 * MIB)) as outer:
        with limit.held(1) as inner:
            assert inner is outer
        assert resource.getrlimit(resource.RLIMIT_DATA)[0] != resource.RLIM_INFINITY


@pytest.mark.own_process
def test_what_is_free_in_the_heap_is_no_room(monkeypatch):
    with limit.held(above(1 << 30)) as hold:
        assert hold is not None
        found = []
        for free in (0, 300 << 20, 300 << 20):  # the third time it is as it was, not tighter again
            monkeypatch.setattr(limit.malloc, "free_bytes", lambda free=free: free)
            hold.begin_anew(widen=True)
            found.append(resource.getrlimit(resource.RLIMIT_DATA)[0])
    assert found[0] - found[1] == pytest.approx(300 << 20, abs=20 << 20)
    assert found[2] == pytest.approx(found[1], abs=20 << 20)


def test_whether_a_limit_leaves_room_for_threads_is_known():
    before, data = resource.getrlimit(resource.RLIMIT_DATA), machine.data_and_resident_bytes()[0]
    assert limit.has_room_for_threads()
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (data + 20 * MIB, before[1]))  # no stack and the margin
        assert not limit.has_room_for_threads()
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def test_without_a_budget_nothing_is_held():
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with limit.held(None) as nothing:
        assert nothing is None
        assert resource.getrlimit(resource.RLIMIT_DATA) == before


@pytest.mark.own_process
def test_a_limit_from_outside_comes_back_with_room_for_the_threads_that_were_started():
    before = resource.getrlimit(resource.RLIMIT_DATA)
    outside = machine.data_and_resident_bytes()[0] + 400 * MIB
    resource.setrlimit(resource.RLIMIT_DATA, (outside, before[1]))
    try:
        with limit.held(above(100 * MIB)) as hold:
            inside = resource.getrlimit(resource.RLIMIT_DATA)[0]
            assert inside < outside
            done = threading.Event()
            with hold.lifted():
                thread = threading.Thread(target=done.wait)
                thread.start()
            assert inside <= resource.getrlimit(resource.RLIMIT_DATA)[0] <= inside + 16 * MIB
            done.set()
            thread.join()
        assert outside <= resource.getrlimit(resource.RLIMIT_DATA)[0] <= outside + 32 * MIB
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def opened(hold: limit.Limit, size: int) -> np.ndarray:
    with hold.released():
        assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY
        return np.ones(size // 8)


@pytest.mark.own_process
def test_what_is_opened_without_the_limit_must_fit_all_the_same():
    with limit.held(above(50 * MIB)) as hold:
        assert opened(hold, 20 * MIB).nbytes == 20 * MIB
        with pytest.raises(errors.NothingFits, match=r"in use once the data were opened.*--memory \d+MiB"):
            opened(hold, 128 * MIB)


def given_back(hold: limit.Limit, size: int) -> None:
    with hold.released():
        np.ones(size // 8)


@pytest.mark.own_process
def test_what_was_open_between_two_looks_and_given_back_counts_too(monkeypatch):
    monkeypatch.setattr(limit, "LEAST_SECONDS", 3600.0)  # the thread never looks
    machine.give_back_unused()
    below_the_peak = machine.peak_resident_bytes() - machine.resident_bytes()  # of the tests before
    budget = above(50 * MIB + below_the_peak)
    with limit.held(budget) as hold, pytest.raises(errors.NothingFits, match="in use once the data were opened"):
        given_back(hold, 128 * MIB + below_the_peak)


def test_the_thread_looks_seldom_where_the_budget_is_far_and_often_where_it_is_near():
    waits = [limit.LEAST_SECONDS]
    while len(waits) < 10:
        waits.append(limit.next_wait(waits[-1], 1 << 40))
    assert waits[1] == 2 * waits[0]
    assert waits[-1] == limit.MOST_SECONDS
    assert limit.next_wait(limit.MOST_SECONDS, 50 * MIB) == limit.next_wait(limit.MOST_SECONDS, -MIB) == limit.LEAST_SECONDS
    half = limit.next_wait(limit.MOST_SECONDS, 1 << 30) * limit.TOUCHED_BYTES_PER_SECOND
    assert half <= 1 << 29


def asked_for(size: int) -> None:
    with limit.reported("the model was built"):
        np.empty(size // 8)


@pytest.mark.own_process
def test_memory_that_runs_out_outside_steps_is_told_with_a_budget_that_would_do():
    budget = above(50 * MIB)
    with limit.held(budget), pytest.raises(errors.NothingFits, match="memory ran out while the model was built") as raised:
        asked_for(80 * MIB)
    assert raised.value.smallest_bytes > budget
    with pytest.raises(MemoryError):  # nobody gave a budget
        asked_for(1 << 50)
