"""A step of somebody else's loop: made whole or in parts, with the same gradients, and all or nothing where it fails."""

from __future__ import annotations

import math
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from delest import errors
from delest.backends.torch import rollback
from delest.backends.torch.addition import Addition, LossOf, judging
from delest.backends.torch.applied import Applied
from delest.backends.torch.parts import Share, rows_of


class Steps:
    """What the memory guard takes for its session: steps whose batches it may have made in more parts.

    `also` notes what else of the loop a failed step must leave as it was, and gives the function that brings it back.
    """

    def __init__(
        self,
        applied: Applied,
        model: nn.Module,
        ways: dict[str, Share],
        also: Callable[[], Callable[[], None]],
        *,
        guarded: bool,
    ):
        self.applied, self.model, self.guarded, self._also = applied, model, guarded, also
        self.addition = Addition(ways)
        self.batch_rows = 1  # of the largest batch so far
        self._can_split = True
        self._told = applied.rows is not None  # what changes in parts

    @property
    def parts(self) -> int:
        return self.applied.count(self.batch_rows)

    @parts.setter
    def parts(self, count: int) -> None:
        if count > self.parts:
            self.applied.split(math.ceil(self.batch_rows / count))

    @property
    def most_parts(self) -> int:
        return max(1, self.batch_rows // self.applied.least_rows) if self._can_split else 1

    def warm(self) -> None:
        """Start the threads of parallel operators, whose stacks take address space."""
        torch.ones(1 << 18).exp()

    def see(self, batch: Any) -> int:
        """Take note of a batch's rows before it is stepped; one that has none that can be seen stays whole, as one row."""
        try:
            rows, self._can_split = rows_of(batch), True
        except errors.BadInput:
            rows, self._can_split = 1, False
        self.batch_rows = max(self.batch_rows, rows)
        return rows

    def make(self, batch: Any, one: Callable[[Any, float], Any], loss_of: LossOf | None) -> list[Any]:
        """What `one(part, share)` gives for each part of the batch: it goes forward and, in training, backward with its loss
        multiplied by its share. Training has a `loss_of`, by which it is found out how the loss adds up.

        Raises `OutOfMemory`, with gradients, buffers, random state and the loop's own notes as before; `BadInput` where the
        loss is not made of its rows' losses, so that there are no parts.
        """
        rows = self.see(batch)
        back = self._remember()
        held = self._set_gradients_aside()
        try:
            if loss_of is not None and self.applied.count(rows) > 1:
                self._tell()
                with judging(self.model):
                    self.addition.find_out(batch, rows, loss_of)
                back()
            self.applied.share = self.addition.share if loss_of is not None else self.addition.first
            return [one(part, share) for part, share in self.applied.divided(batch, rows)]
        except (RuntimeError, MemoryError) as error:
            if not rollback.is_out_of_memory(error, self.guarded):
                raise
            begun = self.applied.updates is not None and self.applied.updates.begun
            self._drop_gradients()
            back()
            raise errors.OutOfMemory(_phase(error), rollback.first_line(error), begun) from error
        finally:
            for parameter, gradient in held:
                parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)

    def _tell(self) -> None:
        """Warn of what changes when batches are first made in parts."""
        doubts, self._told = [] if self._told else self.applied.doubts(), True
        for said in doubts:
            warnings.warn(said, errors.DelestWarning, stacklevel=2)

    def _remember(self) -> Callable[[], None]:
        if not (self.guarded or self.applied.rows is not None):
            return lambda: None
        before, also = rollback.remember(self.model), self._also()

        def back() -> None:
            rollback.restore(self.model, before)
            also()

        return back

    def _set_gradients_aside(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Gradients of earlier batches of the same update, to which those of this one are added once they are whole."""
        held = [(one, one.grad) for one in self.model.parameters() if one.grad is not None] if self.guarded else []
        for parameter, _ in held:
            parameter.grad = None
        return held

    def _drop_gradients(self) -> None:
        if self.guarded:
            for parameter in self.model.parameters():
                parameter.grad = None


def weighted(loss: Tensor, share: float) -> Tensor:
    """The loss of a part by its share. Where nothing counts a mean is no number: it is left out, and has no gradient."""
    return loss * share if share else torch.zeros_like(loss, requires_grad=loss.requires_grad)


def summed(losses: list[Tensor]) -> Tensor:
    """The loss of a batch, of those of its parts by their shares."""
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum()


def _phase(error: BaseException) -> str:
    names = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
    return "backward" if "backward" in names else "forward"
