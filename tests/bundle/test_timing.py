import gc

import pytest

from delest.bundle.timing import time_alternating


def test_calls_take_turns_and_warm_up_is_not_counted(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("delest.bundle.timing.time.perf_counter", lambda: clock[0])
    called = []

    def call(name, seconds):
        def run():
            called.append(name)
            clock[0] += 100.0 if len(called) <= 4 else seconds  # the four warm-up calls are slow

        return run

    timed = time_alternating({"a": call("a", 1.0), "b": call("b", 3.0)}, seconds=0.0, warmups=2, least_rounds=4)
    assert called[:4] == ["a", "a", "b", "b"]
    assert called[4:] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert timed == {"a": (1.0, 1.0, 1.0), "b": (3.0, 3.0, 3.0)}


def test_it_goes_on_until_the_time_is_up(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("delest.bundle.timing.time.perf_counter", lambda: clock[0])
    calls = []

    def call():
        calls.append(1)
        clock[0] += 1.0

    time_alternating({"a": call}, seconds=20.0, warmups=0, least_rounds=3)
    assert len(calls) == 20


def test_the_garbage_collector_rests_and_returns():
    states = []
    time_alternating({"a": lambda: states.append(gc.isenabled())}, seconds=0.0, warmups=0)
    assert states == [False] * 7
    assert gc.isenabled()


def test_the_garbage_collector_returns_after_a_failure():
    calls = []

    def fail():
        calls.append(1)
        if len(calls) > 1:
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        time_alternating({"a": fail}, warmups=1)
    assert gc.isenabled()
