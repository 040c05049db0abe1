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
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch_pruning
from torch import Tensor, nn

from delest.backends.torch.model import where
from delest.backends.torch.pruning.architecture import tie, ties_of
from delest.backends.torch.pruning.attention import Attention, cut_heads, find_attentions
from delest.backends.torch.pruning.layers import is_scale, is_transposed_linear, special_pruners, taken_in
from delest.records.pruning import Layer, Width

Run = Callable[[nn.Module], Any]  # what evaluation sees of a network, on a few rows
Cuts = Mapping[str, Sequence[int]]  # units by width

SAME = 1e-3  # of the largest output: how far a cut network may be from the one with silenced units
_ROOTS = (nn.modules.conv._ConvNd, nn.Linear, nn.RNNBase, nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.MultiheadAttention)  # which go over channels, or are scaled by their number
_OUTPUT = torch_pruning.ops._OutputOp


@dataclass(frozen=True)
class _Place:
    """Where units are in a layer: `units[i]` of the width is the layer's channel `channels[i]` at `side`."""

    layer: str
    side: str
    channels: Tensor  # int64 [N]
    units: Tensor  # int64 [N]


@dataclass(frozen=True)
class _Group:
    """A width with what cutting it takes."""

    width: Width
    places: tuple[_Place, ...]
    exact: bool  # silenced units and cut ones are the same
    attention: Attention | None = None
    roots: tuple[str, ...] = ()  # layers whose outputs are cut; several where a tied weight joins groups


@dataclass(frozen=True, kw_only=True)
class Found:
    """What can be made narrower, and why the rest cannot."""

    widths: tuple[Width, ...]
    whole: dict[str, str]  # reason by the layer that makes the channels
    layers: dict[str, Layer]


def find_widths(model: nn.Module, run: Run) -> Found:
    """The widths of a network, each tried on a copy; the network stays as it is. `run` is given networks in evaluation mode."""
    with _kept(model):
        groups, whole = _groups(model, run)
        sound = _sound(model, run, groups, whole)
        return Found(widths=tuple(group.width for group in sound), whole=whole, layers=_layers(model, run))


def score_units(model: nn.Module, run: Run, losses: Iterable[Callable[[], Tensor]]) -> dict[str, Tensor]:
    """What each unit of each width is worth, float64 [units]: the mean over batches of the squared change in loss that a first-order
    expansion expects if it went (Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, section 3).

    `losses` are called one by one, in evaluation mode, for the mean loss of a batch; gradients that the network had are lost.
    """
    count = 0
    with _kept(model):
        groups, _ = _groups(model, run)
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


# Groups


def _groups(model: nn.Module, run: Run) -> tuple[list[_Group], dict[str, str]]:
    """All widths of a network in evaluation mode, untried, and reasons why other layers keep theirs."""
    attentions, whole = find_attentions(model, run), {}
    groups = [_of_attention(attention) for attention in attentions if attention.units > 1]
    inside = {(name, "out") for one in attentions for name in (*one.queries, *one.keys)} | {
        (one.behind, "in") for one in attentions
    }
    names = {module: name for name, module in model.named_modules()}
    graph = _graph(model, run)
    roots = (*_ROOTS, *(type(module) for module in model.modules() if is_transposed_linear(module)))
    for members in graph.get_all_groups(root_module_types=roots):
        name = names[members[0].dep.target.module]
        found = _of_channels(graph, members, names, inside)
        if isinstance(found, _Group):
            groups.append(found)
        elif found:
            whole[name] = found
    return _joined(groups, ties_of(model)), whole


def _joined(groups: list[_Group], ties: list[list[str]]) -> list[_Group]:
    """Groups that have a tied weight in common as one: what one loses the other loses too."""
    for names in ties:
        layers = {name.rpartition(".")[0] for name in names}
        members = [group for group in groups if len({layer for layer, _ in group.width.sides} & layers) == 1]
        if len(members) > 1 and len({group.width.size for group in members}) == 1:
            first = members[0]
            sides = tuple(dict.fromkeys(side for group in members for side in group.width.sides))
            groups = [group for group in groups if group not in members] + [
                _Group(
                    replace(first.width, sides=sides),
                    tuple(place for group in members for place in group.places),
                    all(group.exact for group in members),
                    roots=tuple(root for group in members for root in group.roots),
                )
            ]
    return groups


def _of_attention(attention: Attention) -> _Group:
    wide = attention.heads * attention.size
    channels = torch.arange(wide)
    place = _Place(attention.behind, "in", channels, channels // (attention.together * attention.size))
    sides = [(name, "out") for name in (*attention.queries, *attention.keys)]
    width = Width(
        name=attention.name,
        kind="heads",
        size=attention.units,
        unit=attention.together * attention.size,
        sides=(*sides, (attention.behind, "in")),  # type: ignore[arg-type]
    )
    return _Group(width, (place,), True, attention)


def _of_channels(graph: Any, members: Any, names: Mapping[nn.Module, str], inside: set[tuple[str, str]]) -> _Group | str:
    """A group of torch-pruning's as a width, or why it is none ("": it is an attention's)."""
    together, exact = 1, True
    sides: list[tuple[str, Literal["out", "in"]]] = []
    places: list[_Place] = []
    channels = len(members[0].idxs)
    for item in members.items:
        module, out = item.dep.target.module, graph.is_out_channel_pruning_fn(item.dep.handler)
        if isinstance(module, _OUTPUT):
            return "it makes the network's outputs"
        side: Literal["out", "in"] = "out" if out else "in"
        name = names.get(module)
        if name is None:
            exact = exact and not isinstance(module, nn.Parameter)
            continue
        if (name, side) in inside:
            return ""
        together = max(together, _together(graph, module, out))
        exact = exact and not isinstance(module, _NORMS) and not is_scale(module)
        sides.append((name, side))
        if isinstance(module, nn.RNNBase) and side == "out":  # what it makes it takes in again
            sides.append((name, "in"))
        if taken_in(module, side):
            if item.root_idxs is None or any(index is None for index in item.root_idxs):
                return f"it is not known which channels of {name} are its own"
            places.append(_Place(name, side, torch.tensor(item.idxs), torch.tensor(item.root_idxs)))
    if channels % together:
        return f"its {channels} channels are no multiple of the {together} groups that layers behind it make of them"
    size = channels // together
    if size < 2:
        return "it has one unit"
    if not places:
        return "no layer with weights takes its channels in"
    places = [_Place(place.layer, place.side, place.channels, place.units % size) for place in places]
    root = names[members[0].dep.target.module]
    width = Width(name=root, kind="channels", size=size, unit=together, sides=tuple(sides))
    return _Group(width, tuple(places), exact, roots=(root,))


def _together(graph: Any, module: nn.Module, out: bool) -> int:
    """Into how many groups a layer divides channels, of which each must keep as many."""
    if isinstance(module, nn.MultiheadAttention):
        return module.num_heads
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.out_channels:
        return 1
    pruner = graph.get_pruner_of_module(module)
    return pruner.get_out_channel_groups(module) if out else pruner.get_in_channel_groups(module)


def _graph(model: nn.Module, run: Run) -> Any:
    pruners = special_pruners(model)
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch_pruning.DependencyGraph().build_dependency(
            model,
            example_inputs=None,
            forward_fn=lambda network, _: [tensor for tensor in _tensors(run(network)) if tensor.requires_grad],
            customized_pruners=pruners,
            verbose=False,
        )


# What units are worth


def _change(model: nn.Module, group: _Group) -> Tensor:
    """The expected change in loss by unit, from gradients, float64 [units]."""
    found = torch.zeros(group.width.size, dtype=torch.float64)
    for place in group.places:
        layer = model.get_submodule(place.layer)
        for name, lay_out in taken_in(layer, place.side).items():
            parameter = getattr(layer, name)
            if parameter.grad is not None:
                by_channel = lay_out(parameter.detach() * parameter.grad).flatten(2).sum(2, dtype=torch.float64)
                found.index_add_(0, place.units, by_channel.flatten()[place.channels % by_channel.numel()])
    return found


def _silence(model: nn.Module, group: _Group, units: Sequence[int]) -> None:
    """Have no layer take in anything of these units."""
    for place in group.places:
        gone = place.channels[torch.isin(place.units, torch.tensor(units))]
        layer = model.get_submodule(place.layer)
        for name, lay_out in taken_in(layer, place.side).items():
            weight = lay_out(getattr(layer, name).data)
            per = weight.shape[1]
            own = gone % (weight.shape[0] * per)
            weight[own // per, own % per] = 0


# Trying


def _sound(model: nn.Module, run: Run, groups: list[_Group], whole: dict[str, str]) -> list[_Group]:
    """The groups of which some units could be cut; the others' reasons go into `whole`. All are tried together, and where that fails by halves."""
    before = [tensor.shape for tensor in _tensors(run(model))]

    def tried(some: list[_Group]) -> list[_Group]:
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


def _fault(model: nn.Module, run: Run, groups: list[_Group], before: list[torch.Size]) -> str | None:
    """Why the first unit of each of these cannot be cut, tried on a copy; None where it can."""
    narrower = copy.deepcopy(model)
    try:
        _cut(narrower, run, {group.width.name: [0] for group in groups})
        outputs = _tensors(run(narrower))
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
        for ours, theirs in zip(_tensors(run(narrower)), _tensors(run(silenced)), strict=True):
            if not (ours - theirs).abs().max() <= SAME * max(1e-6, float(theirs.abs().max())):
                return "without some of its units the network computes something else than with them silenced"
    return None


def _cut(model: nn.Module, run: Run, cuts: dict[str, list[int]]) -> None:
    ties = ties_of(model)
    groups = {group.width.name: group for group in _groups(model, run)[0]}
    if missing := [name for name in cuts if name not in groups]:
        raise ValueError(f"there is no width {', '.join(missing)}")
    for name in [name for name in cuts if groups[name].attention is not None]:
        attention = groups[name].attention
        assert attention is not None
        cut_heads(model, attention, cuts.pop(name))
    if cuts:
        graph, modules = _graph(model, run), dict(model.named_modules())
        for name, units in cuts.items():
            width = groups[name].width
            channels = [block * width.size + unit for block in range(width.unit) for unit in units]
            for root in groups[name].roots:
                pruner = graph.get_pruner_of_module(modules[root])
                graph.get_pruning_group(modules[root], pruner.prune_out_channels, channels).prune()
    tie(model, ties)


@contextlib.contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, with all parameters in the graph; modes, and which parameters are frozen, are as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    frozen = [name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad]
    model.eval().requires_grad_(True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="torch_pruning")
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(name not in frozen)


def _layers(model: nn.Module, run: Run) -> dict[str, Layer]:
    """Layers with parameters of their own, with the shapes of a forward pass; those that are not called are left out."""
    found: dict[str, Layer] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, outputs: Any) -> None:
            given, made = _tensors(inputs), _tensors(outputs)
            if given and made:
                found.setdefault(name, _layer(name, module, tuple(given[0].shape), tuple(made[0].shape)))

        return hook

    own = {name: module for name, module in model.named_modules() if module._parameters and name}
    hooks = [module.register_forward_hook(note(name)) for name, module in own.items()]
    try:
        with torch.no_grad():
            run(model)
    finally:
        for handle in hooks:
            handle.remove()
    return found


def _layer(name: str, module: Any, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Layer:
    parameters = sum(parameter.numel() for parameter in module.parameters(recurse=False))
    if isinstance(module, nn.Conv2d) and isinstance(module.padding, tuple):
        depthwise = module.groups == module.in_channels and module.groups > 1
        return Layer(
            name=name,
            kind="depthwise" if depthwise else "convolution",
            parameters=parameters,
            inputs=inputs,
            outputs=outputs,
            kernel=tuple(module.kernel_size),
            stride=tuple(module.stride),
            padding=tuple(module.padding),
            dilation=tuple(module.dilation),
            groups=module.groups,
        )
    kind = "linear" if isinstance(module, nn.Linear) or is_transposed_linear(module) else "other"
    return Layer(name=name, kind=kind, parameters=parameters, inputs=inputs, outputs=outputs)  # type: ignore[arg-type]


def _tensors(value: Any) -> list[Tensor]:
    """Floating-point tensors of nested outputs, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []
