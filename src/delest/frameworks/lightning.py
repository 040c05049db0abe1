"""delest in Lightning's loop: `Trainer(callbacks=[DelestCallback("2GiB")])`.

Lightning's loop gives forward and backward to the optimizer as one closure
(https://lightning.ai/docs/pytorch/stable/common/optimization.html); the one made here makes the batch in parts. What
`training_step` logs is logged once a batch, as the mean over its parts.
"""

from __future__ import annotations

import math
from typing import Any

import lightning
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult
from torch import Tensor

from delest import errors
from delest.backends.torch.parts import ignoring
from delest.frameworks.hook import Hook
from delest.frameworks.logged import Logged
from delest.frameworks.loops import faults_in_lightning
from delest.frameworks.steps import summed


class DelestCallback(Hook, Callback):
    """Applies a plan, holds a budget of memory, stops early and keeps a run folder; arguments are those of `hook.Hook`.

    A batch whose step does not fit is made again in smaller parts: same gradients, same effective batch, schedule and number
    of steps. `training_step` is then called once a part. Raises `BadInput` when a fit begins in which it cannot act.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if faults := faults_in_lightning(trainer, pl_module, self):
            raise errors.BadInput(faults)
        settings: dict[str, dict[str, Any]] = {}
        if trainer.gradient_clip_val:
            settings["clipping"] = {"norm": trainer.gradient_clip_val}
        if trainer.accumulate_grad_batches > 1:
            settings["micro_batch"] = {"batches": trainer.accumulate_grad_batches}
        given = trainer.optimizers[0]
        optimizer = self.apply(pl_module, given, settings)
        if optimizer is not given:
            trainer.strategy.optimizers = [optimizer]
        self.logged = Logged(pl_module)
        self.begin(
            loop=f"Lightning {lightning.__version__}",
            versions={"lightning": lightning.__version__},
            batches=trainer.accumulate_grad_batches,
            ways=ignoring(pl_module),
            also=self.logged.remember,
        )
        self._take_over(trainer)

    def _take_over(self, trainer: Trainer) -> None:
        """Put our closure and validation step in place of the loop's, until training ends."""
        loop, strategy, logged = trainer.fit_loop.epoch_loop.automatic_optimization, trainer.strategy, self.logged
        validate = strategy.validation_step

        def make_closure(kwargs: Any, optimizer: Any, batch_idx: int) -> Closure:
            zero, backward = loop._make_zero_grad_fn(batch_idx, optimizer), loop._make_backward_fn(optimizer)

            def forward(part: Any) -> ClosureResult:
                with self.precision():
                    return loop._training_step(type(kwargs)({**kwargs, "batch": part}))

            def one(part: Any, share: float) -> tuple[Tensor | None, dict[str, Any], float]:
                logged.begin_part(share)
                result = forward(part)
                loss = result.closure_loss
                if loss is not None and backward is not None and share:
                    backward(loss if share == 1.0 else loss * share)
                return result.loss, result.extra, share

            def whole() -> ClosureResult:
                if zero is not None:
                    zero()
                with logged.once_a_batch("training_step"):
                    made = self.attempt(kwargs["batch"], one, lambda part: _value(forward(part).closure_loss))
                    if len(made) > 1:  # what is logged is told from the loss only where there are parts
                        logged.losses = [
                            None if loss is None else loss * trainer.accumulate_grad_batches for loss, _, _ in made
                        ]
                losses = [loss if share == 1.0 else loss * share for loss, _, share in made if loss is not None and share]
                return ClosureResult(summed(losses) if losses else None, extra=made[-1][1])

            return Closure(whole)

        def validation_step(batch: Any, *rest: Any) -> Any:
            def one(part: Any, share: float) -> Any:
                logged.begin_part(share)
                with self.precision():
                    return validate(part, *rest)

            with logged.once_a_batch("validation_step"):
                return self.attempt(batch, one)[-1]

        self.replace(loop, _make_closure=make_closure)
        self.replace(strategy, validation_step=validation_step)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.allocate()  # here, since a checkpoint's state is loaded after the start of the fit

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.record is not None and trainer.global_step != self.record.position.step:
            epoch = trainer.current_epoch + (batch_idx + 1) / max(1, trainer.num_training_batches)
            loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
            rows = self.steps.see(batch) * trainer.accumulate_grad_batches
            self.record.stepped(trainer.global_step, epoch, loss, self.rate, rows)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.record is not None and not trainer.sanity_checking:
            values = {name: float(value) for name, value in trainer.callback_metrics.items() if not name.startswith("train")}
            trainer.should_stop |= self.evaluated(values)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.close(exception)


def _value(loss: Tensor | None) -> float:
    return math.nan if loss is None else float(loss)
