"""Logits that are made and used up chunk by chunk: the plain loss and gradients, less memory, and whoever wants logits is refused by name."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import delest
from delest import errors, methods
from delest.backends.torch.session import TorchSession
from delest.job import Job, Recipe
from delest.records.batch import Batch
from delest.records.plan import Choice, Plan
from delest.records.source import Column, Schema, Target

WORDS, ROWS, LENGTH = 50, 8, 7
WEIGHTS = torch.linspace(0.1, 2.0, WORDS, dtype=torch.float64)


class Language(nn.Module):
    """[B, T] to [B, T, V]; a head of its own, or the embedding's weights."""

    def __init__(self, tied: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.embedding, self.mix = nn.Embedding(WORDS, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, WORDS, bias=bias)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embedding(x))))


def plan(**configs: dict[str, Any]) -> Plan:
    choices = tuple(Choice(method=name, config=config, keeps="rounding", why="") for name, config in configs.items())
    return Plan(choices=choices, batch_size=ROWS, micro_batch=ROWS, threads=1)


def chunked(parts: int = 5, module: str = "head", **others: dict[str, Any]) -> Plan:
    return plan(chunked_loss={"module": module, "parts": parts}, **others)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(WORDS, (ROWS, LENGTH), generator=generator) for _ in range(2))  # type: ignore[return-value]


LOSSES = {
    "flattened": lambda o, t: F.cross_entropy(o.flatten(0, 1), t.flatten()),
    "smoothed, rows ignored": lambda o, t: F.cross_entropy(
        o.view(-1, o.size(-1)), t.view(-1), ignore_index=3, label_smoothing=0.1
    ),
    "shifted, classes weighted": lambda o, t: F.cross_entropy(
        o[:, :-1].reshape(-1, WORDS), t[:, 1:].reshape(-1), weight=WEIGHTS.to(o.dtype), label_smoothing=0.1, ignore_index=2
    ),
    "classes second": lambda o, t: F.cross_entropy(o.transpose(1, 2), t, weight=WEIGHTS.to(o.dtype)),
    "summed": lambda o, t: nn.CrossEntropyLoss(reduction="sum")(o.permute(0, 2, 1).double(), t) / t.numel(),
    "of the last token": lambda o, t: F.cross_entropy(o[:, -1, :], t[:, -1]),
    "of some tokens": lambda o, t: F.cross_entropy(o[..., :3, :].contiguous().mT, t[:, :3]),
    "of a mask": lambda o, t: F.cross_entropy(o[t > 5], t[t > 5]),
    "by functions": lambda o, t: F.cross_entropy(torch.flatten(o, 0, 1), t.flatten()) * 2,
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
def test_fifty_steps_in_double_precision_and_ten_in_single_agree(tied: bool, name: str) -> None:
    loss = LOSSES[name]
    for dtype, steps, tolerance in ((torch.float64, 50, 1e-9), (torch.float32, 10, 1e-5)):
        torch.manual_seed(0)
        net = Language(tied, bias=not tied).to(dtype)
        other = copy.deepcopy(net)
        plain, given = (torch.optim.AdamW(one.parameters(), lr=1e-3) for one in (net, other))
        applied = delest.apply(chunked(**({"optimizer_in_backward": {}} if tied else {})), other, given, loss)
        for seed in range(steps):
            x, y = batch(seed)
            value = loss(net(x), y)
            plain.zero_grad()
            value.backward()
            if seed == 0:
                gradients = [parameter.grad.clone() for parameter in net.parameters()]
                (part, _), *_ = applied.parts((x, y))
                if not tied:  # else updates take them at once
                    loss(other(part[0]), part[1]).backward()
                    for right, left in zip(other.parameters(), gradients, strict=True):
                        torch.testing.assert_close(right.grad, left, rtol=tolerance, atol=tolerance)
                    given.zero_grad()
            plain.step()
            assert float(applied.step((x, y))) == pytest.approx(float(value.detach()), rel=tolerance)
        if dtype == torch.float64:
            for left, right in zip(net.parameters(), other.parameters(), strict=True):
                torch.testing.assert_close(right, left, rtol=1e-9, atol=1e-9)


def test_every_row_ignored_is_not_a_number_as_without_it() -> None:
    net = Language()
    applied = delest.apply(
        chunked(),
        net,
        torch.optim.SGD(net.parameters(), lr=0.1),
        lambda o, t: F.cross_entropy(o.flatten(0, 1), t.flatten() * 0 - 100),
    )
    assert torch.isnan(applied.step(batch(0)))


@pytest.mark.parametrize("others", [{}, {"micro_batch": {"rows": 3}}, {"optimizer_in_backward": {}}], ids=str)
def test_a_sessions_own_loss_and_a_users_step(others: dict[str, Any]) -> None:
    target = Target(name="y", kind="class", classes=tuple(map(str, range(40))))
    schema = Schema(inputs=(Column(name="x", kind="array", shape=(6,)),), target=target)

    def rows(seed: int) -> Batch:
        drawn = np.random.default_rng(seed)
        return Batch(drawn.normal(size=(ROWS, 6)), drawn.integers(0, 40, ROWS), np.arange(ROWS), 0, ROWS)

    def step(model: nn.Module, given: Any) -> Tensor:
        return F.cross_entropy(model(given.inputs), given.targets, label_smoothing=0.2)

    for own in ({}, {"step": step}):
        made = [
            TorchSession(
                Job(
                    model=lambda: nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 40)).double(),
                    data="unused",
                    batch_size=ROWS,
                    recipe=Recipe(lr=1e-3, label_smoothing=0.1),
                    **own,
                ),
                chosen,
                schema,
            )
            for chosen in (plan(), chunked(3, "2", **others))
        ]
        for seed in range(20):
            left, right = (float(one.step(rows(seed), 1.0).loss) for one in made)
            assert right == pytest.approx(left, rel=1e-9)
        for key, array in made[0].weights().items():
            np.testing.assert_allclose(made[1].weights()[key], array, rtol=1e-9, atol=1e-9)
        assert made[1].evaluation_rows == 3
        np.testing.assert_allclose(made[1].predict(rows(0).inputs), made[0].predict(rows(0).inputs), rtol=1e-9)


def test_under_autocast_products_are_in_half_precision_and_sums_are_not() -> None:
    values = []
    for chosen in (plan(precision={"dtype": "bf16"}), chunked(precision={"dtype": "bf16"})):
        torch.manual_seed(0)
        net = Language()
        loss = lambda o, t: F.cross_entropy(o.float().flatten(0, 1), t.flatten())  # noqa: E731
        applied = delest.apply(chosen, net, torch.optim.SGD(net.parameters(), lr=0.1), loss)
        values.append([float(applied.step(batch(seed))) for seed in range(5)])
    np.testing.assert_allclose(values[1], values[0], rtol=2e-3)


# What is refused


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda o, t: F.cross_entropy((o / 2).flatten(0, 1), t.flatten()), "'truediv'"),
        (lambda o, t: (2 * o).mean(), "'mul'"),
        (lambda o, t: F.log_softmax(o, -1).mean(), "'log_softmax'"),
        (lambda o, t: F.cross_entropy(o.flatten(0, 1), t.flatten()) + (o.argmax(-1) == t).float().mean(), "'argmax'"),
        (lambda o, t: torch.stack([o, o]).mean(), "'stack'"),
        (lambda o, t: -o, "'neg'"),
        (lambda o, t: F.cross_entropy(o[..., :20].flatten(0, 1), t.flatten()), r"'\[...\]'"),
        (lambda o, t: F.cross_entropy(o.view(-1, 25), t.flatten()), "'view'"),
        (lambda o, t: F.cross_entropy(o.flatten(), t.flatten()), "'flatten'"),
        (lambda o, t: F.cross_entropy(o, t), "classes on the second axis"),
        (lambda o, t: F.cross_entropy(o[:, :3].flatten(0, 1), t.flatten()), "do not go with logits"),
        (lambda o, t: F.cross_entropy(o.flatten(0, 1), t.flatten(), reduction="none").mean(), "'none'"),
        (lambda o, t: F.cross_entropy(o.flatten(0, 1), F.one_hot(t.flatten(), WORDS).float()), "probabilities as targets"),
    ],
)
def test_whoever_wants_logits_is_named(loss: Any, words: str) -> None:
    net = Language()
    before = copy.deepcopy(net.state_dict())
    applied = delest.apply(chunked(), net, torch.optim.SGD(net.parameters(), lr=0.1), loss)
    with pytest.raises(errors.BadInput, match=words) as raised:
        applied.step(batch(0))
    assert str(raised.value).startswith("chunked_loss: ")
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key])


def test_what_is_no_plain_linear_layer_is_refused() -> None:
    def refused(model: nn.Module, words: str, **config: Any) -> None:
        chosen = plan(chunked_loss={"module": "head", "parts": 5, **config})
        with pytest.raises(errors.BadInput, match=words):
            delest.apply(chosen, model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy)

    refused(Language(), "no module 'nine'", module="nine")
    refused(Language(), "'mix2' is a|no module 'mix2'", module="mix2")
    refused(Language(), "'embedding' is a Embedding", module="embedding")
    refused(Language(), "parts is 1", parts=1)
    hooked = Language()
    hooked.head.register_forward_hook(lambda *_: None)
    refused(hooked, "has forward hooks")


def test_what_excludes_it_says_so() -> None:
    for method in ("activation_checkpointing", "layered_accumulation"):
        both = {"chunked_loss": {"module": "top.head", "parts": 2}, method: {"modules": ["top"], "parts": 2}}
        assert any(f"which {method} recomputes" in reason for reason in methods.conflicts(both))
        assert methods.conflicts({**both, method: {"modules": ["to"], "parts": 2}}) == []


# Memory


def test_the_logits_of_the_whole_batch_are_never_there() -> None:
    from torch.profiler import ProfilerActivity, profile

    def peak(chosen: Plan) -> int:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4096))
        applied = delest.apply(chosen, net, torch.optim.SGD(net.parameters(), lr=0.1), F.cross_entropy)
        given = torch.randn(1024, 16), torch.randint(4096, (1024,))
        applied.step(given)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            applied.step(given)
        live = highest = 0
        for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                live += event.nbytes()
                highest = max(highest, live)
        return highest

    logits = 1024 * 4096 * 4
    assert peak(plan()) > 2.9 * logits
    assert peak(chunked(16, "1")) < logits * 1.2 / 16 + 4 * (4096 * 17 + 3 * 1024 * 16) + (
        1 << 16
    )  # one chunk; gradients of weight and rows
