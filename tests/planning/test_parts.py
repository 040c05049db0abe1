"""Blocks and the loss in parts: what planning thinks of them beside a trace of each, when they are taken, and why not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from delest import methods
from delest.backends.torch.loops import JobLoop
from delest.backends.torch.trace import trace_loop
from delest.footprint import heap
from delest.footprint.composition import Lives
from delest.job import Job, Recipe
from delest.planning import traced
from delest.planning.blocks import Block
from delest.planning.candidates import Judge, all_candidates
from delest.planning.parts import evaluation_rows, find_head, in_chunks, in_layers
from delest.planning.request import EXACT, Request
from delest.records.batch import Batch
from delest.records.plan import Choice, Plan
from delest.records.source import Column, Schema, Target
from rooflines import ROOFLINE

MIB, WORDS = 1 << 20, 512  # rows where there are many classes
ROWS, WIDTH, LAYERS, LENGTH = 32, 256, 6, 16
BLOCKS = [f"layers.{number}" for number in range(LAYERS)]
SCHEMA = Schema(
    inputs=(Column(name="x", kind="array", shape=(LENGTH, WIDTH)),), target=Target(name="y", kind="class", classes=("a", "b"))
)


class Layer(nn.Module):
    def __init__(self, normalised: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 8 * WIDTH), nn.Linear(8 * WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(LENGTH) if normalised else nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(torch.nn.functional.gelu(self.first(self.norm(x))))


class Network(nn.Module):
    def __init__(self, normalised: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(normalised) for _ in range(LAYERS)])
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def job(model: object = Network, rows: int = ROWS) -> Job:
    return Job(model=model, data="unused", batch_size=rows, recipe=Recipe(precision="fp32"))


def wording() -> nn.Module:
    """Blocks of little weight before a head of much."""
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(2)))
    return nn.Sequential(nn.Flatten(), nn.Linear(LENGTH * WIDTH, WIDTH), blocks, nn.Linear(WIDTH, 3000))


def tracing(wanted: Job):
    example = Batch(np.zeros((2, LENGTH, WIDTH), np.float32), np.zeros(2, np.int64), np.arange(2), 0, 2)

    def retrace(choices: tuple[Choice, ...]):
        rows = wanted.batch_size
        plan = Plan(batch_size=rows, micro_batch=rows, choices=choices, threads=1)
        return trace_loop(
            lambda mode: JobLoop(wanted, plan, SCHEMA, example),
            rows,
            scratch=lambda signatures: {text: {"scratch": 0, "outputs": []} for text in signatures if text},
        )

    return retrace


def choice(method: str, **config: object) -> Choice:
    return Choice(method=method, config=config, keeps="rounding", why="")


def highest(trace, rows: int = ROWS, evaluated: int = 1) -> int:
    return max(Lives(trace, rows=rows, evaluation_rows=evaluated).totals())


def request(grown_mib: float, wanted: Job, *, exact: bool = True, normalised: bool = False) -> Request:
    """A budget that leaves so much for training, beyond every margin."""
    sample = {
        "rows": wanted.batch_size,
        "first": MIB,
        "steady": MIB,
        "evaluation": MIB,
        "seconds": 0.5,
    }  # the trace alone counts
    probe = {
        "samples": [sample],
        "variants": {},
        "batch_statistics": normalised,
        "busy": "",
        "base_bytes": MIB,
        "weights_bytes": MIB,
        "state_bytes": MIB,
        "device": "cpu",
    }
    blank = Request(job=wanted, probe=probe, budget_bytes=0, asked=True, idle_bytes=100 * MIB, threads=1, exact=exact)
    budget = blank.high_bytes(grown_mib * MIB)
    return Request(job=wanted, probe=probe, budget_bytes=budget, asked=True, idle_bytes=100 * MIB, threads=1, exact=exact)


@pytest.mark.parametrize("parts", [2, 8])
def test_blocks_in_parts_are_near_their_trace(parts: int) -> None:
    retrace = tracing(job())
    plain = retrace((choice("optimizer_in_backward"),))
    found = retrace((choice("optimizer_in_backward"), choice("layered_accumulation", modules=BLOCKS, parts=parts)))
    guess = in_layers(plain, BLOCKS, parts)
    assert highest(guess) == pytest.approx(highest(found), rel=0.15)
    assert highest(guess) < 0.7 * highest(plain)


def test_the_head_is_found_where_its_logits_weigh() -> None:
    retrace = tracing(job(wording, WORDS))
    plain = retrace(())
    head = find_head(plain, WORDS)
    assert head == {"module": "3", "parts": 4}
    assert find_head(tracing(job())(()), ROWS) is None
    found, logits = retrace((choice("chunked_loss", **head),)), WORDS * 3000 * 4
    assert highest(plain, WORDS) - highest(found, WORDS) > logits
    assert highest(found, WORDS) <= highest(in_chunks(plain, head), WORDS) * 1.15


def test_evaluation_has_as_few_rows_as_the_parts() -> None:
    parts = choice("layered_accumulation", modules=BLOCKS, parts=5)
    assert evaluation_rows((), 32, 32) == 32
    assert evaluation_rows((parts,), 32, 32) == 7
    assert evaluation_rows((parts,), 4, 32) == 4


def test_the_smallest_exact_budget_takes_blocks_in_parts_with_updates_in_the_backward_pass(monkeypatch) -> None:
    monkeypatch.setattr(heap, "is_here", lambda: False)  # live bytes alone, without the chances of a heap
    wanted = job()
    retrace = tracing(wanted)
    choices = (choice("layered_accumulation", modules=BLOCKS, parts=8), choice("optimizer_in_backward"))
    judge = Judge(retrace(()), request(1e3, wanted), ROOFLINE)
    least = judge.held_bytes(retrace(choices), ROWS, choices)
    plan = traced.choose(request(1.05 * least / MIB, wanted), (), retrace, ROOFLINE)
    parts = plan.config("layered_accumulation")["parts"]
    assert plan.config("layered_accumulation")["modules"] == BLOCKS
    assert plan.config("optimizer_in_backward") == {}
    assert plan.micro_batch == ROWS
    assert all(one.keeps in EXACT for one in plan.choices)
    assert f"in {parts} parts of the batch" in next(one.why for one in plan.choices if one.method == "layered_accumulation")
    assert 100 * MIB + least <= plan.predicted.peak_bytes <= 100 * MIB + 1.05 * least
    assert f"x.chunk({parts})" in plan.code


def test_what_a_model_does_not_take_is_said_in_its_words() -> None:
    wanted = job(lambda: Network(normalised=True))
    plan = traced.choose(request(1e3, wanted, normalised=True), (), tracing(wanted), ROOFLINE)
    why = {one.method: one.why for one in plan.rejected}
    assert "normalises over the batch" in why["layered_accumulation"]
    assert "no last linear layer" in why["chunked_loss"]
    tried = []

    def refusal(choices: tuple[Choice, ...]) -> str:
        tried.append([choice.method for choice in choices])
        return f"{choices[-1].method} is not for this model"

    wanted = job(wording, WORDS)
    plan = traced.choose(request(1e3, wanted), (), tracing(wanted), ROOFLINE, refusal)
    assert tried == [["layered_accumulation", "chunked_loss"], ["layered_accumulation"], ["chunked_loss"]]
    why = {one.method: one.why for one in plan.rejected}
    assert why["chunked_loss"] == "chunked_loss is not for this model"
    assert not {"chunked_loss", "layered_accumulation"} & {name for one in plan.frontier for name in one.methods}


def test_no_block_around_the_layer_of_a_chunked_loss_is_recomputed(monkeypatch) -> None:
    """Each combination that is compared can be applied."""
    wanted = job(wording, WORDS)
    plain = tracing(wanted)(())
    judge = Judge(plain, request(1, wanted), ROOFLINE)
    blocks = [Block(name, MIB, 0.01) for name in ("2.0", "3")]
    monkeypatch.setattr(Judge, "blocks", lambda self, trace, rows: blocks)
    found = [{one.method: one.config for one in candidate.choices} for candidate in all_candidates(plain, (), judge)]
    assert all(not methods.conflicts(configs) for configs in found)
    recomputed = [
        configs["activation_checkpointing"]["modules"]
        for configs in found
        if {"chunked_loss", "activation_checkpointing"} <= set(configs)
    ]
    assert recomputed
    assert all(names == ["2.0"] for names in recomputed)
