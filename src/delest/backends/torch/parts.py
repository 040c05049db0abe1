"""Parts of a batch of any form, and what share of the whole batch's loss each is.

A batch is tensors inside tuples, lists and mappings; those with as many rows as the first are divided. Gradients of parts
add up to the whole batch's where each part's loss is multiplied by its share of what the loss is a mean over: rows, or for a
cross entropy the targets that it does not ignore, by their classes' weights.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from delest import errors

Share = Callable[[Any, Sequence[slice], int], list[float]]  # of a batch, its parts, and its rows: one share a part
IGNORED = -100  # torch's default ignore_index
_CROSS_ENTROPIES = (nn.CrossEntropyLoss, nn.NLLLoss)


def rows_of(batch: Any) -> int:
    """Rows of the first tensor that has any. Raises `BadInput` where none has."""
    for tensor in tensors_of(batch):
        if tensor.ndim:
            if len(tensor) == 0:
                raise errors.BadInput("the batch has no rows.")
            return len(tensor)
    raise errors.BadInput(f"the batch, a {type(batch).__name__}, holds no tensor with rows.")


def tensors_of(batch: Any) -> list[Tensor]:
    """All tensors of a batch, in order."""
    found: list[Tensor] = []
    mapped(batch, lambda one: found.append(one) or one)  # type: ignore[func-returns-value]
    return found


def taken(batch: Any, which: slice | list[int], rows: int) -> Any:
    """Some rows of a batch that has `rows`."""
    return mapped(batch, lambda one: one[which] if one.ndim and len(one) == rows else one)


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same tuples, lists and mappings (as dictionaries) around changed tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: mapped(item, change) for name, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(item, change) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(item, change) for item in value)
    return value


# Shares


def by_rows(batch: Any, parts: Sequence[slice], rows: int) -> list[float]:
    """Of a loss that is a mean over rows."""
    return [(part.stop - part.start) / rows for part in parts]


def by_targets(
    find: Callable[[Any], Any], ignored: Sequence[int] = (IGNORED,), weight: Tensor | None = None, shift: int = 0
) -> Share:
    """Of a mean over targets that are class numbers, without those ignored, weighted by class; `find` takes them from a batch,
    `shift` leaves out so many of each row's first. Rows decide where targets are something else or all are ignored."""

    def share(batch: Any, parts: Sequence[slice], rows: int) -> list[float]:
        targets = find(batch)
        if not isinstance(targets, Tensor) or not is_integer(targets) or targets.ndim == 0 or len(targets) != rows:
            return by_rows(batch, parts, rows)
        targets = targets[:, shift:] if shift and targets.ndim > 1 else targets
        counted = torch.ones_like(targets, dtype=torch.bool)
        for number in ignored:
            counted &= targets != number
        amounts = counted.double()
        if weight is not None:
            amounts *= weight.double()[torch.where(counted, targets, 0).long()]
        each = amounts.flatten(1).sum(1) if amounts.ndim > 1 else amounts
        whole = float(each.sum())
        return [float(each[part].sum()) / whole for part in parts] if whole else by_rows(batch, parts, rows)

    return share


def ignoring(model: nn.Module, name: str | None = None) -> dict[str, Share]:
    """By what a loss somewhere in `model` may be a mean, where only measuring can tell: targets that it does not ignore, or those
    behind the first of each row. They are the batch's entry `name`, else its last integers that hold a number to ignore."""
    heads = [module for module in model.modules() if isinstance(module, _CROSS_ENTROPIES)]
    ignored = tuple({IGNORED, *(head.ignore_index for head in heads)})

    def find(batch: Any) -> Any:
        if name is not None and isinstance(batch, Mapping) and name in batch:
            return batch[name]
        found = [one for one in tensors_of(batch) if is_integer(one) and any(bool((one == number).any()) for number in ignored)]
        return found[-1] if found else None

    return {"targets": by_targets(find, ignored), "targets after the first": by_targets(find, ignored, shift=1)}


def of_loss(loss: Any) -> Share:
    """The shares for a loss function of outputs and targets; rows, with a warning where that may be wrong, for one not known."""
    settings = settings_of(loss)
    if settings.get("known"):
        return by_targets(_targets, (settings.get("ignore_index", IGNORED),), settings.get("weight"))
    return _by_rows_unless_ignored(loss)


def settings_of(loss: Any) -> dict[str, Any]:
    """`reduction`, `weight` and `ignore_index` of a loss module, function or partial, those that it has; `known` where it is
    torch's cross entropy or negative log likelihood."""
    given: dict[str, Any] = {}
    while isinstance(loss, functools.partial):
        given, loss = {**loss.keywords, **given}, loss.func
    if isinstance(loss, nn.Module):
        own = {name: getattr(loss, name) for name in ("reduction", "weight", "ignore_index") if hasattr(loss, name)}
        return {**own, **given, "known": any(type(loss).forward is kind.forward for kind in _CROSS_ENTROPIES)}
    return {**given, "known": loss in (nn.functional.cross_entropy, nn.functional.nll_loss)}


def is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _targets(batch: Any) -> Any:
    return batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None


def _by_rows_unless_ignored(loss: Any) -> Share:
    """By rows; the first batch with ignored targets is told of, since it cannot be known how this loss counts them."""
    told = False

    def share(batch: Any, parts: Sequence[slice], rows: int) -> list[float]:
        nonlocal told
        targets = batch if loss is None else _targets(batch)
        if not told and any(is_integer(one) and bool((one == IGNORED).any()) for one in tensors_of(targets)):
            told = True
            name = "the model's own loss" if loss is None else f"the loss {getattr(loss, '__name__', type(loss).__name__)}"
            warnings.warn(
                f"targets hold {IGNORED}, which torch's losses ignore, and it is not known how {name} counts them: parts of a batch "
                "are weighted by rows, so gradients may differ from the whole batch's. Give delest.apply a "
                "loss=torch.nn.CrossEntropyLoss(ignore_index=...), or plan with a larger budget so that the batch stays whole.",
                errors.DelestWarning,
                stacklevel=2,
            )
        return by_rows(batch, parts, rows)

    return share
