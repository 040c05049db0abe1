"""Optimizers without the compiler do the same arithmetic, and the compiler still works afterwards."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from delest.backends.torch import optimizers
from delest.backends.torch.lean import bare_step
from delest.job import Recipe


@pytest.mark.parametrize(
    "name", ["adamw", "adam", "sgd", "adadelta", "muon", "rmsprop", "nadam", "radam", "adagrad", "rprop", "adafactor", "asgd"]
)
def test_a_bare_step_equals_torchs_own(name):
    results = []
    for bare in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
        made = optimizers.build(model, Recipe(optimizer=name))
        for _ in range(3):
            model(torch.ones(4, 6)).square().sum().backward()
            for optimizer in made:
                bare_step(optimizer)() if bare else optimizer.step()
                optimizer.zero_grad()
        results.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))


SCRIPT = """
import sys, numpy as np, torch
from torch import nn
from delest.backends.torch.session import TorchSession
from delest.job import Job
from delest.records.batch import Batch
from delest.records.plan import Plan
from delest.records.source import Column, Schema, Target
schema = Schema(inputs=(Column(name="x", kind="array", shape=(6,)),), target=Target(name="y", kind="class", classes=("a", "b")))
session = TorchSession(Job(model=lambda: nn.Linear(6, 2), data="unused"), Plan(batch_size=4, micro_batch=4), schema)
session.step(Batch(np.ones((4, 6), np.float32), np.zeros(4, np.int64), np.arange(4), 0, 4), 1.0)
session.state()
assert "torch._dynamo" not in sys.modules, "a step imported the compiler"
import torch._dynamo
optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters())
optimizer.zero_grad()
optimizer.step()
"""


def test_a_step_does_not_load_the_compiler_which_loads_afterwards():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
