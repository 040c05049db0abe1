"""Other people's loops as a callback meets them: the one that calls it, and what in it keeps the callback from acting."""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any

from delest import errors, methods

if TYPE_CHECKING:
    from delest.frameworks.hook import Hook


def calling(kind: type) -> Any:
    """The object of this kind in one of whose methods we are, for callbacks that are not given it."""
    frame = sys._getframe(1)
    while frame is not None:
        if isinstance(found := frame.f_locals.get("self"), kind):
            return found
        frame = frame.f_back  # type: ignore[assignment]
    raise errors.BadInput(f"this callback acts in a {kind.__module__}.{kind.__name__}, and was called by something else.")


def faults_in_lightning(trainer: Any, module: Any, hook: Hook) -> list[str]:
    """What of a fit keeps the callback from acting, in words."""
    if not trainer.optimizers:
        return ["configure_optimizers gives no optimizer, so there is nothing to train."]
    if not hook.acts:
        return []
    found = []
    if trainer.world_size > 1:
        found.append(f"DelestCallback acts on one process, and this Trainer has {trainer.world_size}: use devices=1.")
    if not module.automatic_optimization:
        found.append(
            "automatic_optimization is False in this module, so its steps cannot be made in parts: leave memory= and plan= out, which "
            "keeps the run folder and early stopping, or use delest.apply inside training_step."
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        found.append("training_step takes dataloader_iter, so its batches cannot be divided: give it (batch, batch_idx).")
    if _has_precision(hook) and trainer.precision != "32-true":
        found.append(
            f"the plan has a precision, and the Trainer precision={trainer.precision!r} already: leave one of them out."
        )
    return found


def faults_in_transformers(trainer: Any, hook: Hook) -> list[str]:
    """What of a Trainer keeps the callback from acting, in words."""
    args, plan, found = trainer.args, hook.plan, []
    if hook.acts and (args.world_size > 1 or args.n_gpu > 1 or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        found.append("DelestCallback acts on one process and one device: leave memory= and plan= out where there are more.")
    if _has_precision(hook) and (args.bf16 or args.fp16):
        found.append("the plan has a precision, and the TrainingArguments bf16 or fp16 already: leave one of them out.")
    late = hasattr(trainer.optimizer, "optimizer")  # accelerate's wrapper: the scheduler is made right after it
    for method in methods.new_optimizer(plan) if late and plan is not None else ():
        found.append(
            f"{method} needs a new optimizer, and a {type(trainer.lr_scheduler).__name__} is attached to the one that is "
            "there: give the callback as Trainer(callbacks=[...]), not by add_callback."
        )
    return found


def _has_precision(hook: Hook) -> bool:
    return hook.plan is not None and hook.plan.config("precision") is not None
