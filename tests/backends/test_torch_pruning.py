from __future__ import annotations

import copy
from functools import partial

import prunable
import pytest
import torch
from prunable import IMAGES, SIGNALS, TOKENS
from torch import nn

from delest import errors
from delest.backends.torch.pruning.architecture import describe, rebuild, shapes_of, sizes_of, ties_of
from delest.backends.torch.pruning.widths import cut, find_widths, score_units

KINDS = {
    "residual": (prunable.Residual, IMAGES, {"first", "inner"}),
    "grouped": (partial(prunable.Residual, groups=4), IMAGES, {"first", "inner"}),
    "depthwise": (prunable.Depthwise, IMAGES, {"widen", "narrow"}),
    "attention": (prunable.Transformer, TOKENS, {"attention", "inner"}),
    "fused": (partial(prunable.Transformer, fused=True), TOKENS, {"attention", "inner"}),
    "shared keys": (partial(prunable.Transformer, shared=2), TOKENS, {"attention", "inner"}),
    "lstm": (prunable.Recurrent, SIGNALS, {"recurrent"}),
    "gru of both directions": (partial(prunable.Recurrent, nn.GRU, both=True), SIGNALS, {"recurrent"}),
    "gru by its last state": (partial(prunable.Recurrent, nn.GRU, last=True), SIGNALS, {"recurrent"}),
    "tables beside numbers": (prunable.Tables, SIGNALS, {"tables.0", "tables.1", "inner"}),
    "normed and gated": (prunable.Gated, SIGNALS, {"filter", "mix"}),
    "experts in einsum": (prunable.Experts, TOKENS, {"embedding", "inner"}),
    "torch's transformer": (prunable.Translator, TOKENS, {"embedding"}),
    "handed biases": (prunable.Handing, TOKENS, {"first", "second.q", "source", "target"}),
}


def build(factory):
    torch.manual_seed(0)
    return factory().eval()


def runner(shape):
    given = prunable.inputs(shape)
    return lambda network: network(given)


@pytest.mark.parametrize("kind", KINDS)
def test_what_can_be_cut_is_found_and_cutting_is_as_silencing(kind):
    factory, shape, names = KINDS[kind]
    model, run = build(factory), runner(shape)
    before = copy.deepcopy(model.state_dict())
    found = find_widths(model, run)
    made = {layer for width in found.widths for layer, side in width.sides if side == "out"} | {
        width.name for width in found.widths
    }
    assert names <= made, found.whole
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    outputs = run(model).shape
    cut(model, run, {width.name: range(width.size // 4) for width in found.widths})
    assert run(model).shape == outputs
    run(model).sum().backward()
    assert sum(parameter.numel() for parameter in model.parameters()) < 0.9 * parameters


def silence(layer, attribute, dim, places):
    setattr(layer, attribute, nn.Parameter(getattr(layer, attribute).detach().index_fill(dim, torch.tensor(places), 0.0)))


def silence_normed(layer, dim, places):
    layer.weight = layer.weight.detach().index_fill(dim, torch.tensor(places), 0.0)


def width_of(layer, model, run):
    return next(width.name for width in find_widths(model, run).widths if (layer, "out") in width.sides)


SILENT = {
    "tables beside numbers": ("tables.1", lambda model: silence(model.tables[1], "weight", 1, [1, 3])),
    "normed and gated": ("filter", lambda model: silence_normed(model.mix, 1, [1, 3])),
    "experts in einsum": ("inner", lambda model: silence(model, "outer", 1, [1, 3])),
    "handed biases": (
        "first",
        lambda model: [silence(layer.o, "weight", 1, [*range(6, 12), *range(18, 24)]) for layer in (model.first, model.second)],
    ),
}


@pytest.mark.parametrize("kind", SILENT)
def test_a_network_without_units_computes_what_it_does_with_them_silenced_by_hand(kind):
    factory, shape, _ = KINDS[kind]
    name, by_hand = SILENT[kind]
    model, silenced, run = build(factory), build(factory), runner(shape)
    cut(model, run, {name: [1, 3]})
    by_hand(silenced)
    assert torch.allclose(run(model), run(silenced), atol=1e-5)
    assert sum(map(torch.numel, model.parameters())) < sum(map(torch.numel, silenced.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_network_is_built_again_from_its_architecture(kind, tmp_path):
    import json

    factory, shape, _ = KINDS[kind]
    model, run = build(factory), runner(shape)
    sizes, shapes = sizes_of(model), shapes_of(model)
    cut(model, run, {width.name: [0] for width in find_widths(model, run).widths})
    architecture = json.loads(json.dumps(describe(model, sizes, shapes)))
    again = rebuild(factory().eval(), architecture)
    again.load_state_dict(model.state_dict())
    assert torch.equal(run(again), run(model))
    assert architecture["tensors"]


def test_units_that_no_weight_takes_in_are_worth_nothing_and_the_others_something():
    model, run = build(prunable.Residual), runner(IMAGES)
    with torch.no_grad():
        model.outer.weight[:, 3] = 0
    target = torch.tensor([0, 1])
    scores = score_units(model, run, [lambda: nn.functional.cross_entropy(run(model), target)] * 2)
    assert scores["inner"][3] == 0
    assert scores["inner"].argmin() == 3
    assert (scores["outer"] > 0).all()


def test_a_score_is_the_squared_first_order_change_in_loss():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    score = score_units(model, lambda network: network(x), [lambda: model(x).square().mean()])["0"]
    gates = torch.ones(4, requires_grad=True)
    model[2](torch.relu(model[0](x)) * gates).square().mean().backward()
    assert torch.allclose(score, gates.grad.double().square(), rtol=1e-4)


@pytest.mark.parametrize("kind", ["tables beside numbers", "experts in einsum", "torch's transformer"])
def test_layers_count_every_parameter_once(kind):
    factory, shape, _ = KINDS[kind]
    model = build(factory)
    layers = find_widths(model, runner(shape)).layers
    assert sum(layer.parameters for layer in layers.values()) == sum(map(torch.numel, model.parameters()))


def test_tied_weights_stay_tied():
    model, run = build(partial(prunable.Transformer, tied=True)), runner(TOKENS)
    widths = find_widths(model, run).widths
    cut(model, run, {width.name: [0] for width in widths})
    assert ties_of(model) == [["embedding.weight", "head.weight"]]


def test_a_tied_table_that_is_never_called_becomes_as_narrow_as_the_others():
    model, run = build(prunable.Handing), runner(TOKENS)
    cut(model, run, {width_of("source", model, run): range(8)})
    assert model.words.weight is model.source.weight is model.target.weight
    assert model.words.weight.shape == (40, 16)
    assert model.words.embedding_dim == 16
    assert model.first.d_model == 24  # only a number there: T5 scales by it


def test_torchs_transformer_knows_its_new_width():
    model, run = build(prunable.Translator), runner(TOKENS)
    cut(model, run, {width_of("embedding", model, run): range(4)})
    assert model.transformer.d_model == model.embedding.embedding_dim == 16


def test_norms_of_weights_that_are_not_cut_stay_bit_for_bit():
    model, run = build(prunable.Gated), runner(SIGNALS)
    before = copy.deepcopy(model.state_dict())
    model.filter.parametrizations.weight.original0.requires_grad_(False)
    cut(model, run, {"mix": [2]})
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if name.startswith("filter"))
    assert after["mix.parametrizations.weight.original1"].shape == (15, 16, 1)
    assert not model.filter.parametrizations.weight.original0.requires_grad
    assert model.mix.parametrizations.weight.original0.requires_grad


def test_heads_of_which_nothing_is_known_are_kept_whole_with_the_reason():
    model, run = build(prunable.Fixed), runner(torch.Size((2, 9, 16)))
    found = find_widths(model, run)
    assert not found.widths
    assert found.whole


def test_frozen_parameters_stay_frozen_and_modes_as_they_were():
    model, run = build(prunable.Residual).train(), runner(IMAGES)
    model.first.requires_grad_(False)
    cut(model, run, {"inner": [0, 1]})
    assert model.training
    assert not model.first.weight.requires_grad
    assert model.inner.weight.requires_grad


def test_another_network_is_not_taken_for_the_one_that_was_cut():
    model, run = build(prunable.Residual), runner(IMAGES)
    sizes, shapes = sizes_of(model), shapes_of(model)
    cut(model, run, {"inner": [0]})
    with pytest.raises(errors.BadInput, match="another network"):
        rebuild(prunable.Residual(24), describe(model, sizes, shapes))


def test_a_width_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="no width nowhere"):
        cut(build(prunable.Residual), runner(IMAGES), {"nowhere": [0]})
