"""Heads of attentions: found by what their modules say of themselves, and cut whole.

A head is cut by taking its rows from the projections to queries, keys and values and its columns from the one behind, wherever that lies; the width of
what goes in and comes out stays. Where several query heads share a key, a unit is that key's head with all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from delest.backends.torch.pruning.layers import is_transposed_linear, keep
from delest.backends.torch.pruning.observed import tensors, watch

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")
_SHARED = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")
_SIZE = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size", "d_head", "dim_head")


@dataclass(frozen=True, kw_only=True)
class Attention:
    """An attention of H heads of D channels each; its modules by name."""

    name: str
    heads: int  # of queries
    units: int  # of keys and values; fewer where several queries share one
    size: int  # D
    queries: tuple[str, ...]  # of H x D channels; one of 3 x H x D where all are made at once
    keys: tuple[str, ...]  # of units x D channels: keys and values
    fused: bool
    behind: str  # takes H x D channels

    @property
    def together(self) -> int:
        return self.heads // self.units

    def columns(self, units: Iterable[int]) -> list[int]:
        """Channels of queries, and of what goes into the layer behind."""
        wide = self.together * self.size
        return [unit * wide + channel for unit in units for channel in range(wide)]

    def shared(self, units: Iterable[int]) -> list[int]:
        """Channels of keys and values."""
        return [unit * self.size + channel for unit in units for channel in range(self.size)]


def find_attentions(model: nn.Module, run: Callable[[nn.Module], Any]) -> list[Attention]:
    """Attentions with more than one head whose projections were recognised in a forward pass."""
    modules = [(name, module) for name, module in model.named_modules() if _number(module, _HEADS) or _number(module, _SIZE)]
    calls = _calls(model, run) if modules else []
    found = [_attention(name, module, model, calls) for name, module in modules]
    inner = [one for one in found if one is not None]
    seen: set[str] = set()
    unique = []
    for one in sorted(inner, key=lambda each: -each.name.count(".")):  # the innermost module that has them
        if not seen & {*one.queries, one.behind}:
            seen |= {*one.queries, *one.keys, one.behind}
            unique.append(one)
    order = [name for name, _ in model.named_modules()]
    return sorted(unique, key=lambda each: order.index(each.name))


def find_sharing(model: nn.Module, run: Callable[[nn.Module], Any], attentions: Sequence[Attention]) -> list[list[Attention]]:
    """The attentions, those together that hand a tensor with one slice a head, [B, H, T, T], from one to the next (T5's biases by relative position, which
    the first layer makes for all): of these the same heads go."""
    if len(attentions) < 2:
        return [[attention] for attention in attentions]
    sharing = {attention.name: [attention] for attention in attentions}
    first: dict[int, Attention] = {}
    alive: list[Tensor] = []  # else another tensor might get the identity of one that has gone

    def note(attention: Attention) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, named: Any, outputs: Any) -> None:
            for tensor in tensors((inputs, named, outputs)):
                if tensor.ndim == 4 and tensor.shape[1] == attention.heads:
                    alive.append(tensor)
                    other = first.setdefault(id(tensor), attention)
                    if sharing[other.name] is not sharing[attention.name] and other.units == attention.units:
                        merged = sharing[other.name] + sharing[attention.name]
                        sharing.update({one.name: merged for one in merged})

        return hook

    watch(model, run, {one.name: note(one) for one in attentions})
    return list({id(together): together for together in sharing.values()}.values())


def cut_heads(model: nn.Module, attention: Attention, units: Sequence[int]) -> None:
    """Cut `units` off, in place, and set what the module and its children keep as numbers of heads and channels."""
    kept = [unit for unit in range(attention.units) if unit not in set(units)]
    columns, shared = attention.columns(kept), attention.shared(kept)
    wide = attention.heads * attention.size
    rows = [block * wide + column for block in range(3) for column in columns] if attention.fused else columns
    for name in attention.queries:
        _cut(model.get_submodule(name), "out", rows)
    for name in attention.keys:
        _cut(model.get_submodule(name), "out", shared)
    _cut(model.get_submodule(attention.behind), "in", columns)
    heads = len(kept) * attention.together
    for module in _around(model, attention):
        _cut_tables(module, attention, kept)
        for key, value in list(vars(module).items()):
            if type(value) is not int:
                continue
            if key in _SHARED and value == attention.units:
                setattr(module, key, len(kept))
            elif "head" in key and key not in _SIZE and value == attention.heads:
                setattr(module, key, heads)
            elif ("head_size" in key and value == wide) or (
                value == wide and not any(word in key for word in ("head", "embed", "features", "hidden", "model"))
            ):  # all_head_size
                setattr(module, key, heads * attention.size)


def _around(model: nn.Module, attention: Attention) -> list[nn.Module]:
    """The attention's module and those inside, without its projections."""
    projections = {*attention.queries, *attention.keys, attention.behind}
    inside = model.get_submodule(attention.name)
    return [module for name, module in inside.named_modules() if f"{attention.name}.{name}".strip(".") not in projections]


def _cut_tables(module: nn.Module, attention: Attention, kept: list[int]) -> None:
    """Parameters with one column a head: tables of relative positions."""
    heads = [unit * attention.together + place for unit in kept for place in range(attention.together)]
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.ndim == 2 and parameter.shape[1] == attention.heads and not isinstance(module, nn.Linear):
            setattr(module, name, keep(parameter, 1, heads))
            if isinstance(module, nn.Embedding):
                module.embedding_dim = len(heads)


def _cut(layer: Any, side: str, kept: list[int]) -> None:
    turned = is_transposed_linear(layer)
    dim = (0 if side == "out" else 1) if not turned else (1 if side == "out" else 0)
    layer.weight = keep(layer.weight, dim, kept)
    if side == "out" and layer.bias is not None:
        layer.bias = keep(layer.bias, 0, kept)
    setattr(layer, ("nf" if turned else "out_features") if side == "out" else ("nx" if turned else "in_features"), len(kept))


def _attention(name: str, module: nn.Module, model: nn.Module, calls: list[str]) -> Attention | None:
    """The attention that a module is, by its own number or size of heads and the first linear layers that are called inside."""
    inside = [call for call in calls if call.startswith(f"{name}.")]
    heads, size = _number(module, _HEADS), _number(module, _SIZE)
    if (
        not name
        or not inside
        or (heads is None and size is None)
        or isinstance(module, (nn.MultiheadAttention, nn.Transformer))
    ):
        return None
    for made in (inside[:1], inside[:3]):
        fused, widths = len(made) == 1, [_widths(model.get_submodule(call))[1] for call in made]
        wide = widths[0] // 3 if fused else max(widths)
        count = heads or wide // (size or wide)
        if len(made) == 2 or count < 2 or wide % count or (size and wide != count * size) or (fused and widths[0] % 3):
            continue
        keys = [call for call, width in zip(made, widths, strict=True) if width < wide and not fused]
        shared = {width for width in widths if width < wide and not fused}
        behind = _behind(model, calls, made, wide)
        if behind is None or (keys and (len(keys) != 2 or len(shared) != 1)):
            continue
        units = shared.pop() * count // wide if keys else count
        if units < 1 or count % units:
            continue
        queries = tuple(call for call in made if call not in keys)
        return Attention(
            name=name,
            heads=count,
            units=units,
            size=wide // count,
            queries=queries,
            keys=tuple(keys),
            fused=fused,
            behind=behind,
        )
    return None


def _behind(model: nn.Module, calls: list[str], made: Sequence[str], wide: int) -> str | None:
    """The first layer that is called soon after the projections and takes as many channels as all heads have."""
    following = calls[max(calls.index(call) for call in made) + 1 :][:3]
    return next((call for call in following if _widths(model.get_submodule(call))[0] == wide), None)


def _calls(model: nn.Module, run: Callable[[nn.Module], Any]) -> list[str]:
    """Names of linear layers, in the order in which they are first called."""
    order: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: None if name in order else order.append(name)

    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) or is_transposed_linear(module)]
    watch(model, run, {name: note(name) for name in layers})
    return order


def _widths(layer: Any) -> tuple[int, int]:
    """Channels in and out."""
    shape = layer.weight.shape
    return (shape[0], shape[1]) if is_transposed_linear(layer) else (shape[1], shape[0])


def _number(module: nn.Module, names: Sequence[str]) -> int | None:
    return next((value for name in names if type(value := getattr(module, name, None)) is int and value > 0), None)
