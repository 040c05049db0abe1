"""Layers of a network as a forward pass sees them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from delest.backends.torch.pruning.layers import Product, is_transposed_linear
from delest.records.pruning import Layer


def tensors(value: Any) -> list[Tensor]:
    """Floating-point tensors of nested outputs, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in tensors(item)]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors(item)]
    return []


def watch(model: nn.Module, run: Callable[[nn.Module], Any], hooks: Mapping[str, Callable[..., None]]) -> None:
    """A forward pass without gradient, in which modules call a hook each, by name: `hook(module, inputs, named, outputs)`."""
    handles = [model.get_submodule(name).register_forward_hook(hook, with_kwargs=True) for name, hook in hooks.items()]
    try:
        with torch.no_grad():
            run(model)
    finally:
        for handle in handles:
            handle.remove()


def observe(model: nn.Module, run: Callable[[nn.Module], Any], products: Sequence[Product]) -> dict[str, Layer]:
    """Layers with parameters of their own, with the shapes of a forward pass, and parameters of products; those that are not called are left out. A tied
    parameter counts once, in the first layer that is called."""
    own = [product for product in products if product.own]
    counted = {id(product.parameter) for product in own}
    found = {
        each.name: Layer(
            name=each.name, kind="other", parameters=each.parameter.numel(), inputs=each.inputs, outputs=each.outputs
        )
        for each in own
    }

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, named: Any, outputs: Any) -> None:
            if name in found or not (made := tensors(outputs)):
                return
            whole = isinstance(module, nn.MultiheadAttention)  # it never calls its layer for outputs
            new = [parameter for parameter in module.parameters(recurse=whole) if id(parameter) not in counted]
            counted.update(map(id, new))
            given = [tuple(tensor.shape) for tensor in tensors(inputs)] or [()]  # a table is given whole numbers
            found[name] = _layer(name, module, sum(map(torch.numel, new)), given[0], tuple(made[0].shape))

        return hook

    watch(model, run, {name: note(name) for name, module in model.named_modules() if name and module._parameters})
    return found


def _layer(name: str, module: Any, parameters: int, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Layer:
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
