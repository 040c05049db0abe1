"""What the callbacks of all loops share: what may be given, the plan applied, the budget guarded, the run kept."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from delest import errors, methods
from delest.backends.torch import optimizers, rollback
from delest.backends.torch.addition import LossOf
from delest.backends.torch.applied import Applied
from delest.backends.torch.model import fingerprint
from delest.backends.torch.parts import Share
from delest.frameworks import wishes
from delest.frameworks.record import Record
from delest.frameworks.steps import Steps
from delest.records.plan import Plan
from delest.training.guard import Guard


class Hook:
    """One training in a loop that is not delest's: `apply` before its scheduler is built, if that can be, `begin`, a call of
    `attempt` for each batch, `close`.

    `memory` bounds the resident set ("2GiB", bytes, "80%"; None: the plan's, or nothing is guarded), `plan` is a `Plan` or the path of a
    plan.json, `out` the run folder (None: the next runs/NAME-001). After `patience` evaluations without a better `monitor`
    (None: the loss), where `mode` is "min" or "max" (None: by its name), training stops. Raises `BadInput` with all faults.
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
        given = wishes.read(memory, plan, out=out, monitor=monitor, mode=mode, patience=patience)
        self.wishes, self.budget_bytes, self.plan = given, given.budget_bytes, given.plan
        self.applied: Applied | None = None
        self.record: Record | None = None
        self.rate = 0.0  # of the update that a batch belongs to
        self._open = contextlib.ExitStack()

    @property
    def acts(self) -> bool:
        """Whether the loop's steps are changed at all, or only written down."""
        return self.wishes.acts

    def apply(self, model: nn.Module, optimizer: torch.optim.Optimizer, settings: methods.Configs) -> torch.optim.Optimizer:
        """Apply the plan to the loop's model, or to the part of it that the plan was made for; gives the optimizer to go on with.

        Raises `BadInput` for what excludes it, such as a scheduler that is attached to an optimizer that must be replaced.
        """
        plan = self.plan or Plan(batch_size=1, micro_batch=1)
        if self.budget_bytes is not None and (other := {one.device.type for one in model.parameters()} - {"cpu"}):
            raise errors.BadInput(
                f"memory= bounds the resident set of training on a CPU, and the model is on {', '.join(other)}."
            )
        meant = next((one for one in model.modules() if plan.model and fingerprint(one) == plan.model), model)
        self.model = model
        self.applied = Applied(plan, meant, optimizer, None, settings)
        for line in self.applied.changes:
            if "not yet applied" in line:
                warnings.warn(line, errors.DelestWarning, stacklevel=2)
        return self.applied.optimizer

    def begin(
        self,
        *,
        loop: str,
        versions: Mapping[str, str],
        batches: int,
        ways: dict[str, Share],
        also: Callable[[], Callable[[], None]] = lambda: lambda: None,
    ) -> None:
        """Guard the budget from here on. `loop` names the library that trains, `batches` are those of one update, `ways` say by name
        what the loss may be a mean over, `also` see `Steps`."""
        assert self.applied is not None
        self.steps = Steps(self.applied, self.model, ways, also, guarded=self.budget_bytes is not None)
        job = {
            "name": type(self.model).__name__,
            "loop": loop,
            "optimizer": type(self.applied.optimizer).__name__,
            "origin": None,
        }
        versions = {"torch": torch.__version__, **versions}
        self.record = Record(self.wishes.out, job, self.wishes.followed, batches, versions)
        self.guard = Guard(self.steps, 1, self.record.note, option="memory=")
        for line in self.applied.changes:
            self.record.note(line)
        self._open.enter_context(self.guard.watching(self.budget_bytes))

    def replace(self, owner: Any, **methods: Callable[..., Any]) -> None:
        """Put methods in place of an object's own until the training is closed."""
        for name, method in methods.items():
            setattr(owner, name, method)
            self._open.callback(vars(owner).pop, name)

    def allocate(self) -> None:
        """Have the optimizer's state there before the first step: one that runs out of memory would leave half of it behind."""
        assert self.applied is not None
        optimizer = self.applied.optimizer
        special = any(
            group.get("amsgrad") or group.get("dampening") for group in optimizer.param_groups
        )  # more, or not from zero
        if self.budget_bytes is not None and not optimizer.state and not special:
            optimizers.allocate(optimizer)

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast as the plan has it."""
        return contextlib.nullcontext() if self.applied is None else self.applied.precision()

    def attempt(self, batch: Any, one: Callable[[Any, float], Any], loss_of: LossOf | None = None) -> list[Any]:
        """What `one(part, share)` gives for each part of a batch, in as many parts as fit; see `Steps.make`. An evaluation has no
        `loss_of`. Raises `NothingFits` where no smaller parts are left."""
        assert self.record is not None
        assert self.applied is not None
        if loss_of is not None:
            self.rate = float(self.applied.optimizer.param_groups[0]["lr"])
        self.steps.see(batch)
        self.guard.batch_size = self.steps.batch_rows
        gradients, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

        def work() -> list[Any]:
            if (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == (gradients, inference):
                return self.steps.make(batch, one, loss_of)
            with torch.inference_mode(inference), torch.set_grad_enabled(gradients):  # the guard's thread has modes of its own
                return self.steps.make(batch, one, loss_of)

        return self.guard.attempt(work, self.record.decisions, self.record.position, evaluating=loss_of is None)

    def evaluated(self, values: Mapping[str, float]) -> bool:
        """Write an evaluation down; whether training should stop."""
        assert self.record is not None
        return self.record.evaluated(values, self.wishes.monitor, self.wishes.mode, self.wishes.patience)

    def close(self, error: BaseException | None = None) -> None:
        """Lift the limit and write the record; once. `error` is what ended the training, if one did."""
        record, self.record = self.record, None
        if record is None:
            return
        self._open.close()
        if error is not None and rollback.is_out_of_memory(error, self.budget_bytes is not None):
            record.note(
                "memory ran out in the update, of which half may be done: give more memory, or a plan with optimizer_in_backward."
            )
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        rows = self.steps.batch_rows
        record.finish(rows, math.ceil(rows / self.steps.parts), parameters, error)
