"""Fake sparse tensors keep the entries that real ones have."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from delest.backends.torch.loops import ModuleLoop, Program
from delest.backends.torch.recorder import Recorder
from delest.backends.torch.trace import trace_loop

ENTRIES, WIDTH = 100, 7
OPERATORS = {
    "clone": lambda one, other: one.clone(),
    "double": lambda one, other: 2 * one,
    "half": lambda one, other: one / 2,
    "negative": lambda one, other: -one,
    "coalesce": lambda one, other: one.coalesce(),
    "sum": lambda one, other: one + other,
}


def two_tensors() -> list[torch.Tensor]:
    indices = torch.stack([torch.arange(ENTRIES), torch.arange(ENTRIES)])
    return [
        torch.sparse_coo_tensor(indices + shift, torch.ones(ENTRIES, WIDTH), (500, 500, WIDTH), check_invariants=True)
        for shift in (0, ENTRIES)
    ]


@pytest.mark.parametrize("name", OPERATORS)
def test_results_have_the_entries_of_real_ones(name: str) -> None:
    real = OPERATORS[name](*two_tensors())
    mode = FakeTensorMode()
    fake = [
        torch.sparse_coo_tensor(
            mode.from_tensor(one._indices()), mode.from_tensor(one._values()), one.shape, check_invariants=False
        )
        for one in two_tensors()
    ]
    with mode, Recorder():
        found = OPERATORS[name](*fake)
    assert found._values().shape == real._values().shape
    assert found._indices().shape == real._indices().shape


def test_gradients_of_an_embedding_hold_a_row_for_each_index() -> None:
    rows, width, indices = 6, 16, 5

    def model() -> nn.Module:
        return nn.Embedding(1000, width, sparse=True)

    program = Program(model=model, inputs=torch.zeros(rows, indices, dtype=torch.int64), optimizer="sgd")
    found = trace_loop(
        lambda mode: ModuleLoop(program, mode),
        rows,
        scratch=lambda signatures: {text: {"scratch": 0, "outputs": []} for text in signatures if text},
    )
    storages = found.storages
    gradients = [
        size for size, category in zip(storages.sizes(rows), storages.category, strict=True) if category == "gradients"
    ]
    assert (
        sum(gradients) == 2 * rows * indices * 4 * width
    )  # a row of fp32 for each, in two steps; the indices are the batch's own
