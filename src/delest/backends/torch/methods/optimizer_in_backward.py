"""Update each parameter in the backward pass, as soon as its gradient is complete, and free the gradient.

Source: https://docs.pytorch.org/tutorials/intermediate/optimizer_step_in_backward_tutorial.html
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from delest import errors
from delest.backends.torch.lean import bare_step
from delest.backends.torch.piecewise import PiecewiseOptimizer
from delest.methods.optimizer_in_backward import ELEMENTWISE

if TYPE_CHECKING:
    from delest.backends.torch.methods import Training


def apply(training: Training, config: dict[str, Any]) -> None:
    """Raises `BadInput` for an optimizer that is not known to update element by element."""
    for optimizer in training.optimizers:
        kind = type(optimizer)
        known = kind.__module__.startswith("torch.optim") or isinstance(optimizer, PiecewiseOptimizer)
        if not known or kind.__name__.lower() not in ELEMENTWISE:
            raise errors.BadInput(
                f"optimizer_in_backward: {kind.__name__} is not known to update each element from its own gradient alone. "
                f"These of torch.optim do: {', '.join(ELEMENTWISE)}."
            )
    training.updates = Updates(training.optimizers)


class Updates:
    """Updates of a training's parameters inside its backward pass.

    `begin` comes before the backward pass of a step's last part, `finish` after it. State and settings stay the optimizers'.
    Where the backward pass still needs a weight that is updated (a model that also uses it detached), torch raises a
    `RuntimeError`; inside a module that is run again by checkpointing it does not see that.
    """

    def __init__(self, optimizers: list[torch.optim.Optimizer]):
        self.optimizers = optimizers
        self.around: Callable[[Tensor], contextlib.AbstractContextManager[bool]] = lambda _: contextlib.nullcontext(True)
        self._active = False
        self._done: set[int] = set()
        self._steps = [bare_step(optimizer) for optimizer in optimizers]
        self._home: dict[int, tuple[int, int]] = {}  # a parameter's optimizer and group
        mine = weakref.WeakMethod(self._complete)  # a model may outlive its training; deep copies of it have no hooks
        for i, optimizer in enumerate(optimizers):
            for j, group in enumerate(optimizer.param_groups):
                for parameter in group["params"]:
                    self._home[id(parameter)] = (i, j)
                    if parameter.requires_grad:
                        parameter.register_post_accumulate_grad_hook(_calling(mine))

    @property
    def begun(self) -> bool:
        """Whether this step has updated a parameter already: it can then not be taken back."""
        return bool(self._done)

    def begin(self) -> None:
        """Gradients that become complete from here on are used at once."""
        self._done.clear()
        self._active = True

    def finish(self) -> None:
        """Update what got its gradient otherwise: in an earlier part alone, or without a hook (frozen when training began)."""
        for optimizer, step in zip(self.optimizers, self._steps, strict=True):
            if any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"]):
                step()

    def end(self) -> None:
        """The step is over, whole or not."""
        self._active = False
        self._done.clear()

    def _complete(self, parameter: Tensor) -> None:
        if not self._active:
            return
        if id(parameter) in self._done:
            raise errors.BadInput(
                "a parameter's gradient was completed twice in one backward pass, as reentrant checkpointing does, and "
                "optimizer_in_backward has updated it already: use checkpointing with use_reentrant=False."
            )
        with self.around(parameter) as wanted:
            if wanted:
                self._done.add(id(parameter))
                self._update(parameter)

    def _update(self, parameter: Tensor) -> None:
        i, j = self._home[id(parameter)]
        optimizer = self.optimizers[i]
        groups = optimizer.param_groups
        optimizer.param_groups = [{**groups[j], "params": [parameter]}]
        try:
            self._steps[i]()
        finally:
            optimizer.param_groups = groups
        # Fused optimizers leave the version as it is, by which autograd sees that what it kept was overwritten: a model that
        # also uses its weights detached would get wrong gradients instead of torch's error.
        torch.autograd.graph.increment_version(parameter)
        parameter.grad = None


def _calling(method: weakref.WeakMethod[Any]) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        bound = method()
        if bound is not None:
            bound(parameter)

    return hook
