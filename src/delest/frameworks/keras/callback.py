"""delest in Keras's own loop: `model.fit(..., callbacks=[DelestCallback("2GiB")])`.

Callbacks of Keras are told of events and may not act on steps (https://keras.io/api/callbacks/base_callback/), so this one puts steps of its own in place of the
model's `train_function` and `test_function` while it trains.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from pathlib import Path
from typing import Any

import keras

from delest import errors
from delest.frameworks import wishes
from delest.frameworks.keras import KerasBackend
from delest.frameworks.keras.fitting import FitSteps, batch_of, check_budget, faults_in_fit, iterator_of_fit, rate_of
from delest.frameworks.record import Record
from delest.records.plan import Plan
from delest.training.freed import Freed
from delest.training.guard import Guard


class DelestCallback(keras.callbacks.Callback):
    """Follows a plan, holds a budget of memory, stops early and keeps a run folder with a report, in a training by `model.fit`.

    `memory` bounds the resident set ("2GiB", bytes, "80%"; None: the plan's, or nothing is guarded): a batch whose step does not fit is made again in
    smaller parts, with the same gradients, effective batch and number of steps. `plan` is a `Plan` or the path of a plan.json (its `micro_batch` and `precision`), `out` the run folder
    (None: the next runs/NAME-001). After `patience` evaluations without a better `monitor` (None: the loss), where `mode` is "min" or "max" (None: by
    its name), training stops. Where `fit` ends by an error the model gets its own steps back, and the run is written as failed, once the error is let go. Raises `BadInput` with all faults, also when training begins in which it cannot act; `NothingFits` where no smaller parts are left.
    """

    def __init__(
        self,
        memory: str | int | None = None,
        plan: Plan | str | Path | None = None,
        *,
        out: str | Path | None = None,
        monitor: str | None = None,
        mode: str | None = None,
        patience: int | None = None,
    ):
        super().__init__()
        self.wishes = wishes.read(memory, plan, out=out, monitor=monitor, mode=mode, patience=patience)
        self.record: Record | None = None
        self._open = contextlib.ExitStack()
        self._epoch = self._seen = 0

    def on_train_begin(self, logs: Any = None) -> None:
        model, given = self.model, self.wishes
        if given.acts and (faults := faults_in_fit(model, given.followed)):
            raise errors.BadInput(faults)
        check_budget(given.budget_bytes)
        iterator = iterator_of_fit()
        self._rows = int(getattr(getattr(iterator, "data_adapter", None), "batch_size", None) or 0)
        job = {"name": model.name, "loop": f"Keras {keras.__version__}", "optimizer": model.optimizer.name, "origin": None}
        self.record = Record(given.out, job, given.followed, 1, KerasBackend().versions())
        if iterator is not None:  # which ends with the fit: callbacks are not told of errors
            self._open.callback(weakref.finalize(iterator, self.close, RuntimeError("fit did not come to its end")).detach)
        if given.acts:
            self._take_over(self.record)
        else:
            self._freed = self._open.enter_context(contextlib.closing(Freed.of_machine()))

    def _take_over(self, record: Record) -> None:
        """Put our steps in place of the model's own, until training ends."""
        model = self.model
        self.steps = self._open.enter_context(contextlib.closing(FitSteps(model, self.wishes.plan)))
        self.guard = Guard(self.steps, 1, record.note, option="memory=")
        before = {name: getattr(model, name) for name in ("train_function", "test_function")}
        make_test_function = model.make_test_function

        def train_function(given: Any) -> Any:
            return self._attempt(batch_of(given), lambda batch: self.steps.step(batch))

        def test_function(given: Any) -> Any:
            return self._attempt(batch_of(given), lambda batch: self.steps.evaluate(batch, self._whole_test), evaluating=True)

        def make_tests(force: bool = False) -> None:
            if model.test_function is not test_function:
                make_test_function(force)
                self._test, model.test_function = model.test_function, test_function

        def make_training(force: bool = False) -> None:
            self.close(RuntimeError("another fit begins, and this one has not come to its end"))
            model.make_train_function(force)

        model.train_function, model.make_test_function, model.make_train_function = train_function, make_tests, make_training

        def back() -> None:
            for name in ("make_test_function", "make_train_function"):
                object.__delattr__(model, name)
            for name, function in before.items():
                setattr(model, name, function)

        self._open.callback(back)
        self._open.enter_context(self.guard.watching(self.wishes.budget_bytes))

    def _whole_test(self, part: Any) -> Any:
        return self._test(iter([part]) if keras.backend.backend() == "tensorflow" else [part])

    def _attempt(self, batch: Any, work: Any, *, evaluating: bool = False) -> Any:
        """Work on a batch, in as many parts as fit. An error, of which callbacks are not told, ends the run."""
        assert self.record is not None
        before, rows, record = self.steps.parts, self.steps.see(batch), self.record
        self._rows, self.guard.batch_size = max(self._rows, rows), self.steps.batch_rows
        if self.steps.parts > before:  # as planned
            self.guard.keep_parts()
        try:
            return self.guard.attempt(lambda: work(batch), record.decisions, record.position, rows=rows, evaluating=evaluating)
        except BaseException as error:
            self.close(error)
            raise

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.record is not None:
            if not self.wishes.acts:
                self._freed.stepped()
            self._seen += 1
            steps = self.params.get("steps") or math.inf
            self.record.stepped(
                self._seen, self._epoch + (batch + 1) / steps, (logs or {}).get("loss"), lambda: rate_of(self.model), self._rows
            )

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        values = {name: value for name, value in (logs or {}).items() if name.startswith("val_")}
        if self.wishes.patience is not None and not values:
            raise errors.BadInput("patience counts evaluations: give fit validation_data= or validation_split=.")
        if self.record is not None and values:
            self.model.stop_training |= self.record.evaluated(
                values, self.wishes.monitor, self.wishes.mode, self.wishes.patience
            )

    def on_train_end(self, logs: Any = None) -> None:
        self.close()

    def close(self, error: BaseException | None = None) -> None:
        """Lift the limit, give the model its own steps back and write the record; once. `error` is what ended the training, if one did."""
        record, self.record = self.record, None
        if record is None:
            return
        self._open.close()
        rows, parts = max(1, self._rows), self.steps.parts if self.wishes.acts else 1
        record.finish(rows, math.ceil(rows / parts), self.model.count_params(), error)
