"""Blocks of a trace, and the choice among them held against all possible ones."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from delest.backends.torch.loops import ModuleLoop, Program
from delest.backends.torch.trace import trace_loop
from delest.planning.blocks import Block, choose_blocks, find_blocks


class Layer(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(torch.relu(self.first(x)))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(3)])
        self.norm = nn.LayerNorm(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def stages() -> nn.Module:
    """Stages of blocks, as residual networks have them."""
    return nn.Sequential(nn.Sequential(Layer(), Layer()), nn.Sequential(Layer(), nn.ReLU()), nn.Linear(32, 4))


class Levels(nn.ModuleList):
    """A list under a name of its own."""


class Decoder(nn.Module):
    """A list of plain layers, as the upward half of a U-Net has them, and a list of one block."""

    def __init__(self) -> None:
        super().__init__()
        self.up = Levels([nn.Linear(32, 64), nn.Linear(64, 32)])
        self.merge = nn.ModuleList([Layer()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.merge[0](self.up[1](torch.relu(self.up[0](x))))


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))


def blocks_of(model: object, rows: int = 16) -> list[Block]:
    program = Program(model=model, inputs=torch.zeros(rows, 32), optimizer="sgd")
    trace = trace_loop(
        lambda mode: ModuleLoop(program, mode),
        rows,
        scratch=lambda signatures: {text: {"scratch": 0, "outputs": []} for text in signatures if text},
    )
    return find_blocks(trace, [1.0] * len(trace.operators), rows)


@pytest.mark.parametrize(
    ("model", "names"),
    [(Encoder, ["layers.0", "layers.1", "layers.2"]), (stages, ["0.0", "0.1", "1"]), (plain, []), (Decoder, ["merge.0"])],
)
def test_blocks_are_the_modules_below_which_nothing_repeats(model, names):
    assert [block.name for block in blocks_of(model)] == names


def test_a_block_saves_what_it_keeps_but_for_its_output():
    rows = 16
    kept = 4 * rows * 4 * 32  # the output of the ReLU in fp32; that of the block is the next one's input
    assert [block.saved_bytes for block in blocks_of(Encoder, rows)[:2]] == [kept, kept]


@settings(max_examples=40, deadline=None)
@given(
    blocks=st.lists(st.tuples(st.integers(1, 500), st.integers(1, 50)), min_size=1, max_size=7),
    share=st.floats(0.05, 1.2),
)
def test_the_choice_is_the_cheapest_that_saves_enough(blocks, share):
    given_blocks = [Block(f"b{i}", size << 20, seconds / 10) for i, (size, seconds) in enumerate(blocks)]
    need = share * sum(block.saved_bytes for block in given_blocks)

    def saved(chosen):
        return sum(block.saved_bytes for block in chosen) - max((block.saved_bytes for block in chosen), default=0)

    every = [chosen for count in range(len(blocks) + 1) for chosen in itertools.combinations(given_blocks, count)]
    enough = [chosen for chosen in every if saved(chosen) >= need]
    found = choose_blocks(given_blocks, need)
    assert (found is None) == (not enough)
    if found is not None:
        chosen = [block for block in given_blocks if block.name in found]
        assert saved(chosen) >= need * (1 - 1e-6)
        least = min(sum(block.seconds for block in those) for those in enough)
        assert sum(block.seconds for block in chosen) == pytest.approx(least, abs=1e-3)
