"""A step of somebody else's loop in parts: how its loss adds up is found out, and a step that fails leaves nothing behind."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from delest import errors
from delest.backends.torch.addition import Addition
from delest.backends.torch.applied import Applied
from delest.backends.torch.parts import ignoring
from delest.frameworks.steps import Steps, weighted
from delest.records.plan import Plan

cross_entropy = nn.functional.cross_entropy
NO_MEMORY = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 512 bytes."


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()


def batch(rows: int = 12, ignored: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (rows,), generator=generator)
    labels[:ignored] = -100
    return {"x": torch.randn(rows, 6, generator=generator, dtype=torch.float64), "labels": labels}


def steps_of(model: nn.Module, *, guarded: bool = True, rows: int | None = None) -> Steps:
    applied = Applied(Plan(batch_size=12, micro_batch=12), model, torch.optim.SGD(model.parameters(), lr=0.1), None)
    steps = Steps(applied, model, ignoring(model), lambda: lambda: None, guarded=guarded)
    steps.see(batch())
    if rows is not None:
        applied.split(rows)
    return steps


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "targets": cross_entropy,
    "rows": lambda scores, labels: cross_entropy(scores, labels, reduction="none").mean(),
    "sum": lambda scores, labels: cross_entropy(scores, labels, reduction="sum"),
}


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("rows", [1, 4, 5])
def test_gradients_of_parts_are_those_of_the_whole_batch_however_the_loss_adds_up(kind: str, rows: int) -> None:
    given = batch(ignored=5)
    gradients = []
    for split in (None, rows):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        steps = steps_of(model, rows=split)

        def loss_of(part: Any, model: nn.Module = model) -> Tensor:
            return LOSSES[kind](model(part["x"]), part["labels"])

        def one(part: Any, share: float, loss_of: Any = loss_of) -> float:
            loss = weighted(loss_of(part), share)
            loss.backward()
            return loss.item()

        made = steps.make(given, one, lambda part, loss_of=loss_of: float(loss_of(part)))
        gradients.append((sum(made), [parameter.grad for parameter in model.parameters()]))
        assert split is None or steps.addition.name == kind
    (expected, plain), (got, parted) = gradients
    assert got == pytest.approx(expected, rel=1e-9)
    for left, right in zip(plain, parted, strict=True):
        torch.testing.assert_close(right, left, rtol=1e-9, atol=1e-12)


def test_targets_behind_the_first_of_each_row_are_told_from_all() -> None:
    torch.manual_seed(0)
    labels = torch.randint(5, (8, 9))
    for row in range(8):
        labels[row, : row % 5] = -100
    scores = torch.randn(8, 9, 5, dtype=torch.float64)

    def shifted(part: Any) -> float:
        return float(cross_entropy(part["scores"][:, :-1].flatten(0, 1), part["labels"][:, 1:].flatten()))

    found = Addition(ignoring(nn.Linear(1, 1), "labels"))
    found.find_out({"scores": scores, "labels": labels}, 8, shifted)
    assert found.name == "targets after the first"


def test_a_number_that_a_loss_of_the_model_ignores_is_looked_for() -> None:
    model = nn.ModuleDict({"loss": nn.CrossEntropyLoss(ignore_index=2)})
    x, y = torch.randn(6, 3), torch.tensor([2, 2, 0, 1, 2, 1])
    found = Addition(ignoring(model))
    found.find_out((x, y), 6, lambda part: float(model["loss"](*part)))
    assert found.name == "targets"
    assert found.share((x, y), [slice(0, 3), slice(3, 6)], 6) == pytest.approx([1 / 3, 2 / 3])


def test_a_loss_that_compares_rows_with_one_another_is_refused() -> None:
    def contrastive(part: Any) -> float:
        scores = part["x"] @ part["x"].T
        return float(cross_entropy(scores, torch.arange(len(scores))) + 0.1)

    with pytest.raises(errors.BadInput, match="cannot be made in parts: the loss of 3 rows is .* neither the mean nor the sum"):
        Addition(ignoring(nn.Linear(1, 1))).find_out(batch(), 12, contrastive)


def test_a_loss_that_draws_random_numbers_is_told_of_and_weighted_by_what_counts() -> None:
    found = Addition(ignoring(nn.Linear(1, 1)))
    with pytest.warns(errors.DelestWarning, match="draws random numbers.*weighted by targets"):
        found.find_out(batch(), 12, lambda part: float(torch.rand(()) + 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found.find_out(batch(), 12, lambda part: float(torch.rand(()) + 1))


def test_rows_without_a_target_tell_nothing() -> None:
    found = Addition(ignoring(nn.Linear(1, 1)))
    given = batch(ignored=12)
    found.find_out(given, 12, lambda part: float(cross_entropy(part["x"][:, :3], part["labels"])))
    given = batch(ignored=3)
    found.find_out(given, 12, lambda part: float(cross_entropy(part["x"][:, :3], part["labels"])))
    assert found.name == "targets"


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_step_that_runs_out_of_memory_leaves_nothing_behind(phase: str) -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            raise RuntimeError(NO_MEMORY)

    model, noted = network(), []
    steps = steps_of(model)
    steps._also = lambda: lambda: noted.append("back")  # type: ignore[method-assign, func-returns-value]
    earlier = [torch.full_like(parameter, 3.0) for parameter in model.parameters()]
    for parameter, gradient in zip(model.parameters(), earlier, strict=True):
        parameter.grad = gradient.clone()
    buffers = [buffer.clone() for buffer in model.buffers()]
    state, drawn = torch.get_rng_state(), random.getstate()

    def one(part: Any, share: float) -> None:
        random.random()
        scores = model(part["x"])
        if phase == "forward":
            raise RuntimeError(NO_MEMORY)
        cross_entropy(Fails.apply(scores), part["labels"]).backward()

    with pytest.raises(errors.OutOfMemory) as raised:
        steps.make(batch(), one, lambda part: 0.0)
    assert raised.value.phase == phase
    assert noted == ["back"]
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == drawn
    for parameter, gradient in zip(model.parameters(), earlier, strict=True):
        assert torch.equal(parameter.grad, gradient)
    for buffer, kept in zip(model.buffers(), buffers, strict=True):
        assert torch.equal(buffer, kept)


def test_gradients_are_added_to_those_of_earlier_batches() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 3).double()
    steps = steps_of(model)

    def one(part: Any, share: float) -> None:
        cross_entropy(model(part["x"]), part["labels"]).backward()

    steps.make(batch(), one, lambda part: 0.0)
    once = [parameter.grad.clone() for parameter in model.parameters()]
    steps.make(batch(), one, lambda part: 0.0)
    for parameter, gradient in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        steps_of(network()).make(batch(), lambda part, share: (_ for _ in ()).throw(RuntimeError("shapes")), lambda part: 0.0)


def test_the_guard_sees_parts_that_only_become_more() -> None:
    steps = steps_of(network())
    assert (steps.parts, steps.most_parts) == (1, 6)  # two rows at least, for batch normalisation
    found = []
    for parts in (2, 4, 1):
        steps.parts = parts
        found.append(steps.parts)
    assert found == [2, 4, 4]


def test_what_changes_in_parts_is_told_once_when_training_is_first_made_in_them() -> None:
    model = network()
    steps = steps_of(model)

    def made(training: bool) -> list[Any]:
        model.train(training)
        loss_of = (lambda part: float(cross_entropy(model(part["x"]), part["labels"]))) if training else None
        return steps.make(batch(), lambda part, share: share, loss_of)

    steps.parts = 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(training=False)
    with pytest.warns(errors.DelestWarning, match="normalises over the batch") as caught:
        _ = [made(training=True) for _ in range(2)]
    assert len(caught) == 1


def test_a_batch_without_rows_that_can_be_seen_stays_whole() -> None:
    steps = steps_of(nn.Linear(6, 3).double(), rows=4)
    graph = object()
    assert steps.see(graph) == 1
    assert steps.most_parts == 1
    assert steps.make(graph, lambda part, share: (part, share), lambda part: 0.0) == [(graph, 1.0)]


def test_checking_leaves_random_state_modes_and_gradients_alone() -> None:
    model = network()
    steps = steps_of(model, rows=4)
    steps._told = True
    modes: list[bool] = []

    def loss_of(part: Any) -> float:
        modes.append(model.training or torch.is_grad_enabled())
        return float(cross_entropy(model(part["x"]), part["labels"]))

    state = torch.get_rng_state()
    made = steps.make(batch(), lambda part, share: (len(part["x"]), torch.get_rng_state()), loss_of)
    assert [rows for rows, _ in made] == [4, 4, 4]
    assert all(torch.equal(now, state) for _, now in made)
    assert modes == [False] * 5
    assert model.training
    assert int(model[2].num_batches_tracked) == 0
