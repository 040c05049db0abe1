"""A machine that others keep busy is noticed."""

from __future__ import annotations

import os
import time

import pytest

from delest.hardware import busyness
from delest.hardware.busyness import Busyness, waited_seconds


def watched(waited: float, worked: float, threads: int, monkeypatch) -> Busyness:
    ticks, waits = iter([0.0, worked]), iter([5.0, 5.0 + waited])
    monkeypatch.setattr(busyness.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(busyness, "waited_seconds", lambda: next(waits))
    found = Busyness(threads)
    with found.watched():
        pass
    return found


def test_waiting_for_a_core_is_told_as_a_share_of_the_threads_time(monkeypatch):
    assert watched(0.8, 1.0, 2, monkeypatch).words() == "threads waited for a core in 40% of the time"
    assert watched(0.1, 1.0, 2, monkeypatch).words() == ""


def test_repeats_that_differ_are_told_where_they_are_long_enough():
    found = Busyness(1)
    found.repeated([0.001, 0.01])
    assert found.words() == ""
    found.repeated([0.1, 0.25])
    assert found.words() == "the same step took up to 2.5 times as long when it was repeated"


def test_the_second_figure_of_each_thread_counts(tmp_path):
    for number, text in (("1", "10 2000000000 3"), ("2", "10 500000000 3"), ("3", "")):
        folder = tmp_path / "proc/self/task" / number
        folder.mkdir(parents=True)
        (folder / "schedstat").write_text(text)
    assert waited_seconds(tmp_path) == 2.5
    assert waited_seconds(tmp_path / "elsewhere") == 0.0


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="this kernel does not count waiting for a core")
def test_two_processes_on_one_core_wait_for_each_other():
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    rival = os.fork()
    if not rival:
        while True:
            pass
    try:
        found, until = Busyness(1), time.monotonic() + 20
        while not found.words() and time.monotonic() < until:
            with found.watched():
                sum(range(3_000_000))
        assert "waited for a core" in found.words()
    finally:
        os.kill(rival, 9)
        os.waitpid(rival, 0)
        os.sched_setaffinity(0, cores)
