"""How layers that torch-pruning does not know, or cuts wrongly, are cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn

_Cutting: Any = torch_pruning.pruner.function.BasePruningFunc


def keep(parameter: Tensor, dim: int, kept: Sequence[int] | Tensor) -> nn.Parameter:
    """A parameter with these places of a dimension alone."""
    index = torch.as_tensor(kept, device=parameter.device)
    return nn.Parameter(parameter.detach().index_select(dim, index).contiguous(), requires_grad=parameter.requires_grad)


def _left(count: int, gone: Iterable[int]) -> list[int]:
    lost = set(gone)
    return [place for place in range(count) if place not in lost]


class Recurrent(_Cutting):
    """nn.LSTM, nn.GRU and nn.RNN of any depth and both directions: the same units go in every layer and direction.

    Weights have one block of rows a gate (see the pages of these modules in torch's documentation).
    """

    def get_out_channels(self, layer: Any) -> int:
        return layer.hidden_size * (2 if layer.bidirectional else 1)

    def get_in_channels(self, layer: Any) -> int:
        return layer.input_size

    def get_out_channel_groups(self, layer: Any) -> int:
        return 2 if layer.bidirectional else 1

    def prune_out_channels(self, layer: Any, idxs: list[int]) -> Any:
        if layer.proj_size:
            raise ValueError("a recurrent layer with proj_size is kept whole")
        size, directions = layer.hidden_size, self.get_out_channel_groups(layer)
        units = _left(size, (index % size for index in idxs))
        gates = layer.weight_hh_l0.shape[0] // size
        rows = [gate * size + unit for gate in range(gates) for unit in units]
        columns = [direction * size + unit for direction in range(directions) for unit in units]
        for name, parameter in list(layer.named_parameters()):
            narrower = keep(parameter, 0, rows)
            if name.startswith("weight_hh"):
                narrower = keep(narrower, 1, units)
            elif name.startswith("weight_ih") and not name.startswith("weight_ih_l0"):
                narrower = keep(narrower, 1, columns)
            setattr(layer, name, narrower)
        layer.hidden_size = len(units)
        layer.flatten_parameters()
        return layer

    def prune_in_channels(self, layer: Any, idxs: list[int]) -> Any:
        columns = _left(layer.input_size, idxs)
        for name in [name for name, _ in layer.named_parameters() if name.startswith("weight_ih_l0")]:
            setattr(layer, name, keep(getattr(layer, name), 1, columns))
        layer.input_size = len(columns)
        layer.flatten_parameters()
        return layer


class TransposedLinear(_Cutting):
    """`Conv1D` of transformers: a linear layer whose weight is [inputs, outputs]."""

    def get_out_channels(self, layer: Any) -> int:
        return layer.weight.shape[1]

    def get_in_channels(self, layer: Any) -> int:
        return layer.weight.shape[0]

    def prune_out_channels(self, layer: Any, idxs: list[int]) -> Any:
        kept = _left(layer.weight.shape[1], idxs)
        layer.weight, layer.bias, layer.nf = keep(layer.weight, 1, kept), keep(layer.bias, 0, kept), len(kept)
        return layer

    def prune_in_channels(self, layer: Any, idxs: list[int]) -> Any:
        kept = _left(layer.weight.shape[0], idxs)
        layer.weight, layer.nx = keep(layer.weight, 0, kept), len(kept)
        return layer


class Scale(_Cutting):
    """RMSNorm and its like: a module with nothing but one weight over the last dimension."""

    def get_out_channels(self, layer: Any) -> int:
        return layer.weight.shape[0]

    get_in_channels = get_out_channels

    def prune_out_channels(self, layer: Any, idxs: list[int]) -> Any:
        kept = _left(layer.weight.shape[0], idxs)
        layer.weight = keep(layer.weight, 0, kept)
        if isinstance(getattr(layer, "normalized_shape", None), tuple):
            layer.normalized_shape = (len(kept),)
        return layer

    prune_in_channels = prune_out_channels


class Bag(_Cutting):
    """nn.EmbeddingBag: a table of vectors, of which sums or means are taken."""

    def get_out_channels(self, layer: Any) -> int:
        return layer.embedding_dim

    get_in_channels = get_out_channels

    def prune_out_channels(self, layer: Any, idxs: list[int]) -> Any:
        kept = _left(layer.embedding_dim, idxs)
        layer.weight, layer.embedding_dim = keep(layer.weight, 1, kept), len(kept)
        return layer

    prune_in_channels = prune_out_channels


@dataclass(frozen=True, eq=False)
class Product:
    """A product of activations with a parameter outside of any layer: `x @ weight`, or an `einsum`."""

    name: str  # of the parameter
    owner: nn.Module
    attribute: str
    inner: int  # dimension of the parameter that the activations' last one is summed over
    outer: int  # the one that becomes the result's last
    own: bool  # False: the parameter is also a layer's, by which it is cut
    inputs: tuple[int, ...]  # shape of the activations
    outputs: tuple[int, ...]

    @property
    def parameter(self) -> Tensor:
        return getattr(self.owner, self.attribute)


@dataclass(frozen=True, eq=False)
class Fixed:
    """Channels that nothing here can cut: those of the network's inputs, and of what else goes into a product."""

    size: int


class Multiplied(_Cutting):
    """`Product`."""

    def get_out_channels(self, product: Any) -> int:
        return product.parameter.shape[product.outer]

    def get_in_channels(self, product: Any) -> int:
        return product.parameter.shape[product.inner]

    def prune_out_channels(self, product: Any, idxs: list[int]) -> Any:
        return self._cut(product, product.outer, idxs)

    def prune_in_channels(self, product: Any, idxs: list[int]) -> Any:
        return self._cut(product, product.inner, idxs)

    def _cut(self, product: Product, dim: int, idxs: list[int]) -> Product:
        if product.own:
            kept = _left(product.parameter.shape[dim], idxs)
            setattr(product.owner, product.attribute, keep(product.parameter, dim, kept))
        return product


class Kept(_Cutting):
    """`Fixed`."""

    def get_out_channels(self, fixed: Any) -> int:
        return fixed.size

    get_in_channels = get_out_channels

    def prune_out_channels(self, fixed: Any, idxs: list[int]) -> Any:
        raise ValueError("channels that nothing can cut")

    prune_in_channels = prune_out_channels


def is_transposed_linear(module: Any) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(module, "weight", torch.empty(0)).ndim == 2


def is_scale(module: Any) -> bool:
    if not isinstance(module, nn.Module):
        return False
    own = dict(module.named_parameters())
    known = isinstance(
        module, (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.PReLU)
    )
    return not known and list(own) == ["weight"] and own["weight"].ndim == 1 and not list(module.children())


def special_pruners(model: nn.Module) -> dict[type, Any]:
    """Pruners by class for the layers of this network that need one of ours."""
    found: dict[type, Any] = {Product: Multiplied(), Fixed: Kept()}
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            found[type(module)] = Recurrent()
        elif isinstance(module, nn.EmbeddingBag):
            found[type(module)] = Bag()
        elif is_transposed_linear(module):
            found[type(module)] = TransposedLinear()
        elif is_scale(module):
            found[type(module)] = Scale()
    return found


def weight_dim(module: Any, side: str) -> int | None:
    """The dimension of a layer's weight that its `side` is; None where that is not one."""
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return 1
    if isinstance(module, nn.Linear) or is_transposed_linear(module) or isinstance(module, nn.modules.conv._ConvNd):
        turned = is_transposed_linear(module) or getattr(module, "transposed", False)
        return int((side == "in") != turned)
    return None


def renumber(model: nn.Module) -> None:
    """nn.Transformer compares the width of what it is given with a number of its own, which no cutter of its layers knows of."""
    for module in model.modules():
        if isinstance(module, nn.Transformer):
            widths = [inner.embed_dim for inner in module.modules() if isinstance(inner, nn.MultiheadAttention)]
            module.d_model = widths[0] if widths else module.d_model


def taken_in(module: Any, side: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """The weights through which a layer takes in channels of the group that is cut at its `side`, by name, each with what lays it out as
    [G, channels / G, ...]; a recurrent layer takes its own outputs in again."""
    if isinstance(module, nn.RNNBase):
        own = [name for name, _ in module.named_parameters() if name.startswith("weight")]
        if side == "in":
            return {name: _transposed for name in own if name.startswith("weight_ih_l0")}
        return {name: _transposed for name in own if not name.startswith("weight_ih_l0")}
    if side == "out":
        return {}
    if isinstance(module, Product):
        return {module.attribute: lambda weight: weight.movedim(module.inner, 0)[None]}
    if isinstance(module, nn.modules.conv._ConvNd):
        groups = module.groups
        if module.transposed:
            return {"weight": lambda weight: weight.unflatten(0, (groups, -1))}
        return {"weight": lambda weight: weight.unflatten(0, (groups, -1)).transpose(1, 2)}
    if isinstance(module, nn.Linear):
        return {"weight": _transposed}
    if is_transposed_linear(module):
        return {"weight": lambda weight: weight[None]}
    return {}


def _transposed(weight: Tensor) -> Tensor:
    return weight.t()[None]
