"""Layers that compute in bf16 while a model trains; their weights, and evaluation, saving and export, stay in fp32.

Source: https://keras.io/api/mixed_precision/policy/, `mixed_bfloat16`, here for layers that were built in fp32.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import keras
from keras import ops

from delest.frameworks.keras.optimizers import layers_of

POLICY = "mixed_bfloat16"
_WIDTH, _TIMES = 512, 5  # of the product that is timed


def in_fp32(model: keras.Model) -> list[Any]:
    """The layers of a model that compute in fp32, without the models among them that only hand on."""
    return [layer for layer in layers_of(model) if layer.dtype_policy.name == "float32" and not _hands_on(layer)]


def _hands_on(layer: Any) -> bool:
    """Whether a layer is a model without a `call` of its own."""
    return isinstance(layer, keras.Model) and type(layer).call.__module__.startswith("keras.src.models.")


@contextlib.contextmanager
def in_bf16(layers: list[Any]) -> Iterator[None]:
    """Let these layers compute in bf16 while the context is open."""
    if not layers:
        yield
        return
    policies, lower = [layer.dtype_policy for layer in layers], keras.DTypePolicy(POLICY)
    try:
        for layer in layers:
            layer.dtype_policy = lower
        yield
    finally:
        for layer, policy in zip(layers, policies, strict=True):
            layer.dtype_policy = policy


def gains() -> bool:
    """Whether a product in bf16 is faster here than one in fp32: where it is not, a step takes up to ten times as long. How much says little: steps decide."""
    return _product_seconds("bfloat16") < _product_seconds("float32")


def _product_seconds(dtype: str) -> float:
    factor, found = ops.ones((_WIDTH, _WIDTH), dtype), []
    for _ in range(_TIMES):
        began = time.perf_counter()
        float(ops.cast(ops.matmul(factor, factor)[0, 0], "float32"))
        found.append(time.perf_counter() - began)
    return min(found)
