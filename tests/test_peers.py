"""The benchmark of peers: who is the best of them, and what delest is beside it; a script under a limit from outside."""

from __future__ import annotations

from typing import Any

import pytest

from benchmark_files import load

peers, child = load("peers"), load("peers_child")


def entry(how: str, seconds: list[float], ended: str = "works") -> dict[str, Any]:
    return {"how": how, "batch": "find", "ended": ended, "step_seconds": seconds, "cpu_step_seconds": seconds}


def test_delest_is_compared_with_the_fastest_that_works_by_blocks_that_were_made_by_turns():
    slow, fast = entry("accelerate", [4.0, 4.0, 4.0]), entry("checkpoint", [2.0, 6.0, 3.0])
    died = entry("lightning-power", [1.0], "status 1: RuntimeError")
    ours = [entry("delest-fp32", [1.0, 4.0, 2.0], "done"), entry("delest", [1.0, 2.0, 1.0], "done")]
    found = peers.compare([slow, fast, died, *ours])
    assert found["best"] == ["checkpoint", "find"]
    assert found["delest-fp32"]["ratio"] == 1.5  # of 2.0, 1.5 and 1.5
    assert found["delest"]["ratio"] == 3.0


@pytest.mark.parametrize("ended", ["NothingFits", "status -9: "])
def test_delest_counts_for_nothing_where_it_does_not_work(ended):
    assert peers.compare([entry("plain", [2.0]), entry("delest", [], ended)])["delest"]["ratio"] == 0.0
    bounds = {bound["name"]: bound for bound in peers.bounds_of([])}
    assert bounds["trainings of delest over their budget"]["ok"]


def test_parts_are_equal_and_no_larger_than_what_a_finder_found():
    assert [child.divisor(32, most) for most in (64, 32, 28, 15, 1)] == [32, 32, 16, 8, 1]


def test_a_script_that_the_limit_leaves_no_room_dies_and_says_why(monkeypatch):
    monkeypatch.setattr(peers, "THREADS", 1)
    one = peers.Contestant("plain", "vit", 8 << 20, 32)
    try:
        assert not one.work()
        assert "alloc" in one.ended or "MemoryError" in one.ended
    finally:
        one.kill()
