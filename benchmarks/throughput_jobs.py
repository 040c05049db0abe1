"""Four jobs as users give them, everything that a plan may decide left to it; for benchmarks/throughput.py.

`BLOCKS` says what "checkpoints on every block" means for each.
"""

from __future__ import annotations

import numpy as np
from plan_jobs import Attending, Text, Vision, next_token
from torch import nn
from zoo_networks import Residual, resnet

import delest

BATCHES = 6  # of rows: enough to divide and to probe
VOCABULARY = 4000


def job(model: object, inputs: np.ndarray, batch: int, **more: object) -> delest.Job:
    targets = np.random.default_rng(1).integers(0, 10, len(inputs))
    return delest.Job(model=model, data=(inputs, targets), batch_size=batch, recipe=delest.Recipe(epochs=1), **more)


def images(side: int, batch: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((BATCHES * batch, 3, side, side), np.float32)


def resnet18() -> delest.Job:
    return job(lambda: resnet(blocks=[2, 2, 2, 2], bottleneck=False, classes=10), images(128, 32), 32)


def vit() -> delest.Job:
    return job(Vision, images(96, 32), 32)


def gpt() -> delest.Job:
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (BATCHES * 16, 128))
    return job(lambda: Text(vocabulary=VOCABULARY, causal=True), tokens, 16, step=next_token)


class Layer(nn.Sequential):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__(nn.Linear(inner, outer), nn.ReLU())


def mlp() -> delest.Job:
    rows = np.random.default_rng(0).standard_normal((BATCHES * 64, 1024), np.float32)
    return job(
        lambda: nn.Sequential(*(Layer(width, 2048) for width in (1024, 2048, 2048, 2048)), nn.Linear(2048, 10)), rows, 64
    )


BLOCKS = {"resnet18": Residual, "vit": Attending, "gpt": Attending, "mlp": Layer}
