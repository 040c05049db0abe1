"""Training a Keras network with a teacher, as torch jobs do it: z-scored answers for classes, of mixtures of rows where rows can be mixed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import keras
import numpy as np
from keras import ops

from delest.frameworks.keras import engines
from delest.frameworks.keras.optimizers import layers_of
from delest.frameworks.keras.session import KerasSession
from delest.job import Job
from delest.records.batch import Batch, Step
from delest.records.plan import Plan
from delest.records.source import Schema

HARD, HARD_NUMBERS = (
    0.1,
    0.5,
)  # share of the job's own loss; backends/torch/distillation.py has the sources and what was measured
TEMPERATURE = 2.0


class StudentSession(KerasSession):
    """A session that learns from targets and from a trained session's answers. Dropout is off: a teacher's answers are not overfitted."""

    def __init__(self, job: Job, plan: Plan, schema: Schema, teacher: KerasSession):
        super().__init__(job, plan, schema)
        self.teacher = teacher
        target = schema.target
        self._classes = isinstance(job.loss, str) and target is not None and target.kind == "class"
        self.engine = engines.choose(self.model, self.optimizer, self._taught, job.recipe.clip)
        for layer in layers_of(self.model):
            if isinstance(layer, keras.layers.Dropout):
                layer.rate = 0.0

    def step(self, batch: Batch, rate: float) -> Step:
        """One step; mixtures follow from the rows' numbers and the epoch, so that a run that goes on draws the same ones."""
        inputs: Any = batch.inputs
        targets: Any = batch.targets
        known = {"targets": targets}
        if self._classes and isinstance(inputs, np.ndarray) and inputs.dtype.kind == "f":
            random = np.random.default_rng((self.job.seed, batch.epoch, *(int(row) for row in batch.index[:4])))
            shares, others = random.random(batch.count, np.float32), random.permutation(batch.count)
            wide = shares.reshape(-1, *[1] * (inputs.ndim - 1))
            inputs = wide * inputs + (1 - wide) * inputs[others]
            known |= {"shares": shares, "others": targets[others]}
        answer = self.teacher.predict(inputs)
        if isinstance(answer, np.ndarray):
            known["answer"] = answer
        taught: Any = known  # where arrays are expected; the session divides and hands them on
        return super().step(replace(batch, inputs=inputs, targets=taught), rate)

    def _taught(self, outputs: Any, known: Any) -> Any:
        """The loss of a part: the job's own, and how far the answers are from the teacher's."""
        if not isinstance(known, dict) or "targets" not in known:  # gradients for the pruner
            return self.loss.mean(outputs, known)
        targets, answer = known["targets"], known.get("answer")
        if "shares" in known:
            rows = self.loss.rows
            own = ops.mean(known["shares"] * rows(outputs, targets) + (1 - known["shares"]) * rows(outputs, known["others"]))
        else:
            own = self.loss.mean(outputs, targets)
        if answer is None or not hasattr(outputs, "shape") or tuple(outputs.shape[1:]) != tuple(answer.shape[1:]):
            return own
        outputs, answer = ops.cast(outputs, "float32"), ops.cast(answer, "float32")
        if self._classes:
            return HARD * own + (1 - HARD) * _of_classes(outputs, answer)
        if self.schema.is_text:
            return HARD * own + (1 - HARD) * _divergence(outputs, answer, 1.0)
        spread = ops.maximum(ops.var(answer), 1e-12)
        return HARD_NUMBERS * own + (1 - HARD_NUMBERS) * ops.mean(ops.square(outputs - answer)) / spread * ops.stop_gradient(
            own
        )


def _of_classes(outputs: Any, answer: Any) -> Any:
    """Distance of scores [B, K], z-scored; of one or two classes that of the probabilities."""
    if len(outputs.shape) == 1 or outputs.shape[1] == 1:
        return _binary(outputs, answer)
    if outputs.shape[1] == 2:  # z-scores of two are always the same
        return _binary(outputs[:, 1] - outputs[:, 0], answer[:, 1] - answer[:, 0])
    return _divergence(_scaled(outputs), _scaled(answer), TEMPERATURE)


def _binary(outputs: Any, answer: Any) -> Any:
    return ops.mean(ops.softplus(outputs) - outputs * ops.sigmoid(answer))


def _scaled(logits: Any) -> Any:
    count = logits.shape[1]
    spread = ops.sqrt(ops.var(logits, axis=1, keepdims=True) * (count / (count - 1)))
    return (logits - ops.mean(logits, axis=1, keepdims=True)) / (spread + 1e-7)


def _divergence(outputs: Any, answer: Any, temperature: float) -> Any:
    ours, theirs = ops.log_softmax(outputs / temperature, axis=-1), ops.log_softmax(answer / temperature, axis=-1)
    return ops.mean(ops.sum(ops.exp(theirs) * (theirs - ours), axis=-1)) * temperature**2
