"""A plan applied to somebody's own model and optimizer, for a training loop of their own."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from delest import errors, methods as techniques
from delest.backends.torch import methods, parts, rollback
from delest.backends.torch.addition import Addition, judging
from delest.backends.torch.methods.optimizer_in_backward import Updates
from delest.backends.torch.model import call, fingerprint
from delest.methods.optimizer_in_backward import ELEMENTWISE
from delest.records.plan import Plan


class Applied:
    """What `delest.apply` gives: the model and optimizer to train with, and the step that the plan describes.

    `model` is the given one, changed in place; `optimizer` the given one, or a new one where a method needs another class, with
    its groups, settings and state. `changes` are lines of what was changed, and of what only acts on a new process.
    """

    def __init__(
        self,
        plan: Plan,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[..., Tensor] | None,
        settings: techniques.Configs | None = None,
    ):
        """`settings` are what the loop does that methods may exclude, in the form of choices (`methods.conflicts`)."""
        self.model, self.loss = model, _checked(loss)
        self.optimizers = [optimizer]
        self.memory_format: torch.memory_format | None = None
        self.autocast: torch.dtype | None = None
        self.updates: Updates | None = None
        self.rows: int | None = None  # of a micro-batch, None: all of a batch
        self.least_rows = 2 if _normalises(model) else 1
        self._check(plan, optimizer, settings or {})
        methods.apply_stages(plan, self, methods.BEFORE_OPTIMIZER)
        methods.apply_stages(plan, self, methods.AFTER_OPTIMIZER)
        (self.optimizer,) = self.optimizers
        _lay_out(self.optimizer)
        if plan.threads:
            torch.set_num_threads(plan.threads)
        self.changes = _changes(plan, optimizer, self.optimizer)
        self.share = parts.of_loss(loss)
        self._addition = None if parts.settings_of(loss)["known"] else Addition(parts.ignoring(model))
        if self.rows is not None:
            for said in self.doubts():
                warnings.warn(said, errors.DelestWarning, stacklevel=3)

    def doubts(self) -> list[str]:
        """Why results may change where batches are made in parts, in words."""
        settings, remedy = parts.settings_of(self.loss), "plan with a larger budget so that the batch stays whole."
        found = []
        if _normalises(self.model):
            found.append(
                f"the model normalises over the batch, which it now sees in parts of {self.rows} rows, so that results change. Keep "
                f"that, freeze those layers with eval(), put nn.GroupNorm in their place, or {remedy}"
            )
        special = [name for name in ("weight", "ignore_index") if settings.get(name) is not None]
        if special and not settings["known"]:
            found.append(
                f"the loss {type(self.loss).__name__} has {' and '.join(special)}, and it is not known what its mean is over: parts of "
                f"a batch are weighted by rows, and gradients may differ from the whole batch's. Use torch's CrossEntropyLoss or {remedy}"
            )
        return found

    def step(self, batch: Any) -> Tensor:
        """One whole step on a batch: forward and backward in the plan's parts, update, gradients cleared. Gives the mean loss.

        A batch is a pair `(inputs, targets)` for `loss(model(inputs), targets)`; inputs are a tensor, a tuple for
        `model(*inputs)` or a mapping for `model(**inputs)`. Without a loss the whole batch is the model's inputs, and its
        output has a `.loss`. How a loss adds up that is not torch's cross entropy is measured on a few rows of the first batches. Raises
        `BadInput` for batches of another form, and for a loss that is neither a mean over rows or targets nor a sum.
        """
        total: Tensor | None = None
        try:
            self._find_out(batch)
            for part, weight in self.parts(batch):
                with self.precision():
                    loss = self._loss(part)
                loss = loss if weight == 1.0 else loss * weight
                loss.backward()
                total = loss.detach() if total is None else total + loss.detach()
            self.optimizer.step()  # with updates in the backward pass only what is left; hooks and schedulers count it
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        assert total is not None
        return total

    def _find_out(self, batch: Any) -> None:
        """How the loss is made of that of parts, where only measuring can tell; nothing of the model is changed."""
        rows = parts.rows_of(batch)
        if self._addition is None or self.count(rows) == 1:
            return
        before = rollback.remember(self.model)
        with judging(self.model), self.precision():
            self._addition.find_out(batch, rows, lambda some: float(self._loss(self._laid_out(some))))
        rollback.restore(self.model, before)
        self.share = self._addition.share

    def parts(self, batch: Any) -> Iterator[tuple[Any, float]]:
        """The micro-batches of a batch with their shares of its loss, for a loop body of one's own: multiply the loss of each by its
        share and go backward before the next; after the last, step. Tensors with as many rows as the first are divided.
        Updates in the backward pass happen inside this loop alone."""
        return ((part, share) for part, share in self.divided(batch, parts.rows_of(batch)) if share)

    def count(self, rows: int) -> int:
        """How many parts a batch of so many rows is made in."""
        return 1 if self.rows is None else min(math.ceil(rows / self.rows), max(1, rows // self.least_rows))

    def divided(self, batch: Any, rows: int) -> Iterator[tuple[Any, float]]:
        """`parts` of a batch of which it is known how many rows it has (one row cannot be divided, whatever the batch is), with
        those that do not count in the loss: their share is 0, and their loss may not be a number."""
        count = self.count(rows)
        bounds = [rows * number // count for number in range(count + 1)]
        slices = [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
        shares = [1.0] if count == 1 else self.share(batch, slices, rows)
        last = max(number for number, share in enumerate(shares) if share)
        try:
            for number, (one, share) in enumerate(zip(slices, shares, strict=True)):
                if self.updates is not None and number == last:
                    self.updates.begin()
                yield self._laid_out(batch if count == 1 else parts.taken(batch, one, rows)), share
        finally:
            if self.updates is not None:
                self.updates.end()

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast as the plan has it, for a loop body of one's own: forward and loss belong inside, backward outside."""
        if self.autocast is None:
            return contextlib.nullcontext()
        device = next((parameter.device.type for parameter in self.model.parameters()), "cpu")
        return torch.autocast(device, dtype=self.autocast)

    def split(self, rows: int) -> None:
        """At most `rows` rows of a batch are in memory at once from now on."""
        self.rows = rows

    def evaluate_in_parts(self, parts: int) -> None:
        """Evaluation is the loop's own affair."""

    def _check(self, plan: Plan, optimizer: torch.optim.Optimizer, settings: techniques.Configs) -> None:
        """Raise `BadInput` with all that stands against the plan here."""
        configs = techniques.configs(plan)
        faults = techniques.conflicts(configs, {**settings, "optimizer": {"name": _name(optimizer)}})
        faults += _another(plan, self.model)
        own = {id(parameter) for parameter in self.model.parameters()}
        if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
            faults.append("the optimizer has none of the model's parameters: build it from this model's.")
        faults += [
            f"{method} needs a new optimizer, and a {name} is attached to the given one, which it would go on driving: "
            f"build the {name} on the new one after delest.apply, or plan without {method} (delest plan --exact)."
            for method in techniques.new_optimizer(plan)
            for name in _schedulers(optimizer)
        ]
        if faults:
            raise errors.BadInput(faults)

    def _loss(self, batch: Any) -> Tensor:
        if self.loss is not None:
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                raise errors.BadInput(f"with a loss a batch is a pair (inputs, targets), not a {type(batch).__name__}.")
            return self.loss(_call(self.model, batch[0]), batch[1])
        try:
            outputs = _call(self.model, batch)
        except TypeError as error:
            raise errors.BadInput(
                f"the model does not take a whole batch as its inputs ({error}): where batches are pairs of inputs and targets, pass "
                "delest.apply(plan, model, optimizer, loss=...)."
            ) from error
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
        if loss is None:
            raise errors.BadInput(
                f"the model gives a {type(outputs).__name__} without a loss: pass delest.apply(plan, model, optimizer, loss=...)."
            )
        return loss

    def _laid_out(self, value: Any) -> Any:
        wanted = self.memory_format
        if wanted is None:
            return value
        return parts.mapped(value, lambda one: one.contiguous(memory_format=wanted) if one.ndim == 4 else one)


def _checked(loss: Any) -> Any:
    """The loss, where it is a mean, as parts are weighted. Raises `BadInput` for another reduction and for a class."""
    if isinstance(loss, type):
        raise errors.BadInput(f"the loss {loss.__name__} is a class: give an instance, as in loss={loss.__name__}().")
    reduction = parts.settings_of(loss).get("reduction", "mean")
    if reduction != "mean":
        raise errors.BadInput(
            f"the loss has reduction={reduction!r}, but parts of a batch are weighted as means over rows: use reduction='mean'."
        )
    return loss


def _another(plan: Plan, model: nn.Module) -> list[str]:
    """What tells that a plan was made for another model; nothing where it does not say for which."""
    now, then = fingerprint(model), plan.model
    if then is None or then["shapes"] == now["shapes"]:
        return []
    same = (then["parameters"], then["tensors"]) == (now["parameters"], now["tensors"])
    here = "as many, of other shapes" if same else f"{now['parameters']:,} in {now['tensors']:,} tensors"
    return [
        f"the plan was made for another model: that has {then['parameters']:,} parameters in {then['tensors']:,} tensors, this one "
        f"{here}. Make a plan for this model (delest plan JOB, with a job that builds it), or apply the plan to its own."
    ]


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return call(model, dict(inputs))
    return call(model, tuple(inputs) if isinstance(inputs, list) else inputs)


_NOTES = {  # what a loop body of one's own must know
    "precision": "; in a loop body of your own inside `with applied.precision():`",
    "optimizer_in_backward": "; after a step no gradients are left to clip or to log",
}


def _changes(plan: Plan, given: torch.optim.Optimizer, now: torch.optim.Optimizer) -> tuple[str, ...]:
    lines = [f"threads: torch.set_num_threads({plan.threads})"] if plan.threads else []
    waiting = techniques.waiting(plan)
    for name, config in techniques.configs(plan).items():
        settings = ", ".join(f"{key} {_words(value)}" for key, value in config.items())
        line = f"{name}: {settings}" if settings else name
        if name in waiting:
            line += "; not yet applied, it must act before the process starts: delest exec plan.json -- python train.py"
        lines.append(line + _NOTES.get(name, ""))
    if now is not given:
        lines.append(f"optimizer: a new {type(now).__name__} in place of the {type(given).__name__}, same groups and settings")
    return tuple(lines)


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _name(optimizer: torch.optim.Optimizer) -> str:
    """The name under which methods know an optimizer's arithmetic; a subclass of somebody's is not its parent."""
    kind = type(optimizer)
    name = kind.__name__.lower()
    ours = kind.__module__.startswith(("torch.optim", "delest."))
    return name if ours or name not in ELEMENTWISE else f"{kind.__module__}.{kind.__name__}"


def _normalises(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training for module in model.modules())


def _schedulers(optimizer: torch.optim.Optimizer) -> list[str]:
    """Classes of the learning-rate schedulers that drive an optimizer: they wrap its `step`, and hold it."""
    if not hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        return []
    schedulers = torch.optim.lr_scheduler.LRScheduler
    holders = gc.get_referrers(optimizer)
    holders += [owner for held in holders if isinstance(held, dict) for owner in gc.get_referrers(held)]
    names = {type(one).__name__ for one in holders if issubclass(type(one), schedulers)}
    return sorted(names) or ["learning-rate scheduler"]


def _lay_out(optimizer: torch.optim.Optimizer) -> None:
    """State that the optimizer has already in its parameters' memory format: fused optimizers walk both in step."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
