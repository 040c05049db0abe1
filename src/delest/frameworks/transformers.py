"""delest in transformers' loop: `Trainer(..., callbacks=[DelestCallback("2GiB")])`.

Callbacks of transformers are told of events and may not act on steps
(https://huggingface.co/docs/transformers/main_classes/callback), so this one puts its own in place of the Trainer's
`training_step`, `compute_loss` and `prediction_step`, which call the Trainer's, or a subclass's, once a part.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import transformers
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import nested_concat

from delest import errors
from delest.backends.torch.parts import ignoring
from delest.frameworks.hook import Hook
from delest.frameworks.loops import calling, faults_in_transformers
from delest.frameworks.steps import summed, weighted

UNWATCHED = ("runtime", "per_second", "epoch", "compilation_time")  # of what an evaluation tells


class DelestCallback(Hook, TrainerCallback):
    """Applies a plan, holds a budget of memory, stops early and keeps a run folder; arguments are those of `hook.Hook`.

    A batch whose step does not fit is made again in smaller parts: same gradients, same effective batch, schedule and number
    of steps. Give it as `Trainer(callbacks=[...])`: added later, it comes after the scheduler. Raises `BadInput` when training
    begins in which it cannot act.
    """

    _share, _rows = 1.0, 0  # of a part, of a step so far
    _loss: Any = 0.0

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The plan acts when the optimizer has just been made, and nothing is attached to it."""
        trainer = calling(Trainer)
        create = trainer.create_optimizer

        def create_optimizer(*given: Any, **named: Any) -> Any:
            create(*given, **named)
            self._apply(trainer)
            return trainer.optimizer

        trainer.create_optimizer = create_optimizer

    def _apply(self, trainer: Trainer) -> None:
        if self.applied is not None and self.model is trainer.model:
            return  # trained before by the same Trainer
        if faults := faults_in_transformers(trainer, self):
            raise errors.BadInput(faults)
        args = trainer.args
        settings: dict[str, dict[str, Any]] = {"clipping": {"norm": args.max_grad_norm}} if args.max_grad_norm else {}
        if args.gradient_accumulation_steps > 1:
            settings["micro_batch"] = {"batches": args.gradient_accumulation_steps}
        given = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # behind accelerate's
        optimizer = self.apply(trainer.model, given, settings)
        if optimizer is not given:
            trainer.optimizer = optimizer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = calling(Trainer)
        self._apply(trainer)
        ways = ignoring(trainer.model, "labels")
        if getattr(trainer, "_loss_shifts_labels", False):
            ways = dict(reversed(ways.items()))  # evaluations go by the first
        self.begin(
            loop=f"transformers {transformers.__version__}",
            versions={"transformers": transformers.__version__},
            batches=args.gradient_accumulation_steps,
            ways=ways,
        )
        self.allocate()
        self._take_over(trainer)

    def _take_over(self, trainer: Trainer) -> None:
        """Put our methods in place of the Trainer's own, until training ends."""
        step, loss_of, predict = trainer.training_step, trainer.compute_loss, trainer.prediction_step

        def training_step(model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            def one(part: Any, share: float) -> Any:
                self._share = share
                return step(model, part, num_items_in_batch)

            def judge(part: Any) -> float:
                with self.precision(), trainer.compute_loss_context_manager():
                    return float(loss_of(model, trainer._prepare_inputs(part), num_items_in_batch=num_items_in_batch))

            try:
                total = summed(self.attempt(inputs, one, judge))
            finally:
                self._share = 1.0
            self._loss, self._rows = self._loss + total, self._rows + self.steps.see(inputs)
            return total

        def compute_loss(*given: Any, **named: Any) -> Any:
            with self.precision():
                found = loss_of(*given, **named)
            return found if isinstance(found, tuple) or self._share == 1.0 else weighted(found, self._share)

        def prediction_step(model: Any, inputs: Any, *given: Any, **named: Any) -> Any:
            def one(part: Any, share: float) -> Any:
                loss, logits, labels = predict(model, part, *given, **named)
                return None if loss is None else weighted(loss, share), logits, labels

            losses, *rest = zip(*self.attempt(inputs, one), strict=True)
            logits, labels = (None if parts[0] is None else functools.reduce(nested_concat, parts) for parts in rest)
            return None if losses[0] is None else sum(losses), logits, labels

        ours: dict[str, Any] = {
            "compute_loss": compute_loss,
            "prediction_step": prediction_step,
            "training_step": training_step,
        }
        whole = next(
            name for name in ("_run_epoch", "training_step") if hasattr(trainer, name)
        )  # the first: not in every version
        ours[whole] = self._closing(ours.get(whole) or getattr(trainer, whole))
        self.replace(trainer, **ours)

    def _closing(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method; an error in it, of which callbacks are not told, ends the run."""

        @functools.wraps(method)
        def call(*given: Any, **named: Any) -> Any:
            try:
                return method(*given, **named)
            except BaseException as error:
                self.close(error)
                raise

        return call

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.record is not None:
            self.record.stepped(state.global_step, state.epoch, self._loss, self.rate, self._rows)
        self._loss, self._rows = 0.0, 0

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> Any:
        if self.record is not None:
            values = {name: value for name, value in (metrics or {}).items() if not name.endswith(UNWATCHED)}
            control.should_training_stop |= self.evaluated(values)
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()
