"""Trails: what of steps is compared, and by how much two may be said to differ."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from backends.test_session import PLAN, SCHEMA, batch, mlp
from delest.backends.torch.session import TorchSession
from delest.backends.torch.trail import Trail, follow, loss_difference, stays_double, tensor_difference, weight_difference
from delest.job import Job, Recipe
from delest.records.plan import Choice

JOB = Job(model=mlp, data="unused", batch_size=12, recipe=Recipe(lr=0.01))


def trail(job: Job = JOB, plan=PLAN, steps: int = 3, **how) -> Trail:
    return follow(job, plan, SCHEMA, itertools.repeat(batch()), [1.0] * steps, **how)


def test_a_trail_holds_what_steps_leave():
    found = trail()
    session = TorchSession(JOB, PLAN, SCHEMA)
    session.batch_loss(session.tensors(batch())).backward()
    wanted = [parameter.grad for parameter in session.model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(found.gradients, wanted, strict=True))
    assert len(found.losses) == 3
    assert found.drew
    assert list(found.weights) == list(session.model.state_dict())


def test_two_trails_of_the_same_steps_are_the_same():
    one, other = trail(), trail()
    assert one.losses == other.losses
    assert tensor_difference(one.gradients, other.gradients) == weight_difference(one, other) == 0.0


def test_gradients_of_parts_are_summed():
    parts = replace(PLAN, choices=(Choice(method="micro_batch", config={"rows": 5}, keeps="rounding", why=""),), micro_batch=5)
    whole, split = (trail(plan=plan, precision="fp64", dropping=False) for plan in (PLAN, parts))
    assert not whole.drew
    assert whole.gradients[0].dtype == torch.float64
    assert 0 < tensor_difference(whole.gradients, split.gradients) < 1e-14


def test_a_parameter_that_gets_no_gradient_has_zeros():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.frozen = nn.Linear(6, 3), nn.Linear(6, 3), nn.Linear(6, 3).requires_grad_(False)

        def forward(self, x):
            return self.used(x) + self.frozen(x)

    found = trail(replace(JOB, model=Half))
    assert [bool(gradient.any()) for gradient in found.gradients] == [True, True, False, False]


@pytest.mark.parametrize(
    ("model", "double"),
    [
        (mlp, True),
        (lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)), True),
        (lambda: nn.Sequential(Cast(torch.float32), nn.Linear(6, 3)), False),  # raises
        (lambda: nn.Sequential(nn.Linear(6, 3), Cast(torch.float32), Cast(torch.float64)), False),  # rounds
    ],
)
def test_narrower_arithmetic_is_seen(model, double):
    assert stays_double(replace(JOB, model=model), PLAN, SCHEMA, batch()) is double


class Cast(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return x.to(self.dtype)


@pytest.mark.parametrize(
    ("left", "right", "difference"),
    [
        ([2.0, 1.0], [2.0, 1.0], 0.0),
        ([2.0, 1.0], [2.0, 1.1], pytest.approx(0.1)),
        ([2.0, 1e-9], [2.0, 2e-9], pytest.approx(1e-9 / 2e-3)),  # near zero beside the others
        ([2.0, 1.0], [2.0, math.nan], math.inf),
        ([0.0], [1.0], math.inf),
    ],
)
def test_losses_differ_relatively(left, right, difference):
    assert loss_difference(left, right) == difference


@pytest.mark.parametrize(
    ("left", "right", "difference"),
    [
        ([[3.0, 4.0]], [[3.0, 4.0]], 0.0),
        ([[3.0, 4.0], [0.3, 0.4]], [[3.0, 4.0], [0.3, 0.9]], pytest.approx(1.0)),
        ([[3.0, 4.0], [1e-9, 0.0]], [[3.0, 4.0], [0.0, 0.0]], pytest.approx(1e-9 / 5e-3)),  # rounding errors alone
        ([[math.inf, 4.0]], [[math.inf, 4.0]], 0.0),  # a mask
        ([[math.inf, 4.0]], [[math.inf, 5.0]], pytest.approx(0.25)),
        ([[3.0, 4.0]], [[3.0, math.nan]], math.inf),
        ([[0.0]], [[1.0]], math.inf),
        ([[1.0]], [[1.0, 1.0]], math.inf),
    ],
)
def test_tensors_differ_relatively(left, right, difference):
    assert tensor_difference([torch.tensor(a) for a in left], [torch.tensor(b) for b in right]) == difference


def test_weights_of_other_names_differ():
    one = trail(steps=1)
    assert weight_difference(one, replace(one, weights={f"x.{name}": value for name, value in one.weights.items()})) == math.inf
