"""Optimizers by name and their parameter groups."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from delest import errors
from delest.backends.torch import optimizers
from delest.backends.torch.lean import bare_step
from delest.backends.torch.muon import Muon, orthogonalize
from delest.job import Recipe


def model() -> nn.Module:
    return nn.Sequential(nn.Embedding(5, 8), nn.Flatten(), nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def test_decay_reaches_matrices_only():
    decayed, plain = optimizers.groups_of(model(), 0.1)
    assert [tuple(parameter.shape) for parameter in decayed["params"]] == [(8, 16), (3, 8)]
    assert sorted(tuple(parameter.shape) for parameter in plain["params"]) == [(3,), (5, 8), (8,), (8,), (8,)]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)


def test_a_tied_weight_is_in_one_group_once():
    tied = nn.ModuleDict({"embed": nn.Embedding(5, 8), "head": nn.Linear(8, 5, bias=False)})
    tied["head"].weight = tied["embed"].weight
    decayed, plain = optimizers.groups_of(tied, 0.1)
    assert len(decayed["params"]) + len(plain["params"]) == 1


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adamw", torch.optim.AdamW),
        ("SGD", torch.optim.SGD),
        ("adadelta", torch.optim.Adadelta),
        ("Rprop", torch.optim.Rprop),
        ("adafactor", torch.optim.Adafactor),
        ("lion_none", None),
    ],
)
def test_any_class_of_torch_by_name(name, kind):
    if kind is None:
        with pytest.raises(errors.BadInput, match="unknown optimizer 'lion_none'"):
            optimizers.build(model(), Recipe(optimizer=name))
    else:
        assert isinstance(optimizers.build(model(), Recipe(optimizer=name))[0], kind)


def test_the_nearest_name_is_offered():
    with pytest.raises(errors.BadInput, match="Did you mean 'adamw'"):
        optimizers.build(model(), Recipe(optimizer="adamww"))


def test_sgd_has_nesterov_momentum_unless_it_is_turned_off():
    group = optimizers.build(model(), Recipe(optimizer="sgd"))[0].param_groups[0]
    assert (group["momentum"], group["nesterov"]) == (0.9, True)
    group = optimizers.build(model(), Recipe(optimizer="sgd", momentum=0.0))[0].param_groups[0]
    assert (group["momentum"], group["nesterov"]) == (0.0, False)


def test_momentum_where_there_is_none_is_refused():
    with pytest.raises(errors.BadInput, match="momentum is 0.9, which AdamW does not take"):
        optimizers.build(model(), Recipe(optimizer="adamw", momentum=0.9))


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "adadelta", "muon"])
def test_state_given_in_advance_changes_no_step(name):
    """Against torch's own lazy state."""
    torch.manual_seed(0)
    results = []
    for allocated in (True, False):
        torch.manual_seed(0)
        net = model()
        made = optimizers.build(net, Recipe(optimizer=name))
        if not allocated:
            for optimizer in made:
                optimizer.state.clear()
        for _ in range(3):
            net(torch.tensor([[0, 1], [2, 3]])).square().sum().backward()
            for optimizer in made:
                optimizer.step()
                optimizer.zero_grad()
        results.append([parameter.detach().clone() for parameter in net.parameters()])
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))


@pytest.mark.parametrize("shape", [(32, 16), (16, 32), (24, 24)])
def test_orthogonalize_brings_singular_values_near_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
    assert values.min() > 0.3
    assert values.max() < 1.3


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest():
    net = model()
    muon, adamw = optimizers.build(net, Recipe(optimizer="muon"))
    assert isinstance(muon, Muon)
    assert [id(parameter) for group in muon.param_groups for parameter in group["params"]] == [id(net[2].weight)]
    assert id(net[4].weight) in {id(parameter) for group in adamw.param_groups for parameter in group["params"]}


def test_sparse_gradients_move_the_rows_that_were_looked_up():
    """Torch's fused optimizers refuse them."""
    table = nn.Embedding(5, 2, sparse=True)
    before = table.weight.detach().clone()
    (optimizer,) = optimizers.build(table, Recipe(optimizer="sgd", lr=0.5, momentum=0.0))
    table(torch.tensor([1, 3, 3])).sum().backward()
    assert table.weight.grad.is_sparse
    bare_step(optimizer)()
    expected = before - 0.5 * torch.tensor([0.0, 1.0, 0.0, 2.0, 0.0])[:, None]
    torch.testing.assert_close(table.weight.detach(), expected)
