"""Nine jobs at 32 images or 8 sequences, by what their memory goes to; for benchmarks/smallest_budget.py."""

from __future__ import annotations

import numpy as np
from plan_jobs import Text, Vision, next_token, perceptron
from zoo_networks import resnet

import delest

IMAGES, SEQUENCES = 32, 8
ROWS = 8  # batches of rows: enough to divide and to probe


def images(side: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.standard_normal((ROWS * IMAGES, 3, side, side), np.float32), random.integers(0, 10, ROWS * IMAGES)


def tokens(length: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.integers(0, vocabulary, (ROWS * SEQUENCES, length)), random.integers(0, 10, ROWS * SEQUENCES)


def job(model: object, data: object, batch: int, **more: object) -> delest.Job:
    recipe = delest.Recipe(optimizer="adamw", epochs=1, precision="fp32", memory_format="contiguous")
    return delest.Job(model=model, data=data, batch_size=batch, recipe=recipe, **more)


# No batch normalisation, activations at least 70 % of the peak


def vit() -> delest.Job:
    return job(lambda: Vision(width=256, layers=4), images(96), IMAGES)


def gpt() -> delest.Job:
    """4 layers, 50,257 words, 8 x 256."""
    build = lambda: Text(width=256, layers=4, vocabulary=50257, causal=True)  # noqa: E731
    return job(build, tokens(256, 50257), SEQUENCES, step=next_token)


# 60 to 70 %


def encoder() -> delest.Job:
    return job(lambda: Text(width=384, layers=6), tokens(192, 2000), SEQUENCES)


def deep() -> delest.Job:
    return job(lambda: Vision(width=384, layers=4), images(56), IMAGES)


def wider() -> delest.Job:
    """19 M parameters in 6 layers, 8 x 320 tokens: as wide and deep as a usual small encoder."""
    return job(lambda: Text(width=512, layers=6), tokens(320, 2000), SEQUENCES)


# With batch normalisation


def resnet18() -> delest.Job:
    return job(lambda: resnet(blocks=[2, 2, 2, 2], bottleneck=False, classes=10), images(64), IMAGES)


def resnet18_224() -> delest.Job:
    """At the size of its paper's images."""
    return job(lambda: resnet(blocks=[2, 2, 2, 2], bottleneck=False, classes=10), images(224), IMAGES)


# States dominate


def mlp() -> delest.Job:
    """57 M parameters."""
    return job(lambda: perceptron(width=4224, layers=3), images(16), IMAGES)


def wide() -> delest.Job:
    return job(lambda: Text(width=768, layers=4), tokens(32, 2000), SEQUENCES)
