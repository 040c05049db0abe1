"""Operators on fake sparse tensors: torch's own answers (2.13) have no entries, whatever those of their operands.

How many entries a result has depends on values. It is taken to have all of its operands', as where no two of them fall together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from delest.backends.torch.building import is_fake

_aten = torch.ops.aten
_ON_VALUES = {
    _aten.clone.default,
    _aten.neg.default,
    _aten.mul.Tensor,
    _aten.mul.Scalar,
    _aten.div.Tensor,
    _aten.div.Scalar,
    _aten._to_copy.default,
}
_JOINED = {_aten.add.Tensor, _aten.sub.Tensor}


def answer(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """What an operator makes of fake sparse tensors in coordinate format, None for every other call.

    A gradient that nobody else holds becomes the parameter's `grad` as it is (torch/csrc/autograd/functions/accumulate_grad.h);
    here it seems to be held elsewhere, and autograd asks for a copy.
    """
    if not (args and _is_sparse(args[0]) and is_fake(args[0])):
        return None
    own = args[0]
    if func is _aten.clone.default and _is_accumulated():
        return own
    if func is _aten._coalesce.default:
        return _with(own, own._indices().clone(), own._values().clone())
    if func in _ON_VALUES and not any(_is_sparse(other) for other in args[1:]):
        return _with(own, own._indices().clone(), func(own._values(), *args[1:], **kwargs))
    if func in _JOINED and _is_sparse(args[1]):
        parts = args[:2]
        return _with(own, torch.cat([part._indices() for part in parts], dim=1), torch.cat([part._values() for part in parts]))
    return None


def _is_sparse(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.sparse_coo


def _is_accumulated() -> bool:
    node = torch._C._current_autograd_node()
    return node is not None and node.name().endswith("AccumulateGrad")


def _with(like: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    return torch.sparse_coo_tensor(indices, values, like.shape, check_invariants=False)
