"""Steps of `model.fit` that can be made in parts, with Keras's own loss, metrics and optimizer: on TensorFlow and torch."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from delest import errors
from delest.frameworks.keras import engines
from delest.frameworks.keras.layers import changing
from delest.frameworks.keras.optimizers import layers_of
from delest.hardware import machine
from delest.records.plan import Plan
from delest.training.limit import too_small
from delest.units import format_bytes

METHODS = ("precision", "micro_batch")  # of a plan, that a `fit` under way can follow


class FitSteps:
    """What the memory guard takes for its session. Of a plan it follows `micro_batch`, the largest part, and `precision`, in which layers compute in training."""

    def __init__(self, model: keras.Model, plan: Plan | None = None):
        self.model, self.parts, self.batch_rows = model, 1, 1
        self._rows = None if plan is None else plan.micro_batch
        self.batch_bytes = 0
        self.sized, self.scatters = not engines.survives_failed_allocation(), engines.scatters_freed_blocks()
        normalised = any(isinstance(layer, keras.layers.BatchNormalization) for layer in layers_of(model))
        self.least_rows = 2 if normalised else 1
        bf16 = plan is not None and plan.config("precision") is not None
        self._engine = engines.choose(model, model.optimizer, self._judged, None, bf16=bf16)
        self._results: Callable[[], Any] = engines.compiled(model.get_metrics_result)

    @property
    def most_parts(self) -> int:
        """As many parts as a batch can be split into, each with as many rows as the model needs."""
        return max(1, self.batch_rows // self.least_rows)

    def warm(self) -> None:
        """Start the threads of parallel operators."""
        keras.ops.exp(keras.ops.ones((1 << 18,)))

    def close(self) -> None:
        """Let go of what is kept between steps."""
        del self._engine, self._results

    def see(self, data: Any) -> int:
        """Take note of a batch's rows before it is stepped."""
        rows = _rows_of(data)
        if rows > self.batch_rows:
            self.batch_rows = rows
            self.batch_bytes = sum(_bytes_of(one) for one in keras.tree.flatten(data) if one is not None)
            if self._rows is not None:
                self.parts = max(self.parts, math.ceil(rows / self._rows))
        return rows

    def step(self, data: Any) -> Any:
        """One step on a batch; gives the metrics so far. On failure weights, statistics and metrics are as before, but for an update that fails
        for want of memory: `OutOfMemory.begun` says so."""
        rows, phase, back = self.see(data), "forward", self._remember(changing(self.model))
        try:
            count = self._count(rows)
            _, gradients = self._engine.gradient((self._unpacked(part, rows) for part in self._divided(data, rows)), count)
            phase = "optimizer"
            self._engine.update(gradients)
            return self._results()
        except Exception as error:
            back()
            raise _translated(error, phase) from error

    def evaluate(self, data: Any, whole: Callable[[Any], Any]) -> Any:
        """What Keras's own `whole` step of an evaluation gives once it had all parts of a batch. On failure metrics are as before."""
        back, found = self._remember([]), None
        try:
            for part in self._divided(data, self.see(data)):
                found = whole(part)
            return found
        except Exception as error:
            back()
            raise _translated(error, "evaluation") from error

    def _judged(self, outputs: Any, judged: Any) -> Any:
        """The loss of a part, of which Keras's trackers are told as in its own step."""
        targets, weights, model = judged["targets"], judged["weights"], self.model
        loss = model._compile_loss(targets, outputs, weights)
        rows = keras.ops.shape(keras.tree.flatten(outputs)[0])[0]
        model._loss_tracker.update_state(engines.penalised(loss, model.losses), sample_weight=rows)
        model.compute_metrics(None, targets, outputs, weights)
        return loss

    def _unpacked(self, part: Any, rows: int) -> engines.Part:
        inputs, targets, weights = keras.utils.unpack_x_y_sample_weight(part)
        return inputs, {"targets": targets, "weights": weights}, _rows_of(part) / rows

    def _count(self, rows: int) -> int:
        """Parts of a batch of so many rows, none larger than those of the largest batch."""
        return min(math.ceil(rows / math.ceil(self.batch_rows / self.parts)), max(1, rows // self.least_rows))

    def _divided(self, data: Any, rows: int) -> Iterator[Any]:
        """A batch in nearly equal parts."""
        if (count := self._count(rows)) == 1:
            yield keras.tree.map_structure(_tensor, data)
            return
        for part in np.array_split(np.arange(rows), count):
            taken = slice(int(part[0]), int(part[-1]) + 1)
            yield keras.tree.map_structure(lambda one, taken=taken: None if one is None else _tensor(one[taken]), data)

    def _remember(self, changing: Any) -> Callable[[], None]:
        variables = [*changing, *self.model.metrics_variables]
        values = [keras.ops.copy(variable.value) for variable in variables]

        def back() -> None:
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)

        return back


def check_budget(budget_bytes: int | None) -> None:
    """Raise `NothingFits` for a budget that is less than what is resident before the training."""
    resident = machine.resident_bytes()
    if budget_bytes is not None and resident > budget_bytes:
        why = f"before training {format_bytes(resident)} are resident already"
        raise too_small(budget_bytes, resident, why, "", "memory=")


def faults_in_fit(model: keras.Model, plan: Plan) -> list[str]:
    """What of a compiled model, or of a plan, keeps steps from being made in parts, in words."""
    others = [one.method for one in plan.choices if one.method not in METHODS]
    found = (
        [f"the plan's {', '.join(others)} cannot be applied in model.fit, which takes {' and '.join(METHODS)} alone."]
        if others
        else []
    )
    if keras.backend.backend() == "jax":
        found.append(
            "memory= and plan= act in model.fit on TensorFlow and torch; on JAX its steps cannot be made in parts. Leave both out, which keeps "
            "the run folder and early stopping, or train the model by delest.train, which holds budgets on all three."
        )
    own = [name for name in ("train_step", "compute_loss", "compute_metrics") if not _is_keras_own(model, name)]
    if own:
        found.append(
            f"this model has a {' and a '.join(own)} of its own, which cannot be made in parts: leave memory= and plan= out."
        )
    if model._compile_loss is None:
        found.append("the model was compiled without a loss, so that its steps cannot be made in parts.")
    for loss in keras.tree.flatten(model.loss):
        if getattr(loss, "reduction", "sum_over_batch_size") not in ("sum_over_batch_size", "mean"):
            found.append(
                f"the loss {loss.name} has reduction={loss.reduction!r}; parts add up for sum_over_batch_size: use that."
            )
    if isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer):
        found.append("the policy mixed_float16 scales losses, which parts do not: use mixed_bfloat16.")
    elif model.optimizer.loss_scale_factor is not None:
        found.append("the optimizer's loss_scale_factor scales losses, which parts do not: leave it out.")
    if model.steps_per_execution != 1:
        found.append(f"steps_per_execution is {model.steps_per_execution}: with memory= or plan= compile with 1.")
    return found


def batch_of(given: Any) -> Any:
    """What Keras's loop hands over for a step: an iterator on TensorFlow, a list of one batch on torch."""
    return given[0] if isinstance(given, (list, tuple)) else next(given)


def rate_of(model: keras.Model) -> float:
    """The learning rate of its next step."""
    return float(keras.ops.convert_to_numpy(model.optimizer.learning_rate))


def iterator_of_fit() -> Any:
    """What gives the `fit` in which we are called its batches; None where it is not known."""
    frame = sys._getframe(1)
    while frame is not None:
        if (found := frame.f_locals.get("epoch_iterator")) is not None:
            return found
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _is_keras_own(model: keras.Model, name: str) -> bool:
    return getattr(type(model), name) is getattr(keras.Model, name)


def _translated(error: Exception, phase: str) -> Exception:
    if not engines.is_out_of_memory(error):
        return error
    return errors.OutOfMemory(phase, str(error).partition("\n")[0], phase == "optimizer")


def _tensor(value: Any) -> Any:
    return None if value is None else keras.ops.convert_to_tensor(value)


def _bytes_of(tensor: Any) -> int:
    """0 for strings, and for rows of different lengths."""
    name = keras.backend.standardize_dtype(tensor.dtype)
    return 0 if name == "string" or None in tensor.shape else math.prod(tensor.shape) * np.dtype(name).itemsize


def _rows_of(data: Any) -> int:
    return int(next(one for one in keras.tree.flatten(data) if one is not None).shape[0])
