"""Training with a teacher: a session whose loss is also how far its answers are from those of a trained network."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from delest.backends.torch import model as models
from delest.backends.torch.session import TorchSession
from delest.job import Job
from delest.records.batch import Batch
from delest.records.plan import Plan
from delest.records.source import Schema

HARD = 0.1  # share of the job's own loss for classes; the rest is the teacher's
HARD_NUMBERS, HARD_GRIDS = 0.5, 0.8  # of a grid's channels the job's own step knows better which of them matter (docs/log.md)
OBJECTIVE = "standardised"
TEMPERATURES = {"standardised": 2.0, "plain": 4.0, "decoupled": 4.0}  # those of the papers
BETA = 8.0  # weight of the other classes in decoupled distillation, as in the paper
CACHE_BYTES = 512 << 20


class Teacher:
    """The answers of a trained session, kept by row where data are not augmented."""

    def __init__(self, session: TorchSession, *, rows: int, keep: bool):
        """`rows`: one more than the largest row number; with `keep` each row is answered once, as long as all answers fit 512 MiB."""
        self.session, self._rows, self._keep = session, rows, keep
        self._answers: Tensor | None = None
        self._known = torch.zeros(rows, dtype=torch.bool)

    def answer_all(self, feed: Any) -> None:
        """Answer the rows of a feed now, where they are asked for and kept: always in batches of the same rows, since rounding may depend on them, and a
        run that goes on must learn from the same bits."""
        for batch in feed.ordered() if self._keep else ():
            given = self.session.tensors(batch)
            if mixable(given.inputs, self.session):  # the teacher is asked about mixtures
                break
            self.answer(given)
            if self._answers is None:  # nothing that could be kept
                break

    def answer(self, batch: Batch) -> Tensor | None:
        """Outputs for a batch of tensors, without gradient; None where they are no single tensor."""
        index = torch.as_tensor(batch.index)
        if self._answers is not None and bool(self._known[index].all()):
            return self._answers[index]
        outputs = self.answer_anew(batch.inputs)
        if outputs is not None and self._keep and self._rows * outputs[0].numel() * 4 <= CACHE_BYTES:
            if self._answers is None:
                self._answers = torch.empty(self._rows, *outputs.shape[1:])
            self._answers[index], self._known[index] = outputs, True
        return outputs

    def answer_anew(self, inputs: Any) -> Tensor | None:
        """Outputs for inputs that are no rows of the data; nothing is kept."""
        with self.session._evaluating():
            outputs = self.session.forward(inputs)
        return outputs.float().clone() if isinstance(outputs, Tensor) else None


@dataclass(frozen=True)
class Mixture:
    """Each row of a batch mixed with another one of it."""

    inputs: Tensor  # [B, ...]
    shares: Tensor  # [B], of the row itself; the rest is the other's
    others: Tensor  # int64 [B]

    @classmethod
    def draw(cls, inputs: Tensor) -> Mixture:
        """Shares are uniform (Zhang et al., "mixup", ICLR 2018, with alpha 1)."""
        shares, others = torch.rand(len(inputs)), torch.randperm(len(inputs))
        shares, others = shares.to(inputs.device), others.to(inputs.device)
        wide = shares.view(-1, *[1] * (inputs.ndim - 1)).to(inputs.dtype)
        return cls(wide * inputs + (1 - wide) * inputs[others], shares, others)

    def loss(self, rows: Callable[[Any, Any], Tensor], outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean over rows of the loss for both targets, each by its share."""
        return (self.shares * rows(outputs, targets) + (1 - self.shares) * rows(outputs, targets[self.others])).mean()

    def targets(self, targets: Tensor) -> Tensor:
        """Those of the larger share."""
        return torch.where((self.shares >= 0.5).view(-1, *[1] * (targets.ndim - 1)), targets, targets[self.others])


def learns_classes(session: TorchSession) -> bool:
    return session.job.step is None and session.loss.name in ("cross_entropy", "bce")


def mixable(inputs: Any, session: TorchSession) -> TypeGuard[Tensor]:
    """Whether rows of a batch can be mixed: inputs are one tensor of floats, targets classes."""
    return learns_classes(session) and isinstance(inputs, Tensor) and inputs.is_floating_point()


class StudentSession(TorchSession):
    """A session that learns from targets and from a teacher."""

    def __init__(
        self, job: Job, plan: Plan, schema: Schema, teacher: Teacher, objective: str = OBJECTIVE, *, mixing: bool = True
    ):
        """`objective`, for classes: "standardised" (z-scored logits), "plain" or "decoupled".

        With `mixing` the teacher is asked about mixtures of rows in their place, where inputs are one tensor of floats and targets classes: of them there
        are as many as one likes, and it has learnt none by heart. Dropout is off: a teacher's answers are not overfitted.
        """
        super().__init__(job, plan, schema)
        self.teacher, self.objective, self.mixing = teacher, objective, mixing
        for module in self.model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0

    def batch_loss(self, batch: Batch) -> Tensor:
        if self.mixing and mixable(batch.inputs, self):
            return self._mixed_loss(batch.inputs, torch.as_tensor(batch.targets))
        answer = self.teacher.answer(batch)
        with self._precision():
            if self.job.step is None:
                outputs = models.call(self.model, batch.inputs)
                own = self.loss.mean(outputs, batch.targets)
            elif answer is None or self.job.predict is None:
                return self.job.step(self.model, batch)
            else:
                with _one_forward(self.model):
                    own = self.job.step(self.model, batch)
                    outputs = self.job.predict(self.model, batch.inputs)
        if answer is None or not isinstance(outputs, Tensor) or not outputs.requires_grad or outputs.shape != answer.shape:
            return own
        if self.schema.is_text:
            return HARD * own + (1 - HARD) * of_tokens(outputs.float(), answer)
        if learns_classes(self):
            return HARD * own + (1 - HARD) * of_classes(outputs.float(), answer, torch.as_tensor(batch.targets), self.objective)
        hard = HARD_NUMBERS if outputs.ndim < 3 else HARD_GRIDS
        return hard * own + (1 - hard) * of_numbers(outputs.float(), answer) * own.detach()

    def _mixed_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        mixture = Mixture.draw(inputs)
        answer = self.teacher.answer_anew(mixture.inputs)
        with self._precision():
            outputs = models.call(self.model, mixture.inputs)
            own = mixture.loss(self.loss.rows, outputs, targets)
        if answer is None or outputs.shape != answer.shape:
            return own
        return HARD * own + (1 - HARD) * of_classes(outputs.float(), answer, mixture.targets(targets), self.objective)


@contextlib.contextmanager
def _one_forward(model: nn.Module) -> Iterator[None]:
    """A job's `step` and `predict` mostly call the model alike: the second call is given what the first gave, unless that was changed in place."""
    own, forward = model.__dict__.get("forward"), model.forward
    given: tuple[Any, ...] | None = None
    outputs: Any = None
    version = 0

    def once(*inputs: Any, **named: Any) -> Any:
        nonlocal given, outputs, version
        called = (*inputs, *named, *named.values())
        alike = given is not None and len(called) == len(given) and all(map(operator.is_, called, given))
        if alike and getattr(outputs, "_version", 0) == version:
            return outputs
        given, outputs = called, forward(*inputs, **named)
        version = getattr(outputs, "_version", 0)
        return outputs

    model.forward = once
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def of_classes(outputs: Tensor, answer: Tensor, targets: Tensor, objective: str) -> Tensor:
    """Distance of class scores, [B, K, ...] both or one score a row."""
    if outputs.ndim == 1 or outputs.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(outputs, answer.sigmoid())
    if outputs.shape[1] == 2:  # z-scores of two are always the same: only their difference says anything
        return F.binary_cross_entropy_with_logits(outputs[:, 1] - outputs[:, 0], (answer[:, 1] - answer[:, 0]).sigmoid())
    return OBJECTIVES[objective](outputs, answer, targets)


def of_tokens(outputs: Tensor, answer: Tensor) -> Tensor:
    """Distance of scores of tokens, [B, T, V] both: the divergence of the probabilities themselves, not softened, since these are what a text
    is judged by (Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation", NeurIPS 2024, section 3.2)."""
    return _divergence(outputs.flatten(0, 1), answer.flatten(0, 1), 1.0)


def of_numbers(outputs: Tensor, answer: Tensor) -> Tensor:
    """Mean squared distance in units of the teacher's own variance; of grids [B, C, ...] (a detector's objectness, box and classes) that of
    each channel, since they have different units."""
    if outputs.ndim < 3:
        return F.mse_loss(outputs, answer) / answer.var(correction=0).clamp_min(1e-12)
    others = [d for d in range(answer.ndim) if d != 1]
    return (((outputs - answer) ** 2).mean(others) / answer.var(others, correction=0).clamp_min(1e-12)).mean()


def _divergence(outputs: Tensor, answer: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of softened classes, times the squared temperature so that gradients keep their size (Hinton et al., 2015)."""
    ours, theirs = (outputs / temperature).log_softmax(1), (answer / temperature).log_softmax(1)
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1).mean() * temperature**2


def plain(outputs: Tensor, answer: Tensor, targets: Tensor) -> Tensor:
    """Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015."""
    return _divergence(outputs, answer, TEMPERATURES["plain"])


def standardised(outputs: Tensor, answer: Tensor, targets: Tensor) -> Tensor:
    """Z-scored logits: a student need not match the range of its teacher's scores, only their relations (Sun et al., "Logit Standardization in
    Knowledge Distillation", CVPR 2024)."""

    def scaled(logits: Tensor) -> Tensor:
        return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-7)

    return _divergence(scaled(outputs), scaled(answer), TEMPERATURES["standardised"])


def decoupled(outputs: Tensor, answer: Tensor, targets: Tensor) -> Tensor:
    """The target class against all others, and apart from it the others among themselves (Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022)."""
    temperature = TEMPERATURES["decoupled"]
    true = F.one_hot(targets, outputs.shape[1]).movedim(-1, 1).bool()

    def binary(logits: Tensor) -> Tensor:
        share = (logits / temperature).softmax(1)
        own = (share * true).sum(1)
        return torch.stack([own, 1 - own], 1).clamp_min(1e-8).log()

    target = F.kl_div(binary(outputs), binary(answer), reduction="none", log_target=True).sum(1).mean() * temperature**2
    others = _divergence(outputs.masked_fill(true, -1e4), answer.masked_fill(true, -1e4), temperature)
    return target + BETA * others


OBJECTIVES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "standardised": standardised,
    "plain": plain,
    "decoupled": decoupled,
}
