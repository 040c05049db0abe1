"""Trying a job on two rows: does it build, run forward and backward, and fit its loss, labels and metric?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from delest import errors, metrics
from delest.backends.torch.model import where
from delest.backends.torch.session import TorchSession
from delest.job import Job
from delest.records.batch import Batch
from delest.records.plan import Plan
from delest.records.source import Schema


def check(job: Job, schema: Schema, batch: Batch, more: Batch) -> list[str]:
    """Every fault that two rows show; `more` rows tell whether outputs are logits or already probabilities."""
    try:
        session = TorchSession(job, Plan(batch_size=job.batch_size, micro_batch=job.batch_size), schema)
    except errors.BadInput as error:
        return list(error.faults)
    tensors = session.tensors(batch)
    faults = _check_forward(session, tensors) if job.step is None or job.predict is not None else []
    return faults or _check_backward(session, tensors) or _check_ending(session, more) or _check_evaluation(session, batch)


def _check_forward(session: TorchSession, batch: Batch) -> list[str]:
    try:
        outputs = session.forward(batch.inputs)
    except Exception as error:
        return [f"the model's forward failed on {_words(batch.inputs)}: {where(error)}"]
    if session.job.step is not None:
        return []
    return _check_outputs(session, outputs, batch)


def _check_outputs(session: TorchSession, outputs: Any, batch: Batch) -> list[str]:
    schema, name = session.schema, session.loss.name
    if not isinstance(outputs, torch.Tensor):
        return [
            f"the model gives a {type(outputs).__name__}, and the loss {name} needs one tensor: give the Job a `step` or a `predict`."
        ]
    if len(outputs) != batch.count:
        return [f"the model gives {len(outputs)} rows for a batch of {batch.count}: its first dimension must be the batch."]
    faults = []
    if schema.is_text:
        wanted = (batch.count, *schema.input_shape, schema.outputs)
        if tuple(outputs.shape) != wanted:
            faults.append(
                f"the model gives outputs of shape {tuple(outputs.shape)} for a text, and the loss needs a score for each of the {schema.outputs:,} tokens "
                f"of the vocabulary at each place: {wanted}."
            )
    elif name == "cross_entropy" and schema.classes is not None:
        width = outputs.shape[1] if outputs.ndim > 1 else 1
        needed = len(schema.classes)
        if width < needed and not (width == 1 and needed == 2):
            faults.append(
                f"the model gives {width} value{'s' * (width != 1)} a row and the data have {needed} classes: labels "
                f"{width} to {needed - 1} are out of range. Its last layer must have {needed} outputs."
            )
    elif name in ("mse", "l1", "huber") and outputs.numel() != batch.count:
        faults.append(
            f"the model gives outputs of shape {tuple(outputs.shape)}, and the loss {name} needs one value a row: [B] or [B, 1]."
        )
    if not faults and not torch.isfinite(outputs).all():
        faults.append("the model's outputs are not finite on the first two rows: look at its initial weights.")
    if not faults:
        faults += _check_metric(session, outputs.detach().float().numpy(), batch)
    return faults


def _check_metric(session: TorchSession, outputs: Any, batch: Batch) -> list[str]:
    kind = session.schema.target.kind if session.schema.target else None
    metric = metrics.chosen(session.job.metric, kind)
    if batch.targets is None or (metric.rows is None and len(np.unique(outputs)) < 2):
        return []
    try:
        metric.compute(metric.update(metric.init(), outputs, np.asarray(batch.targets)))
    except Exception as error:
        return [f"the metric {metric.name} fails on outputs of shape {outputs.shape}: {where(error)}"]
    return []


def _check_backward(session: TorchSession, batch: Batch) -> list[str]:
    job = session.job
    what = "step" if job.step is not None else f"loss {session.loss.name}"
    try:
        loss = session.batch_loss(batch)
    except Exception as error:
        return [f"the {what} failed on {_words(batch.inputs)}: {where(error)}"]
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
        return [f"the {what} gives {shape}; it must give one number, the mean over the batch."]
    value = float(loss.detach())
    if not math.isfinite(value):
        return [f"the {what} is {value} on the first two rows: look at the data's range and the model's initial weights."]
    if not any(parameter.requires_grad for parameter in session.model.parameters()):
        return ["the model has no parameter to train: all are frozen, or it has none."]
    try:
        loss.backward()
    except Exception as error:
        return [f"the backward pass failed: {where(error)}"]
    if all(parameter.grad is None for parameter in session.model.parameters()):
        return [f"the {what} does not depend on any trainable parameter: no gradient arrived."]
    return []


def _check_ending(session: TorchSession, batch: Batch) -> list[str]:
    """Probabilities where logits are expected: the loss would squash them again, and the metric's threshold is at 0."""
    job, kind = session.job, session.schema.target.kind if session.schema.target else None
    if job.step is not None or kind != "class" or batch.count < 16:
        return []
    outputs = session.predict(batch.inputs)
    if outputs.ndim < 2 or outputs.shape[1] == 1:
        if outputs.min() >= 0 and outputs.max() <= 1 and (np.ptp(outputs) > 0 or _last_is(session, torch.nn.Sigmoid)):
            remedy = (
                "leave the sigmoid out (delest's loss and its bundle add it)"
                if isinstance(job.loss, str)
                else ("leave the sigmoid out and use binary_cross_entropy_with_logits, or give a `predict` with two columns")
            )
            return [f"the model's single output is a probability, and a logit is needed: {remedy}."]
    elif isinstance(job.loss, str) and outputs.ndim == 2 and outputs.min() >= 0 and np.allclose(outputs.sum(1), 1, atol=1e-4):
        return [
            "the model's outputs are probabilities, and cross_entropy needs logits or log-probabilities: leave the softmax out."
        ]
    return []


def _last_is(session: TorchSession, kind: type[torch.nn.Module]) -> bool:
    return isinstance(list(session.model.modules())[-1], kind)


def _check_evaluation(session: TorchSession, batch: Batch) -> list[str]:
    """One evaluation as after an epoch, on two rows: a detector answers otherwise in that mode."""
    kind = session.schema.target.kind if session.schema.target else None
    metric = metrics.chosen(session.job.metric, kind, session.job.step is None or session.job.predict is not None)
    try:
        for judged in session.outputs(Single(batch)):
            if session.job.step is not None and judged.outputs is not None:
                metric.update(metric.init(), judged.outputs, judged.targets)
    except Exception as error:
        return [f"evaluation failed on {_words(batch.inputs)}: {where(error)}"]
    return []


class Single:
    """A feed of one batch."""

    def __init__(self, batch: Batch):
        self.batch = batch

    def ordered(self) -> Iterator[Batch]:
        return iter([self.batch])


def _words(inputs: Any) -> str:
    """Shapes and types of inputs in words."""
    if isinstance(inputs, dict):
        return ", ".join(f"{name}={_words(value)}" for name, value in inputs.items())
    if isinstance(inputs, tuple):
        return ", ".join(_words(value) for value in inputs)
    return (
        f"{str(inputs.dtype).removeprefix('torch.')} {list(inputs.shape)}"
        if isinstance(inputs, torch.Tensor)
        else type(inputs).__name__
    )
