"""A step of somebody else's loop: made whole or in parts, with the same gradients, and all or nothing where it fails."""

from __future__ import annotations

import contextlib
import math
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from delest import errors
from delest.backends.torch import rollback
from delest.backends.torch.applied import Applied
from delest.backends.torch.parts import Share, by_rows, rows_of, taken

CHECKS = 8  # batches on which ways of adding up are compared, where they differ
TOLERANCE = 0.01  # of the loss: autocast rounds two rows together otherwise than one by one
LossOf = Callable[[Any], float]  # of some rows, without gradient


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
                with _judging(self.model):
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


class Addition:
    """How a batch's loss is made of those of its parts: a mean over targets, a mean over rows, or a sum. Which it is, is found
    out on a few rows, since a loss inside somebody's step cannot be looked at; and that it is one of them at all."""

    def __init__(self, ways: dict[str, Share]):
        self.ways = {**ways, "rows": by_rows, "sum": lambda batch, divided, rows: [1.0] * len(divided)}
        self.first = next(iter(self.ways.values()))
        self.name = next(iter(self.ways))
        self._errors = dict.fromkeys(self.ways, 0.0)
        self._checks = 0

    def share(self, batch: Any, divided: Sequence[slice], rows: int) -> list[float]:
        return self.ways[self.name](batch, divided, rows)

    def find_out(self, batch: Any, rows: int, loss_of: LossOf) -> None:
        """Compare the loss of a few rows with theirs one by one. Raises `BadInput` where no way of adding them gives it."""
        if self._checks == CHECKS:
            return
        each = self.first(batch, [slice(row, row + 1) for row in range(rows)], rows)
        order = sorted(range(rows), key=each.__getitem__)
        chosen = sorted({order[0], *order[-2:]})  # the one with the least tells targets from rows, the others a mean from a sum
        few, single = taken(batch, chosen, rows), [slice(row, row + 1) for row in range(len(chosen))]
        shares = {name: way(few, single, len(chosen)) for name, way in self.ways.items()}
        means = [name for name in self.ways if name != "sum"]
        told = abs(self._errors["sum"] - min(self._errors[name] for name in means)) > TOLERANCE
        if told and all(shares[name] == shares["rows"] for name in means):
            return  # whether it is a mean or a sum is known, and there is no more to learn from this batch
        whole, again = loss_of(few), loss_of(few)
        if math.isnan(whole):  # as where no target of these rows counts
            return
        self._checks += 1
        if abs(whole - again) > TOLERANCE * abs(whole):
            self._checks = CHECKS
            warnings.warn(
                "the loss draws random numbers, so it cannot be checked that it is made of its rows' losses: parts of a batch are "
                f"weighted by {self.name}.",
                errors.DelestWarning,
                stacklevel=2,
            )
            return
        alone = [loss_of(taken(batch, [row], rows)) for row in chosen]
        for name, given in shares.items():
            found = sum(share * loss for share, loss in zip(given, alone, strict=True) if share)
            error = abs(found - whole) / max(abs(whole), 1e-12)
            self._errors[name] += error if math.isfinite(error) else 1.0
        self.name = min(self._errors, key=self._errors.__getitem__)
        if self._errors[self.name] > TOLERANCE * self._checks:
            raise errors.BadInput(
                f"this step cannot be made in parts: the loss of {len(chosen)} rows is {whole:.6g}, that of each alone "
                f"{', '.join(f'{loss:.6g}' for loss in alone)}, and the one is neither the mean nor the sum of the others, as where rows "
                "are compared with one another. Give more memory, a smaller batch or a smaller model."
            )


def weighted(loss: Tensor, share: float) -> Tensor:
    """The loss of a part by its share. Where nothing counts a mean is no number: it is left out, and has no gradient."""
    return loss * share if share else torch.zeros_like(loss, requires_grad=loss.requires_grad)


@contextlib.contextmanager
def _judging(model: nn.Module) -> Iterator[None]:
    """Without gradients and in evaluation mode, in which nothing is drawn; modes are as they were afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _phase(error: BaseException) -> str:
    names = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
    return "backward" if "backward" in names else "forward"
