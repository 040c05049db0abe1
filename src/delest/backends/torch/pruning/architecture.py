"""How a narrower network differs from the one that its factory builds, as JSON, and building it again from that, without pickle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from delest import errors

Sizes = dict[str, dict[str, Any]]  # whole numbers, and tuples of them, by module and attribute


def sizes_of(model: nn.Module) -> Sizes:
    """Every whole number, and every tuple of them, that modules keep as attributes: widths, heads, shapes."""
    return {
        name: {key: value for key, value in vars(module).items() if _is_size(value)}
        for name, module in model.named_modules(remove_duplicate=True)
    }


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of parameters and buffers by name."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def describe(model: nn.Module, sizes: Sizes, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What a network has become, layer by layer, since it had these `sizes` and `shapes`: `modules` (attributes that are others now) and
    `tensors` (shape before and now)."""
    now = sizes_of(model)
    modules = {
        name: {key: value for key, value in attributes.items() if value != sizes[name].get(key)}
        for name, attributes in now.items()
    }
    tensors = {
        name: {"before": list(shapes[name]), "now": list(shape)}
        for name, shape in shapes_of(model).items()
        if shape != shapes[name]
    }
    return {"modules": {name: changed for name, changed in modules.items() if changed}, "tensors": tensors}


def rebuild(model: nn.Module, architecture: Mapping[str, Any]) -> nn.Module:
    """Give a network as its factory builds it the sizes and shapes of `describe`, in place: a narrow network with fresh weights, into which
    trained ones can be loaded. Tensors that were one stay one.

    Raises `BadInput` naming what is not in this network, or has another shape there.
    """
    shapes, names = shapes_of(model), dict(model.named_modules())
    faults = [
        f"{name} is not in it"
        for name in [*architecture["modules"], *architecture["tensors"]]
        if name not in {**shapes, **names}
    ]
    faults += [
        f"{name} has shape {list(shapes[name])}, {change['before']} was expected"
        for name, change in architecture["tensors"].items()
        if name in shapes and list(shapes[name]) != change["before"]
    ]
    if faults:
        raise errors.BadInput(
            f"the factory builds another network than the one that was made narrower: {'; '.join(faults[:5])}. Give the factory that the run was "
            "trained with."
        )
    narrowed: dict[int, tuple[Tensor, Tensor]] = {}  # by the old one's identity, which it keeps as long as it is here
    for name, change in architecture["tensors"].items():
        owner, attribute = _owner(model, name)
        old = getattr(owner, attribute)
        if id(old) not in narrowed:
            narrowed[id(old)] = (old, _narrowed(old, change["now"]))
        setattr(owner, attribute, narrowed[id(old)][1])
    for name, attributes in architecture["modules"].items():
        for key, value in attributes.items():
            setattr(names[name], key, tuple(value) if isinstance(value, list) else value)
    return model


def _narrowed(old: Tensor, shape: list[int]) -> Tensor:
    """The first of the factory's initial values in every dimension; weights are scaled so that sums over fewer inputs stay as large."""
    new = old.detach()[tuple(slice(size) for size in shape)].clone()
    if not isinstance(old, nn.Parameter):
        return new
    if new.ndim > 1 and new[0].numel() < old[0].numel():
        new *= math.sqrt(old[0].numel() / new[0].numel())
    return nn.Parameter(new, requires_grad=old.requires_grad)


def ties_of(model: nn.Module) -> list[list[str]]:
    """Names of parameters that are one and the same."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [same for same in names.values() if len(same) > 1]


def tie(model: nn.Module, ties: list[list[str]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Make parameters one again that were before layers were cut apart. Those that still have one of these `shapes`, as a layer that is never called
    is never cut, become what the others are.

    Raises `ValueError` where cut ones have different shapes.
    """
    for names in ties:
        owners = [_owner(model, name) for name in names]
        tensors = [getattr(owner, attribute) for owner, attribute in owners]
        cut = [tensor for tensor, name in zip(tensors, names, strict=True) if tuple(tensor.shape) != shapes[name]]
        if len({tensor.shape for tensor in cut}) > 1:
            raise ValueError(f"{' and '.join(names)} are one tensor and would get different shapes")
        kept = (cut or tensors)[0]
        for owner, attribute in owners:
            setattr(owner, attribute, kept)
            if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
                owner.embedding_dim = kept.shape[1]


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def _is_size(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (isinstance(value, tuple) and bool(value) and all(type(item) is int for item in value))
