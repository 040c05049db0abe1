"""What of a network can be made narrower, what each of its units is worth, and cutting units off.

Which channels of which layers belong together is torch-pruning's dependency graph (Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR
2023); heads of attentions are found and cut by `attention`. A width is believed only when a copy without some of its units still runs forward and backward, gives outputs
of the same shape and, where no normalisation goes over the units, the outputs of the network with those units silenced.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from delest.backends.torch.model import where
from delest.backends.torch.pruning.architecture import shapes_of, tie, ties_of
from delest.backends.torch.pruning.attention import cut_heads
from delest.backends.torch.pruning.graph import Graph
from delest.backends.torch.pruning.groups import Group, find_groups
from delest.backends.torch.pruning.layers import renumber
from delest.backends.torch.pruning.observed import observe, tensors
from delest.backends.torch.pruning.parametrized import plain_weights
from delest.records.pruning import Layer, Width

Run = Callable[[nn.Module], Any]  # what evaluation sees of a network, on a few rows
Cuts = Mapping[str, Sequence[int]]  # units by width

SAME = 1e-3  # of the largest output: how far a cut network may be from the one with silenced units


@dataclass(frozen=True, kw_only=True)
class Found:
    """What can be made narrower, and why the rest cannot."""

    widths: tuple[Width, ...]
    whole: dict[str, str]  # reason by the layer that makes the channels
    layers: dict[str, Layer]


def find_widths(model: nn.Module, run: Run) -> Found:
    """The widths of a network, each tried on a copy; the network stays as it is. `run` is given networks in evaluation mode."""
    with _kept(model):
        graph = Graph(model, run)
        groups, whole = find_groups(model, run, graph)
        sound = _sound(model, run, groups, whole)
        layers = observe(model, run, graph.products)
        return Found(widths=tuple(group.width for group in sound), whole=whole, layers=layers)


def score_units(model: nn.Module, run: Run, losses: Iterable[Callable[[], Tensor]]) -> dict[str, Tensor]:
    """What each unit of each width is worth, float64 [units]: the mean over batches of the squared change in loss that a first-order
    expansion expects if it went (Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, section 3).

    `losses` are called one by one, in evaluation mode, for the mean loss of a batch; gradients that the network had are lost.
    """
    count = 0
    with _kept(model):
        groups, _ = find_groups(model, run, Graph(model, run))
        scores = {group.width.name: torch.zeros(group.width.size, dtype=torch.float64) for group in groups}
        for loss in losses:
            model.zero_grad(set_to_none=True)
            loss().backward()
            count += 1
            for group in groups:
                scores[group.width.name] += _change(model, group).square()
        model.zero_grad(set_to_none=True)
    return {name: score / max(1, count) for name, score in scores.items()}


def cut(model: nn.Module, run: Run, cuts: Cuts) -> None:
    """Cut units off, in place. Raises `ValueError` for a width that is not there, and what the cutting of a layer raises."""
    with _kept(model):
        _cut(model, run, {name: list(units) for name, units in cuts.items() if len(units)})


# What units are worth


def _change(model: nn.Module, group: Group) -> Tensor:
    """The expected change in loss by unit, from gradients, float64 [units]."""
    found = torch.zeros(group.width.size, dtype=torch.float64)
    for place in group.places:
        layer = model.get_submodule(place.layer)
        for name, lay_out in place.weights.items():
            parameter = getattr(layer, name)
            if parameter.grad is not None:
                by_channel = lay_out(parameter.detach() * parameter.grad).flatten(2).sum(2, dtype=torch.float64)
                found.index_add_(0, place.units, by_channel.flatten()[place.channels % by_channel.numel()])
    return found


def _silence(model: nn.Module, group: Group, units: Sequence[int]) -> None:
    """Have no layer take in anything of these units."""
    for place in group.places:
        gone = place.channels[torch.isin(place.units, torch.tensor(units))]
        layer = model.get_submodule(place.layer)
        for name, lay_out in place.weights.items():
            weight = lay_out(getattr(layer, name).data)
            per = weight.shape[1]
            own = gone % (weight.shape[0] * per)
            weight[own // per, own % per] = 0


# Trying


def _sound(model: nn.Module, run: Run, groups: list[Group], whole: dict[str, str]) -> list[Group]:
    """The groups of which some units could be cut; the others' reasons go into `whole`. All are tried together, and where that fails by halves."""
    before = [tensor.shape for tensor in tensors(run(model))]

    def tried(some: list[Group]) -> list[Group]:
        if not some:
            return []
        reason = _fault(model, run, some, before)
        if reason is None:
            return some
        if len(some) == 1:
            whole[some[0].width.name] = reason
            return []
        middle = len(some) // 2
        return [*tried(some[:middle]), *tried(some[middle:])]

    return [*tried([group for group in groups if group.exact]), *tried([group for group in groups if not group.exact])]


def _fault(model: nn.Module, run: Run, groups: list[Group], before: list[torch.Size]) -> str | None:
    """Why the first unit of each of these cannot be cut, tried on a copy; None where it can."""
    narrower = copy.deepcopy(model)
    try:
        _cut(narrower, run, {group.width.name: [0] for group in groups})
        outputs = tensors(run(narrower))
        if [tensor.shape for tensor in outputs] != before:
            return "the network's outputs would have another shape"
        torch.stack([tensor.float().sum() for tensor in outputs if tensor.requires_grad]).sum().backward()
    except Exception as error:  # whatever a user's forward says to tensors of another shape
        return f"without some of its units the network fails: {where(error)}"
    if not all(group.exact for group in groups):
        return None
    silenced = copy.deepcopy(model)
    for group in groups:
        _silence(silenced, group, [0])
    with torch.no_grad():
        for ours, theirs in zip(tensors(run(narrower)), tensors(run(silenced)), strict=True):
            if not (ours - theirs).abs().max() <= SAME * max(1e-6, float(theirs.abs().max())):
                return "without some of its units the network computes something else than with them silenced"
    return None


def _cut(model: nn.Module, run: Run, cuts: dict[str, list[int]]) -> None:
    ties, shapes = ties_of(model), shapes_of(model)
    graph = Graph(model, run)
    groups = {group.width.name: group for group in find_groups(model, run, graph)[0]}
    if missing := [name for name in cuts if name not in groups]:
        raise ValueError(f"there is no width {', '.join(missing)}")
    if heads := [name for name in cuts if groups[name].attentions]:
        for name in heads:
            units = cuts.pop(name)
            for attention in groups[name].attentions:
                cut_heads(model, attention, units)
        graph = Graph(model, run)
    items = {name: item for item, name in graph.names.items()}
    for name, units in cuts.items():
        width = groups[name].width
        channels = [block * width.size + unit for block in range(width.unit) for unit in units]
        for root in groups[name].roots:
            pruner = graph.get_pruner_of_module(items[root])
            graph.get_pruning_group(items[root], pruner.prune_out_channels, channels).prune(record_history=False)
    tie(model, ties, shapes)
    renumber(model)


@contextlib.contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, with all parameters in the graph; modes, and which parameters are frozen, are as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    frozen = [name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad]
    model.eval().requires_grad_(True)
    try:
        with plain_weights(model), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="torch_pruning")
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(name not in frozen)
