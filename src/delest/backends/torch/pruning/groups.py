"""What of a network can only go together: groups of channels and heads, untried."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch_pruning
from torch import Tensor, nn

from delest.backends.torch.pruning.architecture import ties_of
from delest.backends.torch.pruning.attention import Attention, find_attentions, find_sharing
from delest.backends.torch.pruning.graph import Graph
from delest.backends.torch.pruning.layers import Fixed, Product, is_scale, is_transposed_linear, taken_in, weight_dim
from delest.records.pruning import Width

_ROOTS = (nn.modules.conv._ConvNd, nn.Linear, nn.RNNBase, nn.Embedding, nn.EmbeddingBag, Product)
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.MultiheadAttention)  # which go over channels, or are scaled by their number
_OUTPUT = torch_pruning.ops._OutputOp


@dataclass(frozen=True, eq=False)
class Place:
    """Where units are in a layer: `units[i]` of the width is channel `channels[i]` of what its `weights` take in."""

    layer: str
    weights: Mapping[str, Callable[[Tensor], Tensor]]  # of the layer, with what lays them out as [G, channels / G, ...]
    channels: Tensor  # int64 [N]
    units: Tensor  # int64 [N]


@dataclass(frozen=True, eq=False)
class Group:
    """A width with what cutting it takes."""

    width: Width
    places: tuple[Place, ...]
    exact: bool  # silenced units and cut ones are the same
    attentions: tuple[Attention, ...] = ()
    roots: tuple[str, ...] = ()  # layers whose outputs are cut; several where a tied weight joins groups


def find_groups(model: nn.Module, run: Callable[[nn.Module], Any], graph: Graph) -> tuple[list[Group], dict[str, str]]:
    """All widths of a network in evaluation mode, untried, and reasons why other layers keep theirs."""
    attentions, whole = find_attentions(model, run), {}
    shared = find_sharing(model, run, [attention for attention in attentions if attention.units > 1])
    groups = [_of_attentions(model, together) for together in shared]
    inside = {(name, "out") for one in attentions for name in (*one.queries, *one.keys)} | {
        (one.behind, "in") for one in attentions
    }
    roots = (*_ROOTS, *(type(module) for module in model.modules() if is_transposed_linear(module)))
    for members in graph.get_all_groups(root_module_types=roots):
        name = graph.names[members[0].dep.target.module]
        found = _of_channels(graph, members, inside)
        if isinstance(found, Group):
            groups.append(found)
        elif found:
            whole[name] = found
    return _joined(model, groups, ties_of(model)), whole


def _joined(model: nn.Module, groups: list[Group], ties: list[list[str]]) -> list[Group]:
    """Groups that have a dimension of a tied weight in common as one: what one loses the other loses too."""
    for names, dim in itertools.product(ties, (0, 1)):
        layers = {layer for name in names if (layer := name.rpartition(".")[0])}
        tied = {
            (layer, side) for layer in layers for side in ("out", "in") if weight_dim(model.get_submodule(layer), side) == dim
        }
        members = [group for group in groups if not group.attentions and tied & {*group.width.sides}]
        if len(members) > 1 and len({(group.width.size, group.width.unit) for group in members}) == 1:
            first = members[0]
            sides = tuple(dict.fromkeys(side for group in members for side in group.width.sides))
            groups = [group for group in groups if group not in members] + [
                Group(
                    replace(first.width, sides=sides),
                    tuple(place for group in members for place in group.places),
                    all(group.exact for group in members),
                    roots=tuple(root for group in members for root in group.roots),
                )
            ]
    return groups


def _of_attentions(model: nn.Module, together: Sequence[Attention]) -> Group:
    places, sides = [], []
    for attention in together:
        unit = attention.together * attention.size
        channels = torch.arange(attention.heads * attention.size)
        weights = taken_in(model.get_submodule(attention.behind), "in")
        places.append(Place(attention.behind, weights, channels, channels // unit))
        sides += [(name, "out") for name in (*attention.queries, *attention.keys)] + [(attention.behind, "in")]
    first = together[0]
    width = Width(
        name=first.name,
        kind="heads",
        size=first.units,
        unit=first.together * first.size,
        sides=tuple(sides),
    )
    return Group(width, tuple(places), True, tuple(together))


def _of_channels(graph: Graph, members: Any, inside: set[tuple[str, str]]) -> Group | str:
    """A group of torch-pruning's as a width, or why it is none ("": it is an attention's)."""
    together, exact = _coupled(graph, members), True
    sides: list[tuple[str, Literal["out", "in"]]] = []
    places: list[Place] = []
    channels = len(members[0].idxs)
    for item in members.items:
        module, out = item.dep.target.module, graph.is_out_channel_pruning_fn(item.dep.handler)
        if isinstance(module, _OUTPUT):
            return "it makes the network's outputs"
        if isinstance(module, Fixed):
            return "some of its channels are the network's inputs, or go into a product that is kept as it is"
        side: Literal["out", "in"] = "out" if out else "in"
        name = graph.names.get(module)
        if name is None:
            exact = exact and not isinstance(module, nn.Parameter)
            continue
        if (name, side) in inside:
            return ""
        together = max(together, _together(graph, module, out))
        exact = exact and not isinstance(module, _NORMS) and not is_scale(module)
        if not isinstance(module, Product) or module.own:
            sides.append((name, side))
        if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) and side == "out":  # as wide on the other side
            sides.append((name, "in"))
        if weights := taken_in(module, side):
            if item.root_idxs is None or any(index is None for index in item.root_idxs):
                return f"it is not known which channels of {name} are its own"
            layer = name.rpartition(".")[0] if isinstance(module, Product) else name
            places.append(Place(layer, weights, torch.tensor(item.idxs), torch.tensor(item.root_idxs)))
    if channels % together:
        return f"its {channels} channels are no multiple of the {together} groups that layers behind it make of them"
    size = channels // together
    if size < 2:
        return "it has one unit"
    if not places:
        return "no layer with weights takes its channels in"
    places = [replace(place, units=place.units % size) for place in places]
    root = graph.names[members[0].dep.target.module]
    width = Width(name=root, kind="channels", size=size, unit=together, sides=tuple(sides))
    return Group(width, tuple(places), exact, roots=(root,))


def _coupled(graph: Graph, members: Any) -> int:
    """In how many equal blocks a layer makes its channels that can only go together, as where one half is a gate for the other."""
    root, channels = members[0].dep.target.module, len(members[0].idxs)
    again = next(
        item for item in graph.get_pruning_group(root, members[0].dep.handler, [0]).items if item.dep.target.module is root
    )
    blocks = len(again.idxs)
    return blocks if channels % blocks == 0 and sorted(again.idxs) == list(range(0, channels, channels // blocks)) else 1


def _together(graph: Any, module: nn.Module, out: bool) -> int:
    """Into how many groups a layer divides channels, of which each must keep as many."""
    if isinstance(module, nn.MultiheadAttention):
        return module.num_heads
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.out_channels:
        return 1
    pruner = graph.get_pruner_of_module(module)
    return pruner.get_out_channel_groups(module) if out else pruner.get_in_channel_groups(module)
