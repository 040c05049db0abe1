"""Real steps under watch: bytes, owners and work that a reader can work out by hand."""

from collections import Counter

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from delest.backends.torch.loops import JobLoop
from delest.backends.torch.observe import Observation, observe, sum_by_module
from delest.job import Job, Recipe
from delest.records.batch import Batch
from delest.records.plan import Plan
from delest.records.source import Column, Schema, Target
from delest.records.trace import CATEGORIES

SCHEMA = Schema(
    inputs=(Column(name="x", kind="array", shape=(32,)),),
    target=Target(name="y", kind="class", classes=tuple("abcd")),
)
WIDTH, ROWS = 64, 48
WEIGHTS = 4 * (32 * WIDTH + WIDTH + WIDTH * WIDTH + WIDTH + WIDTH * 4 + 4)
TENSORS = 6
PRODUCTS = 2 * ROWS * (32 * WIDTH + WIDTH * WIDTH + WIDTH * 4)  # flops of the forward pass


def mlp() -> nn.Module:
    body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())
    return nn.Sequential(nn.Linear(32, WIDTH), nn.ReLU(), body, nn.Linear(WIDTH, 4))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(32, WIDTH), nn.ReLU()), nn.Linear(WIDTH, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(torch.utils.checkpoint.checkpoint(self.body, inputs, use_reentrant=False))


def batch() -> Batch:
    inputs = np.random.default_rng(0).standard_normal((ROWS, 32)).astype(np.float32)
    return Batch(inputs, np.arange(ROWS) % 4, np.arange(ROWS), 0, ROWS)


def watch(model=mlp, **recipe) -> Observation:
    job = Job(model=model, data="unused", batch_size=ROWS, recipe=Recipe(**recipe))
    return observe(JobLoop(job, Plan(batch_size=ROWS, micro_batch=ROWS), SCHEMA, batch()), ROWS)


@pytest.fixture(scope="module")
def watched() -> Observation:
    return watch(optimizer="adamw")


def totals(watched: Observation, step: int) -> dict[str, float]:
    """Bytes by category of all storages that were live at some operator of a step."""
    operators, storages = watched.trace.operators, watched.trace.storages
    first, last = operators.step.index(step), len(operators) - operators.step[::-1].index(step)
    sums = Counter()
    for i, category in enumerate(storages.category):
        if storages.born[i] < last and storages.dies[i] > first:
            sums[category] += storages.fixed_bytes[i]
    return sums


def highest(watched: Observation) -> float:
    storages = watched.trace.storages
    live = zip(storages.born, storages.dies, storages.fixed_bytes, strict=True)
    changes = Counter()
    for born, dies, size in live:
        changes[born] += size
        changes[dies] -= size
    total, most = 0.0, 0.0
    for position in sorted(changes):
        total += changes[position]
        most = max(most, total)
    return most


@pytest.mark.parametrize("step", [1, 2])
def test_weights_gradients_and_state_are_known_to_the_byte(watched, step):
    found = totals(watched, step)
    assert found["parameters"] == WEIGHTS
    assert found["gradients"] == WEIGHTS
    assert found["optimizer"] == 2 * WEIGHTS + 4 * TENSORS  # two moments, and a count a tensor
    assert found["data"] == ROWS * (32 * 4 + 8)
    assert watched.trace.state_bytes == found["parameters"] + found["optimizer"]


def test_activations_are_what_autograd_keeps(watched):
    outputs = 4 * ROWS * (2 * WIDTH + 4)  # of two ReLUs and of log-softmax
    assert outputs <= totals(watched, 2)["activations"] <= outputs + 64 * ROWS


def test_gradients_are_gone_after_each_step(watched):
    storages = watched.trace.storages
    gradients = [i for i, category in enumerate(storages.category) if category == "gradients"]
    assert len(gradients) == 2 * TENSORS
    assert all(storages.dies[i] < len(watched.trace.operators) for i in gradients)
    assert not totals(watched, 3)["gradients"]


def test_evaluation_keeps_nothing_for_a_backward_pass(watched):
    assert not totals(watched, 3)["activations"]
    assert totals(watched, 3)["temporaries"] >= 4 * ROWS * 4
    assert set(watched.trace.storages.category) <= set(CATEGORIES)


def test_work_is_counted_for_the_module_that_caused_it(watched):
    flops = sum_by_module(watched.trace.operators, watched.trace.operators.fixed_flops)
    first, body, head = (2 * ROWS * size for size in (32 * WIDTH, WIDTH * WIDTH, WIDTH * 4))
    assert flops["0"] == 2 * first  # data need no gradient
    assert flops["2"] == flops["2.0"] == 3 * body
    assert flops["3"] == 3 * head
    assert flops[""] == 3 * PRODUCTS - first


def test_every_operator_has_its_seconds(watched):
    assert len(watched.seconds) == len(watched.trace.operators)
    assert min(watched.seconds) >= 0
    shares = sum_by_module(watched.trace.operators, watched.seconds)
    assert shares["2.0"] > 0
    assert shares[""] >= shares["0"] + shares["2"] + shares["3"]
    assert shares["2"] >= shares["2.0"]


def test_the_allocator_saw_at_least_what_was_live(watched):
    assert highest(watched) <= watched.allocated_bytes < highest(watched) + (1 << 20)


def test_a_scratch_buffer_shows_in_what_was_allocated():
    """oneDNN copies weights and images into its own layouts, which no tensor shows."""

    def convolutions() -> nn.Module:
        blow_up = nn.Unflatten(1, (1, 4, 8))
        return nn.Sequential(blow_up, nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3), nn.Flatten(), nn.Linear(64 * 12, 4))

    watched = watch(convolutions)
    assert watched.allocated_bytes > highest(watched)


def test_a_module_with_operators_that_need_no_gradient_takes_none_of_its_neighbours_work():
    """Batch-norm counts its batches before it does anything that autograd knows."""
    watched = watch(lambda: nn.Sequential(nn.Linear(32, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 4)))
    flops = sum_by_module(watched.trace.operators, watched.trace.operators.fixed_flops)
    assert flops == {"": flops[""], "0": 2 * 2 * ROWS * 32 * WIDTH, "1": 0, "2": 3 * 2 * ROWS * WIDTH * 4}


def test_what_is_recomputed_belongs_to_its_module():
    watched = watch(Checkpointed)
    flops = sum_by_module(watched.trace.operators, watched.trace.operators.fixed_flops)
    assert flops["body.0"] == 3 * 2 * ROWS * 32 * WIDTH  # forward twice, weight gradient once
    assert flops["head"] == 3 * 2 * ROWS * WIDTH * 4


def test_sums_reach_all_modules_above_and_only_the_steady_step(watched):
    operators = watched.trace.operators
    counted = sum_by_module(operators, [1.0] * len(operators))
    assert counted[""] == operators.step.count(2)
    assert counted["2"] == counted["2.0"] + counted["2.1"]
