"""A plan in somebody's own training loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delest import errors
from delest.records.plan import Plan

if TYPE_CHECKING:
    from delest.backends.torch.applied import Applied


def apply(plan: Plan | str | Path, model: Any, optimizer: Any, loss: Callable[..., Any] | None = None) -> Applied:
    """Apply a plan, or a plan.json, to a torch model and its optimizer for a loop of one's own; gives an `Applied`.

    >>> import torch, delest
    >>> from delest.records.plan import Choice, Plan
    >>> parts = Choice(method="micro_batch", config={"rows": 4}, keeps="rounding", why="the whole batch would not fit")
    >>> model = torch.nn.Linear(3, 2)
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    >>> plan = Plan(choices=(parts,), batch_size=8, micro_batch=4)
    >>> applied = delest.apply(plan, model, optimizer, torch.nn.functional.cross_entropy)
    >>> applied.changes
    ('micro_batch: rows 4',)
    >>> loss = applied.step((torch.ones(8, 3), torch.zeros(8, dtype=torch.int64)))

    `loss(outputs, targets)` is a mean over rows; None where the model's output has its `.loss`. Go on with `applied.model` and
    `applied.optimizer`: a new one, with the given one's groups, settings and state, where a method needs it.

    Raises `BadInput` for methods that exclude each other or do not suit the model or the optimizer, and where a learning-rate
    scheduler is attached to an optimizer that must be replaced. Warns where parts of a batch change what batch normalisation sees.
    The model is changed in place, and the process's threads are set to the plan's.
    """
    import torch

    from delest.backends.torch.applied import Applied
    from delest.records.form import read_json

    faults = []
    if not isinstance(plan, (Plan, str, Path)):
        faults.append(f"a plan is a Plan or the path of a plan.json, not a {type(plan).__name__}.")
    if not isinstance(model, torch.nn.Module):
        faults.append(f"the model is a {type(model).__name__}, not a torch.nn.Module.")
    if not isinstance(optimizer, torch.optim.Optimizer):
        faults.append(f"the optimizer is a {type(optimizer).__name__}, not a torch.optim.Optimizer.")
    if loss is not None and not callable(loss):
        faults.append(f"the loss is a {type(loss).__name__}, not a function of outputs and targets.")
    if faults:
        raise errors.BadInput(faults)
    return Applied(plan if isinstance(plan, Plan) else read_json(Plan, Path(plan)), model, optimizer, loss)
