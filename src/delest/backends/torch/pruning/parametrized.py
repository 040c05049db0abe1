"""Weights that are computed from others (`torch.nn.utils.parametrizations.weight_norm`), as ordinary ones for as long as layers are cut."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm


@contextlib.contextmanager
def plain_weights(model: nn.Module) -> Iterator[None]:
    """Weights with a norm of their own as parameters of their layers. Afterwards those that were cut get the direction and norm of what is left, and the others
    their own again: were direction and norm cut apart, what is left of a weight would be scaled by what went.

    Other parametrisations stay: most are bound to the shape, as the vectors of spectral norms are.
    """
    found = [(module, name) for module in model.modules() for name in _normed(module)]
    before: list[tuple[Any, str, Any, nn.Parameter]] = []
    with torch.enable_grad():  # else the weight would become a buffer
        for module, name in found:
            parametrization = module.parametrizations[name]  # type: ignore[index]
            parametrize.remove_parametrizations(module, name)
            before.append((module, name, parametrization, getattr(module, name)))
    try:
        yield
    finally:
        for module, name, parametrization, weight in before:
            cut = getattr(module, name) is not weight
            parametrize.register_parametrization(module, name, parametrization[0], unsafe=True)
            if cut:
                made = module.parametrizations[name]
                parametrization.original0, parametrization.original1 = made.original0, made.original1
            module.parametrizations[name] = parametrization


def _normed(module: Any) -> list[str]:
    if not parametrize.is_parametrized(module):
        return []
    return [name for name, steps in module.parametrizations.items() if len(steps) == 1 and isinstance(steps[0], _WeightNorm)]
