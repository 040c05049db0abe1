"""Schedules are pure functions of the step."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from delest.job import Recipe
from delest.training.schedules import Schedule


def test_hold_warms_up_holds_and_falls_to_zero_over_the_last_fifth():
    schedule = Schedule.of(Recipe(warmup=0.1, decay=0.2), 100)
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10:81] == [1.0] * 71
    assert rates[90] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(1 / 20)


def test_cosine_and_constant():
    cosine = Schedule.of(Recipe(schedule="cosine", warmup=0.0), 100)
    assert cosine.rate(50) == pytest.approx(0.5)
    assert Schedule.of(Recipe(schedule="constant", warmup=0.0), 100).rate(99) == 1.0


def test_ending_early_makes_the_decay_the_same_share_of_the_shorter_run():
    ended = Schedule.of(Recipe(decay=0.2), 1000).ended_early(400)
    assert ended.total_steps == 500
    assert ended.rate(400) == 1.0
    assert ended.rate(450) == pytest.approx(0.5)
    assert ended.decaying(400)


@given(
    shape=st.sampled_from(["hold", "cosine", "constant"]),
    total=st.integers(1, 500),
    warmup=st.floats(0, 1),
    decay=st.floats(0, 1),
    early=st.integers(0, 499),
)
def test_rates_stay_between_zero_and_one(shape, total, warmup, decay, early):
    schedule = Schedule.of(Recipe(schedule=shape, warmup=warmup, decay=decay), total)
    assert all(0 < schedule.rate(step) <= 1 or shape == "cosine" for step in range(total))
    ended = schedule.ended_early(min(early, total - 1))
    assert ended.total_steps <= total
    assert all(0 <= ended.rate(step) <= 1 for step in range(ended.total_steps))
