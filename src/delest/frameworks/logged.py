"""What a Lightning module logs and counts in the parts of a batch: once, whatever parts it is made in and however often."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import Metric


class Logged:
    """Takes what `module.log` is given while a batch is made, and logs it when the batch is whole.

    Values of parts become one: their mean by the parts' shares, or what `reduce_fx` says. A value that is the loss becomes the
    loss. Metrics of torchmetrics count rows by themselves and are logged as they are.
    """

    def __init__(self, module: LightningModule):
        self.module = module
        self.losses: list[Tensor | None] = []  # of the parts, set once the batch is whole
        self._taken: list[tuple[str, Any, tuple[Any, ...], dict[str, Any], float]] = []
        self._share, self._parts = 1.0, 0

    @contextlib.contextmanager
    def once_a_batch(self, name: str) -> Iterator[None]:
        """Around all parts and tries of one batch; `name` is the module's method that logs."""
        module = self.module
        self.forget()
        module.log = self._take
        try:
            yield
        finally:
            vars(module).pop("log")
        before, module._current_fx_name = module._current_fx_name, name
        try:
            self._give()
        finally:
            module._current_fx_name = before
            self.forget()

    def begin_part(self, share: float) -> None:
        """What is logged from here on belongs to a part with this share of the loss."""
        self._share, self._parts = share, self._parts + 1

    def forget(self) -> None:
        """What was taken belongs to a try that failed."""
        self._taken, self._parts, self.losses = [], 0, []

    def remember(self) -> Callable[[], None]:
        """Note the module's metrics, and give the function that brings them back and forgets what was logged since."""
        metrics = [one for one in self.module.modules() if isinstance(one, Metric)]
        states = [({name: _copied(value) for name, value in one.metric_state.items()}, one._update_count) for one in metrics]
        current = self.module._current_fx_name

        def back() -> None:
            self.forget()
            self.module._current_fx_name = current
            for metric, (state, count) in zip(metrics, states, strict=True):
                for name, value in state.items():
                    setattr(metric, name, _copied(value))
                metric._update_count, metric._computed = count, None

        return back

    def _take(self, name: str, value: Any, *given: Any, **named: Any) -> None:
        if isinstance(value, Tensor) and not named.get("enable_graph"):
            value = value.detach().clone()
        self._taken.append((name, value, given, named, self._share))

    def _give(self) -> None:
        if self._parts <= 1:
            for name, value, given, named, _ in self._taken:
                self.module.log(name, value, *given, **named)
            return
        for name in dict.fromkeys(entry[0] for entry in self._taken):
            entries = [entry for entry in self._taken if entry[0] == name]
            _, last, given, named, _ = entries[-1]
            if named.get("batch_size") is not None:
                named = {**named, "batch_size": sum(entry[3]["batch_size"] for entry in entries)}
            single = all(isinstance(entry[1], (Tensor, float, int)) for entry in entries)
            value = self._joined([(float(entry[1]), entry[4]) for entry in entries], named.get("reduce_fx")) if single else last
            self.module.log(name, value, *given, **named)

    def _joined(self, values: list[tuple[float, float]], reduce: Any) -> float:
        """One value of those of parts, each with its share."""
        numbers, how = [value for value, _ in values], getattr(reduce, "__name__", reduce)
        if how in ("max", "min"):
            return max(numbers) if how == "max" else min(numbers)
        if how == "sum":
            return math.fsum(numbers)
        is_loss = len(numbers) == len(self.losses) and all(
            loss is not None and math.isclose(number, float(loss), rel_tol=1e-6)
            for number, loss in zip(numbers, self.losses, strict=True)
        )
        whole = math.fsum(share * value for value, share in values if share)
        return whole if is_loss else whole / math.fsum(share for _, share in values)


def _copied(state: Any) -> Any:
    return state.clone() if isinstance(state, Tensor) else list(state)
