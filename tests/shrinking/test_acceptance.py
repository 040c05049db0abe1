from dataclasses import replace

import pytest

from delest.records.shrunk import Bound, Candidate
from delest.shrinking.acceptance import Wish, best_of, judge

PLAIN = Candidate(
    name="fp32",
    runtime="ONNX Runtime",
    file_bytes=1000,
    weights_bytes=900,
    latency_seconds={1: 0.010, 32: 0.100},
    latency_spread={1: (0.009, 0.011), 32: (0.095, 0.105)},
    selection={"accuracy": 0.9},
)
SMALLER = replace(
    PLAIN,
    name="int8",
    file_bytes=400,
    bound=Bound(drop=0.001, upper=0.003, rows=1000, disagreeing=0.01),
    selection={"accuracy": 0.899},
)


def form(name, size, seconds, drop=0.0):
    latency = {"latency_seconds": {1: seconds, 32: seconds}, "latency_spread": {1: (seconds, seconds), 32: (seconds, seconds)}}
    return replace(
        PLAIN, name=name, file_bytes=size, bound=Bound(drop=drop, upper=drop, rows=1000, disagreeing=0.01), **latency
    )


SLOW = {"latency_seconds": {1: 0.012, 32: 0.100}, "latency_spread": {1: (0.0115, 0.0125), 32: (0.095, 0.105)}}
FAST = {"latency_seconds": {1: 0.010, 32: 0.050}, "latency_spread": {1: (0.009, 0.011), 32: (0.048, 0.052)}}
NOISY = {"latency_seconds": {1: 0.010, 32: 0.090}, "latency_spread": {1: (0.009, 0.011), 32: (0.070, 0.110)}}


@pytest.mark.parametrize(
    ("changes", "kept", "why"),
    [
        ({}, True, "file 2.5 times smaller"),
        (FAST, True, "file 2.5 times smaller; 2.00 times faster at batch 32"),
        ({**FAST, "file_bytes": 990}, True, "2.00 times faster at batch 32"),
        (SLOW, True, "file 2.5 times smaller; 1.20 times slower at batch 1"),
        ({"file_bytes": 960}, False, "neither 5% smaller nor"),
        ({**NOISY, "file_bytes": 960}, False, "faster at batch 1 or 32"),
        ({"file_bytes": 950}, True, "file 1.1 times smaller"),
        ({"bound": None}, False, "nothing says how accurate it is"),
        (
            {"bound": Bound(drop=0.02, upper=0.03, rows=1000, disagreeing=0.03)},
            False,
            "it loses 0.02 on average and up to 0.03",
        ),
        ({"bound": Bound(drop=0.001, upper=0.009, rows=1000, disagreeing=0.03)}, False, "about 4,000 such rows"),
        ({"bound": Bound(drop=0.0, upper=0.0, rows=100, disagreeing=0.0)}, False, "no row differs on 100 rows"),
        ({"bound": Bound(drop=0.0, upper=0.0, rows=600, disagreeing=0.0)}, True, "file 2.5 times smaller"),
    ],
)
def test_a_form_ships_where_it_is_proven_and_pays(changes, kept, why):
    found, reason = judge(replace(SMALLER, **changes), PLAIN, 0.005)
    assert found is kept
    assert why in reason


def test_what_ships_is_small_and_fast_and_of_equals_what_loses_least():
    plain = form("fp32", 1000, 1.0)
    slim, light, same = (
        form("slim", 500, 0.5, drop=0.003),
        form("light", 250, 0.9, drop=0.0),
        form("same", 500, 0.51, drop=0.001),
    )
    ships, fast, small, missed = best_of([plain, slim, light, same], plain, Wish())
    assert (ships.name, fast.name, small.name, missed) == ("light", "slim", "light", None)
    assert best_of([plain, slim, same], plain, Wish())[0].name == "same"


def noisy(name, size, seconds, drop=0.0, around=0.2):
    spread = (seconds * (1 - around), seconds * (1 + around))
    return replace(form(name, size, seconds, drop), latency_spread={1: spread, 32: spread})


def test_chance_decides_nothing_among_forms_of_one_size():
    plain = form("fp32", 1000, 1.0)
    for one, other in ((0.5, 0.6), (0.6, 0.5)):  # the same two, measured on a busy machine
        candidates = [plain, noisy("int8", 250, one, drop=0.002), noisy("weights", 250, other, drop=0.001)]
        ships, fast, _, _ = best_of(candidates, plain, Wish())
        assert (ships.name, fast.name) == ("weights", "weights")
    quick = [plain, form("int8", 250, 0.5, drop=0.002), form("weights", 250, 0.6, drop=0.001)]
    assert [one.name for one in best_of(quick, plain, Wish())[:2]] == ["int8", "int8"]
    equal = [plain, noisy("int8", 250, 0.6), noisy("weights", 249, 0.5)]
    assert best_of(equal, plain, Wish())[0].name == "weights"


def test_a_wish_decides_what_may_ship_and_the_nearest_is_named_where_nothing_does():
    plain, slim, light = form("fp32", 1000, 1.0), form("slim", 500, 0.5), form("light", 250, 0.9)
    assert best_of([plain, slim, light], plain, Wish(latency_seconds=0.6))[0].name == "slim"
    ships, _, _, missed = best_of([plain, slim, light], plain, Wish(latency_seconds=0.25, size_bytes=250))
    assert ships.name == "slim"
    assert "the nearest is slim" in missed
    assert "answers in 0.25 s and takes 250 B" in missed
