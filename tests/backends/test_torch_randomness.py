"""Random states that are noted before each guarded step, and brought back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from delest.backends.torch import randomness

DRAWS: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.rand(3).tolist(),
    "python": lambda: [random.gauss(0, 1), random.random()],
    "numpy": lambda: np.random.random(2).tolist(),
    "numpy, one of a pair": lambda: np.random.normal(),
    "nothing": lambda: None,
}


@pytest.fixture(autouse=True)
def _states_as_before() -> Iterator[None]:
    before = randomness.capture()
    randomness.seed_all(0)
    yield
    randomness.restore(before)


def everything() -> list[Any]:
    return [draw() for draw in DRAWS.values()]


def test_every_state_is_brought_back_wherever_in_a_pair_of_normal_numbers_it_is():
    order = random.Random(1)
    for _ in range(100):
        DRAWS[order.choice(list(DRAWS))]()
        back = randomness.hold()
        first = everything()
        back()
        assert everything() == first


def test_it_may_be_brought_back_again_after_others_were_noted():
    back = randomness.hold()
    first = everything()
    randomness.hold()
    back()
    randomness.hold()
    assert everything() == first
    back()
    assert everything() == first


def test_a_state_that_somebody_set_meanwhile_is_noted():
    np.random.normal()
    with_one_left = np.random.get_state()
    randomness.hold()
    np.random.seed(3)
    back = randomness.hold()
    first = np.random.random()
    np.random.set_state(with_one_left)
    back()
    assert np.random.random() == first


def test_another_generator_of_numpys_is_noted_too():
    before = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(1))
        back = randomness.hold()
        first = np.random.random(3).tolist()
        back()
        assert np.random.random(3).tolist() == first
    finally:
        np.random.set_bit_generator(before)
