"""How the loss of a batch is made of those of its parts, where only measuring can tell."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from delest import errors
from delest.backends.torch.parts import Share, by_rows, taken

CHECKS = 8  # batches on which ways of adding up are compared, where they differ
TOLERANCE = 0.01  # of the loss: autocast rounds two rows together otherwise than one by one
LossOf = Callable[[Any], float]  # of some rows, without gradient


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
                "are compared with one another or a function of yours weighs targets: give torch's CrossEntropyLoss with its settings in place of such "
                "a function, more memory, a smaller batch or a smaller model."
            )


@contextlib.contextmanager
def judging(model: nn.Module) -> Iterator[None]:
    """Without gradients and in evaluation mode, in which nothing is drawn; modes are as they were afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
