"""Texts in PyTorch: the loss of a token, the starter, what a model must give, and a teacher."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from delest.backends.torch import losses, starters
from delest.backends.torch.check import check
from delest.backends.torch.distillation import of_tokens
from delest.backends.torch.pruning.widths import cut, find_widths
from delest.backends.torch.session import TorchSession
from delest.job import Job, Recipe
from delest.records.batch import Batch
from delest.records.plan import Plan
from delest.records.source import Column, Schema, Target

CONTEXT, WORDS = 6, ("\ufffd", *"abcdefg")
SCHEMA = Schema(
    inputs=(Column(name="tokens", kind="tokens", shape=(CONTEXT,), dtype="int64"),),
    target=Target(name="next", kind="tokens", classes=WORDS),
)


def batch(rows: int = 4) -> Batch:
    ids = np.random.default_rng(0).integers(0, len(WORDS), (rows, CONTEXT + 1))
    return Batch(ids[:, :-1], ids[:, 1:], np.arange(rows), 0, rows)


def session(job: Job) -> TorchSession:
    return TorchSession(job, Plan(batch_size=job.batch_size, micro_batch=job.batch_size), SCHEMA)


class Feed:
    def ordered(self):
        return iter([batch()])


def test_the_loss_is_the_mean_over_tokens_unsmoothed():
    loss = losses.choose("auto", "tokens", 0.1)
    outputs, targets = torch.randn(4, CONTEXT, 8), torch.from_numpy(batch().targets)
    expected = -outputs.log_softmax(2).gather(2, targets[..., None])[..., 0]
    assert loss.mean(outputs, targets) == pytest.approx(expected.mean())
    torch.testing.assert_close(loss.rows(outputs, targets), expected.mean(1))


def test_the_starter_sees_nothing_that_comes_later():
    model = starters.choose(SCHEMA).eval()
    ids = torch.from_numpy(batch().inputs)
    changed = ids.clone()
    changed[:, 3] = (ids[:, 3] + 1) % len(WORDS)
    with torch.no_grad():
        one, other = model(ids), model(changed)
        shorter = model(ids[:, :3])
    assert one.shape == (4, CONTEXT, len(WORDS))
    torch.testing.assert_close(one[:, :3], other[:, :3])
    torch.testing.assert_close(one[:, :3], shorter)
    assert (one[:, 3:] - other[:, 3:]).abs().amax((0, 2)).min() > 1e-4


def test_all_of_the_starter_can_be_made_narrower():
    model = starters.CausalTransformer(8, CONTEXT, width=32, layers=2, heads=4)
    ids = torch.from_numpy(batch().inputs)
    found = find_widths(model, lambda network: network(ids))
    heads = {width.name for width in found.widths if width.kind == "heads"}
    assert heads == {"blocks.0.attention", "blocks.1.attention"}
    assert {width.size for width in found.widths if width.kind == "channels"} == {
        32,
        128,
    }  # of the stream, and of each hidden layer
    assert len(found.widths) == 5
    cut(model, lambda network: network(ids), {width.name: [1] for width in found.widths})
    assert model(ids).shape == (4, CONTEXT, len(WORDS))
    assert (model.blocks[0].attention.num_heads, model.tokens.embedding_dim) == (3, 31)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda schema: nn.Embedding(schema.outputs, 5), r"outputs of shape \(4, 6, 5\).*each of the 8 tokens.*\(4, 6, 8\)"),
        (lambda: nn.Sequential(nn.Embedding(8, 8), nn.Flatten()), r"outputs of shape \(4, 48\)"),
    ],
)
def test_outputs_of_another_shape_are_a_fault(model, words):
    (fault,) = check(Job(model=model, data="x"), SCHEMA, batch(), batch(16))
    assert __import__("re").search(words, fault)


def test_a_step_of_ones_own_is_judged_by_what_predict_gives():
    model = lambda: nn.Embedding(8, 8)  # noqa: E731
    own = Job(
        model=model,
        data="x",
        step=lambda net, given: nn.functional.cross_entropy(net(given.inputs).flatten(0, 1), given.targets.flatten()),
        predict=lambda net, inputs: net(inputs),
    )
    assert check(own, SCHEMA, batch(), batch(16)) == []
    (ours,), (theirs,) = (list(session(job).outputs(Feed())) for job in (own, Job(model=model, data="x")))
    np.testing.assert_array_equal(ours.losses, theirs.losses)
    assert len(set(ours.losses.tolist())) == 4


def test_a_text_is_learnt():
    job = Job(model=None, data="x", batch_size=4, recipe=Recipe(lr=3e-3))
    trained, given = session(job), batch()
    first = float(trained.step(given, 1.0).loss)
    for _ in range(40):
        last = float(trained.step(given, 1.0).loss)
    assert first == pytest.approx(np.log(8), abs=0.5)
    assert last < 0.3


def test_a_student_is_pulled_towards_the_probabilities_of_its_teacher():
    answer = torch.randn(2, CONTEXT, 8)
    assert of_tokens(answer + 3.0, answer) < 1e-6  # the same probabilities
    outputs = torch.zeros_like(answer, requires_grad=True)
    of_tokens(outputs, answer).backward()
    expected = (torch.full_like(answer, 1 / 8) - answer.softmax(2)) / (2 * CONTEXT)
    torch.testing.assert_close(outputs.grad, expected)
