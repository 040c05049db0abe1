"""Modules that a method takes by name, the forward that it puts in place of theirs, and one call of it over parts of the batch."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from delest import errors


class Forward:
    """Stands in place of a module's forward, on the instance: names, hooks, class and state stay as they are."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.own = vars(module).get("forward")  # None: the class's
        self.__signature__ = inspect.signature(module.forward)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The module's own."""
        if self.own is not None:
            return self.own(*inputs, **named)
        return type(self.module).forward(self.module, *inputs, **named)


def blocks_named(model: nn.Module, names: list[str], method: str) -> dict[str, nn.Module]:
    """The modules of these names. Raises `BadInput` with every one whose forward cannot be replaced."""
    known = dict(model.named_modules(remove_duplicate=False))
    faults = [f"the model has no module {name!r}." for name in names if name not in known]
    found = {name: known[name] for name in names if name in known}
    faults += [
        f"the module {inner!r} is inside {outer!r}, which {method} names too: name one of them."
        for outer in found
        for inner in found
        if inner != outer and (outer == "" or inner.startswith(f"{outer}."))
    ]
    faults += [
        f"the module {name!r}, a {type(module).__name__}, has no forward of its own: name its children."
        for name, module in found.items()
        if type(module).forward is nn.Module.forward
    ]
    faults += [
        f"the forward of the module {name!r} was replaced by a method already."
        for name, module in found.items()
        if isinstance(module.forward, Forward)
    ]
    faults += [
        f"the module {name!r} is scripted: name modules before torch.jit.script."
        for name, module in found.items()
        if isinstance(module, torch.jit.ScriptModule)
    ]
    if not names:
        faults.append(f"{method} was chosen without a module.")
    if len({id(module) for module in found.values()}) < len(names) and not faults:
        faults.append(f"the same module is named twice for {method}.")
    if faults:
        raise errors.BadInput(faults)
    return found


def slices(rows: int, parts: int) -> list[slice]:
    """Nearly equal ones of so many rows, none empty."""
    parts = max(1, min(parts, rows))
    bounds = [rows * number // parts for number in range(parts + 1)]
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


class Call:
    """One call of a block: where its tensors stand among the arguments, which of them have the batch's rows, and autocast around it.

    `divided` says which tensors have rows where an earlier call has shown it: later a batch may have as many rows as another
    tensor is long. The tensors themselves are not kept. Raises `BadInput` where none has rows.
    """

    def __init__(self, name: str, block: Forward, arguments: Any, divided: list[bool] | None = None):
        self.name, self.block = name, block
        leaves, self._shape = tree_flatten(arguments)
        self.tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self._places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        plain = (Tensor, str, int, float, type(None))
        self.objects = [
            type(leaf).__name__ for leaf in leaves if not isinstance(leaf, plain)
        ]  # which may remember earlier calls
        if divided is None or len(divided) != len(self.tensors):
            rows = next((len(tensor) for tensor in self.tensors if tensor.ndim), 0)
            divided = [bool(tensor.ndim) and len(tensor) == rows for tensor in self.tensors]
        self.divided = divided
        lengths = {len(tensor) if tensor.ndim else 0 for tensor, cut in zip(self.tensors, divided, strict=True) if cut}
        if len(lengths) != 1 or 0 in lengths:
            raise errors.BadInput(
                f"layered_accumulation: the block {name!r} is called without tensors that have the same rows."
            )
        (self.rows,) = lengths
        self._device = self.tensors[0].device.type
        self._autocast = (torch.is_autocast_enabled(self._device), torch.get_autocast_dtype(self._device))

    def taken(self, tensors: Sequence[Tensor], rows: slice) -> list[Tensor]:
        return [tensor[rows] if divided else tensor for tensor, divided in zip(tensors, self.divided, strict=True)]

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast as around the call, without its cache: what is cast without gradients must not be used with them."""
        enabled, dtype = self._autocast
        return torch.autocast(self._device, dtype=dtype, enabled=enabled, cache_enabled=False)

    def run(self, tensors: Sequence[Tensor], rows: int) -> tuple[list[Tensor], Outputs]:
        """The outputs for these tensors, which have `rows` rows. Raises `BadInput` for one without them: parts of it could not be
        put together."""
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        inputs, named = tree_unflatten(leaves, self._shape)
        found, shape = tree_flatten(self.block.forward(*inputs, **named))
        made = [leaf for leaf in found if isinstance(leaf, Tensor)]
        for tensor in made:
            if not tensor.ndim or len(tensor) != rows:
                raise errors.BadInput(
                    f"layered_accumulation: the block {self.name!r} gives a tensor of shape {tuple(tensor.shape)} for "
                    f"{rows} row{'s' * (rows != 1)}, so that parts of it cannot be put together: leave that block out."
                )
        return made, Outputs(found, shape)


class Outputs:
    """What a block gives besides tensors, and where those stand."""

    def __init__(self, leaves: list[Any], shape: Any):
        self._is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        self._others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._shape = shape

    def around(self, tensors: Sequence[Tensor]) -> Any:
        given = iter(tensors)
        leaves = [next(given) if here else other for here, other in zip(self._is_tensor, self._others, strict=True)]
        return tree_unflatten(leaves, self._shape)
