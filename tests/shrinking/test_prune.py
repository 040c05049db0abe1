import numpy as np
import pytest

from delest.records.pruning import Width
from delest.shrinking.prune import Costs, Wish, choose_units


def width(name, size, *sides, kind="channels", unit=1):
    return Width(name=name, kind=kind, size=size, unit=unit, sides=sides)


EARLY = width("early", 64, ("early", "out"), ("late", "in"))
LATE = width("late", 64, ("late", "out"), ("head", "in"))
COSTS = Costs(parameters={"early": 1000, "late": 9000, "head": 100}, seconds={"early": 8.0, "late": 2.0})


def scores(**values):
    return {name: np.asarray(value, float) for name, value in values.items()}


def test_the_units_that_are_worth_least_go_first_and_what_is_left_is_a_multiple_of_the_step():
    worth = scores(early=np.arange(64), late=np.full(64, 1e6))
    choice = choose_units([EARLY, LATE], worth, COSTS, Wish(parameters=0.3), step=8)
    assert set(choice.cuts) == {"early"}
    assert choice.cuts["early"] == list(range(len(choice.cuts["early"])))
    assert len(choice.cuts["early"]) % 8 == 0
    assert choice.parameters >= 0.3


def test_seconds_are_saved_where_they_are_spent():
    equal = scores(early=np.ones(64), late=np.ones(64))
    costs = Costs(parameters={**COSTS.parameters, "head": 5000}, seconds=COSTS.seconds)
    slow = choose_units([EARLY, LATE], equal, costs, Wish(seconds=0.2), favour_seconds=1.0)
    large = choose_units([EARLY, LATE], equal, costs, Wish(parameters=0.1), favour_seconds=0.0)
    assert slow.cuts.keys() == {"early"}
    assert large.cuts.keys() == {"late"}


def test_both_goals_are_reached_where_both_are_named():
    costs = Costs(parameters={"early": 100, "late": 9900, "head": 0}, seconds={"early": 9.0, "late": 1.0})
    worth = scores(early=np.full(64, 1e4), late=np.ones(64))
    alone = choose_units([EARLY, LATE], worth, costs, Wish(parameters=0.4), step=8)
    both = choose_units([EARLY, LATE], worth, costs, Wish(parameters=0.4, seconds=0.3), step=8)
    assert alone.seconds < 0.3
    assert both.parameters >= 0.4
    assert both.seconds >= 0.3
    unmeasured = Costs(parameters=costs.parameters, seconds={})
    assert choose_units([EARLY, LATE], worth, unmeasured, Wish(parameters=0.4, seconds=0.3), step=8).parameters < 0.6


def test_a_layer_that_lost_half_its_inputs_has_half_as_much_to_lose():
    both = choose_units(
        [EARLY, LATE], scores(early=np.ones(64), late=np.ones(64)), COSTS, Wish(parameters=2.0, most=0.5), favour_seconds=0.0
    )
    assert both.parameters == pytest.approx((0.5 * 1000 + 0.75 * 9000 + 0.5 * 100) / 10100)


def test_no_width_loses_more_than_is_allowed_nor_all_it_has():
    choice = choose_units([EARLY, LATE], scores(early=np.ones(64), late=np.ones(64)), COSTS, Wish(parameters=1.0, most=0.9))
    assert {name: len(units) for name, units in choice.cuts.items()} == {"early": 56, "late": 56}


def test_heads_go_one_by_one_and_one_stays():
    heads = width("attention", 4, ("q", "out"), ("o", "in"), kind="heads", unit=16)
    costs = Costs(parameters={"q": 100, "o": 100}, seconds={})
    choice = choose_units([heads], scores(attention=[3, 1, 2, 4]), costs, Wish(parameters=1.0, most=1.0))
    assert choice.cuts == {"attention": [0, 1, 2]}
    assert choose_units([heads], scores(attention=[3, 1, 2, 4]), costs, Wish(parameters=0.2)).cuts == {"attention": [1]}


def test_a_width_that_is_no_multiple_loses_its_rest_first():
    odd = width("odd", 50, ("odd", "out"))
    choice = choose_units([odd], scores(odd=np.arange(50)), Costs(parameters={"odd": 100}, seconds={}), Wish(parameters=0.01))
    assert choice.cuts == {"odd": [0, 1]}
