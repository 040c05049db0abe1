"""The training loop. It sees a `Session`, two feeds and a folder, and nothing of any framework.

One pass: step, read the losses every few steps, evaluate after each epoch, keep the best weights, save. What ends
training early begins the schedule's decay. Every state that is saved was seen to be finite.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from delest import errors, storage, tensors
from delest.hardware.machine import peak_resident_bytes, resident_bytes
from delest.tensors import Under
from delest.training import checkpoints
from delest.training.decisions import Decisions
from delest.training.evaluate import Evaluation, evaluate
from delest.training.guard import Guard
from delest.training.position import Position
from delest.training.progress import Progress
from delest.training.schedules import Schedule
from delest.training.signals import Signals
from delest.training.tracking import Tracking

if TYPE_CHECKING:
    from delest.backends import Session
    from delest.job import Recipe
    from delest.metrics import Metric
    from delest.records.batch import Batch, Step

READ_EVERY = 10  # steps between two readings of the loss: a GPU never waits for it
STEPS_TIMED = 1000
LEAST_PROGRESS = 1e-4
SETBACKS = 3  # the third state that is not finite ends the run


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When to save, when time is up, and how much may be resident."""

    checkpoint_seconds: float = 60.0
    seconds: float | None = None  # of training, evaluation included
    memory_bytes: int | None = None  # of this process, None: nothing is guarded


@dataclass(kw_only=True)
class Trainer:
    """One run of training: what it works on, and where it stands."""

    session: Session
    train_feed: Any
    validation_feed: Any  # empty: the last weights are the best
    recipe: Recipe
    metric: Metric
    folder: Path
    limits: Limits = field(default_factory=Limits)
    progress: Progress = field(default_factory=Progress)
    position: Position = field(default_factory=Position)
    test_feed: Any = None  # read once, when training is done
    saving: bool = True  # False for a preview: no checkpoint, no files
    tracking: Tracking | None = None

    def __post_init__(self) -> None:
        self.decisions = Decisions(self.folder / "decisions.jsonl" if self.saving else None)
        self.signals = Signals()
        self.guard = Guard(self.session, self.train_feed.batch_size, lambda text: self.progress.note(text))
        self._pending: list[Any] = []
        self.step_seconds: deque[float] = deque(maxlen=STEPS_TIMED)  # of the newest steps; on a GPU until they were asked for
        self._seen = 0.0
        if not self.position.total_steps:
            epochs = self.recipe.epochs_for(len(self.train_feed), self.train_feed.batch_size)
            self.position.total_steps = epochs * self.train_feed.steps

    # The run

    def resume(self, crash: str | None = None) -> bool:
        """Take up the newest intact checkpoint; False where there is none. `crash` says how the process before this one was
        ended, where memory may be why: the run then goes on in more parts. Raises `NothingFits` where there can be no more."""
        found = self._take_up_newest()
        if not found:
            self.progress.note("there is no intact checkpoint: training begins anew.")
            storage.write_atomic(self.folder / "metrics.jsonl", "")
        path = self.folder / "decisions.jsonl"
        if crash is not None:
            lines = storage.read_lines(path)[self.position.decisions :]
            parts = max((line.get("parts", 0) for line in lines), default=0)
            facts = self.guard.parts_after_crash(parts, crash, self.limits.memory_bytes)
            self.progress.note(f"step {self.position.step:,}: {facts['why']}.")
            storage.append_line(path, {"kind": "split", "at": self.position.step, **facts, "failed_at": None}, sync=True)
        self.decisions = Decisions(path, self.position.decisions)
        return found

    def _take_up_newest(self) -> bool:
        found = checkpoints.newest(self.folder / "checkpoints", self.progress.note)
        if found is None:
            return False
        state, position, path = found
        self.session.load(state)
        self.position = Position(**position)
        self.session.parts = max(self.session.parts, self.position.parts)
        if (path / "best.safetensors").exists():
            with (
                storage.written_atomically(self.folder / "best.safetensors") as file,
                open(path / "best.safetensors", "rb") as best,
            ):
                shutil.copyfileobj(best, file)
        rows = [row for row in storage.read_lines(self.folder / "metrics.jsonl") if row["step"] <= self.position.step]
        storage.write_atomic(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        if self.tracking is not None:
            self.tracking.went_back(self.position.step)
        return True

    def train(self) -> None:
        """Train to the end of the schedule and leave the best weights in the session.

        Raises `Interrupted` (all is saved), `Diverged` (the third time that values are not finite), `NothingFits` (a budget of
        memory does not do) and what a step raises.
        """
        self.progress.training_started(self.position.total_steps, self.position.step)
        try:
            with self.signals.watched(), self.guard.watching(self.limits.memory_bytes):
                self._train()
        finally:
            self.progress.training_finished()
        self._restore_best()

    def test(self) -> dict[str, float]:
        """What the session scores on the test split, by metric; nothing where there is none. Guarded as steps are."""
        if self.test_feed is None or not len(self.test_feed):
            return {}
        with self.guard.watching(self.limits.memory_bytes):
            work = lambda: evaluate(self.session, self.test_feed, self.metric)  # noqa: E731
            result = self.guard.attempt(work, self.decisions, self.position, evaluating=True)
        return result.metrics(self.metric)

    def _train(self) -> None:
        self._saved = time.monotonic()
        if not self.position.step:
            self._save()
        while True:
            p = self.position
            if p.step and (p.row == 0 or p.step >= p.total_steps) and p.evaluated_step < p.step:
                self._evaluate()
            elif p.step < p.total_steps:
                try:
                    self._run_epoch()
                except MemoryError as error:  # as when a batch was read: the feed goes on from where it stood
                    self.guard.read_again(error)
            else:
                break

    def _run_epoch(self) -> None:
        """Step through what is left of the epoch, or until a setback takes the run back."""
        p = self.position
        for batch in self.train_feed.epoch(p.epoch, p.row):
            self._follow()
            started = time.monotonic()
            rate = self._schedule().rate(p.step) * p.rate_scale
            step = self._step(batch, rate)
            if step is None:
                return
            self.step_seconds.append(time.monotonic() - started)
            self._pending.append(step)
            p.step, p.row = p.step + 1, p.row + step.count
            last = p.step >= p.total_steps or p.row >= len(self.train_feed)
            saving = time.monotonic() - self._saved >= self.limits.checkpoint_seconds and not last
            stopping = self.signals.received is not None
            if (last or saving or stopping or p.step % READ_EVERY == 0) and not self._read(rate):
                return
            p.training_seconds += time.monotonic() - started
            if stopping:
                self._interrupt()
                return
            if saving and not self._save():
                return
            self._watch_clock()
            if last:
                break
        if p.row >= len(self.train_feed):
            p.epoch, p.row = p.epoch + 1, 0

    def _step(self, batch: Batch, rate: float) -> Step | None:
        """One step, or None where memory ran out in the middle of its update: back to a checkpoint, with more parts."""
        try:
            return self.guard.attempt(lambda: self.session.step(batch, rate), self.decisions, self.position, rows=batch.count)
        except errors.OutOfMemory as error:
            if self.limits.memory_bytes is None or not self.saving:
                raise
            failed, spent = self.position.step, self.position.training_seconds
            found = self._take_up_newest()
            assert found, "a checkpoint is written before the first step"
            self._pending, self.position.training_seconds = [], spent
            self.guard.take_back(self.decisions, self.position, error, failed)
        self._save()
        return None

    def _schedule(self) -> Schedule:
        p = self.position
        full = self.train_feed.steps * self.recipe.epochs_for(len(self.train_feed), self.train_feed.batch_size)
        planned = Schedule.of(self.recipe, full)
        return planned if p.decay_from is None else replace(planned, total_steps=p.total_steps, decay_from=p.decay_from)

    def _read(self, rate: float) -> bool:
        """Read the losses since the last reading into `metrics.jsonl` and the progress; False after a setback."""
        pending, self._pending = self._pending, []
        if not pending:
            return True
        losses = [float(step.loss) for step in pending]
        count = sum(step.count for step in pending)
        loss = sum(value * step.count for value, step in zip(losses, pending, strict=True)) / count
        if not math.isfinite(loss):
            return self._set_back(f"the loss is {loss}")
        p = self.position
        seconds = p.training_seconds
        speed = count / max(1e-9, seconds - self._seen) if self._seen else 0.0
        self._seen = seconds
        row = {"kind": "train", "step": p.step, "epoch": self.epochs(), "loss": loss, "rate": rate, "seconds": seconds}
        row |= {"samples_per_second": speed or None, "resident_bytes": resident_bytes()}
        if pending[-1].gradient_norm is not None:
            row["gradient_norm"] = float(pending[-1].gradient_norm)
        self._log(row)
        self.progress.stepped(p.step, p.total_steps, loss, speed, row["resident_bytes"], peak_resident_bytes())
        return True

    def epochs(self) -> float:
        """Epochs done, with the part of the current one."""
        return self.position.epoch + self.position.row / max(1, len(self.train_feed))

    # Evaluation and the end

    def _evaluate(self) -> None:
        p = self.position
        if not len(self.validation_feed):
            p.best_step, p.best_epoch, p.evaluated_step = p.step, self.epochs(), p.step
            self._save()
            return
        if fault := _not_finite(self._weights()):
            self._set_back(fault)
            return
        started = time.monotonic()
        result = self.guard.attempt(
            lambda: evaluate(self.session, self.validation_feed, self.metric, stop=self._stop_evaluation),
            self.decisions,
            p,
            evaluating=True,
        )
        p.evaluating_seconds += time.monotonic() - started
        p.evaluated_step = p.step
        better, waiting = self._is_better(result), not self._is_progress(result)
        values = result.metrics(self.metric)
        self._log(
            {
                "kind": "validation",
                "step": p.step,
                "epoch": self.epochs(),
                **values,
                "score": result.score,
                "best": better,
                "seconds": p.training_seconds,
            }
        )
        self.progress.evaluated(self.epochs(), values, better)
        if better:
            p.best_score, p.best_loss, p.best_step, p.best_epoch = result.score, result.loss, p.step, self.epochs()
            p.validation = values
            self._keep_best()
        p.waited = p.waited + 1 if waiting else 0
        if p.waited >= self.recipe.patience and not self._schedule().decaying(p.step):
            self._end_early("plateau", f"no better {self.metric.name} in {p.waited} evaluations")
        self._save()

    def _is_better(self, result: Evaluation) -> bool:
        """A better score, or the same score with a lower loss: scores of few rows tie often."""
        p, gain = self.position, self._gain(result)
        return gain > 0 or (not gain < 0 and result.loss < (math.inf if p.best_loss is None else p.best_loss))

    def _is_progress(self, result: Evaluation) -> bool:
        """Better by enough to go on for: a score that creeps by less than 0.01 % of itself is a plateau."""
        return self._gain(result) > LEAST_PROGRESS * abs(self.position.best_score or 0.0)

    def _gain(self, result: Evaluation) -> float:
        """Score over the best so far, positive for better; NaN where the metric is not defined on these rows."""
        best = self.position.best_score
        if best is None:
            return math.inf
        return result.score - best if self.metric.higher_is_better else best - result.score

    def _end_early(self, kind: str, why: str) -> None:
        p = self.position
        ended = self._schedule().ended_early(p.step)
        self.decisions.take("decay", p.step, reason=kind, why=why, total_steps=ended.total_steps)
        p.decay_from, p.total_steps, p.stopped_by, p.decisions = ended.decay_from, ended.total_steps, kind, self.decisions.count
        self.progress.note(f"{why}: the rate now falls to zero over {p.total_steps - p.step} steps.")
        self.progress.total_changed(p.total_steps)

    def _watch_clock(self) -> None:
        """Begin the decay when what is left of the time is what the decay will take; on resume, where it was begun."""
        p = self.position
        if self.decisions.scripted("decay", p.step) and self.decisions.scripted("decay", p.step)["reason"] == "time":  # type: ignore[index]
            self._end_early("time", "the time is up")
        elif self.limits.seconds is not None and not self.decisions.following and not self._schedule().decaying(p.step):
            spent = p.training_seconds + p.evaluating_seconds
            if spent >= self.limits.seconds * (1 - self.recipe.decay):
                self._end_early("time", "the time is up")

    # Files

    def _save(self) -> bool:
        """Write a checkpoint; a state that is not finite is a setback instead (False)."""
        p = self.position
        if not self.saving:
            return True
        p.parts = self.session.parts
        self.guard.make_room()
        state = self.session.state()
        if fault := _not_finite(Under(state.arrays, "model.")):
            return self._set_back(fault)
        checkpoints.save(self.folder / "checkpoints", p.step, state, p.to_json(), self.folder / "best.safetensors")
        self._saved = time.monotonic()
        return True

    def _keep_best(self) -> None:
        if self.saving:
            with storage.written_atomically(self.folder / "best.safetensors") as file:
                tensors.write(file, self._weights(), {"step": str(self.position.step)})
        else:
            self._best = self.session.weights()

    def _weights(self) -> Under:
        """Not copied."""
        return Under(self.session.state().arrays, "model.")

    def _restore_best(self) -> None:
        p = self.position
        if p.best_score is None or p.best_step == p.step:
            if self.saving and p.best_score is None:
                self._keep_best()
            return
        if self.saving:
            self.session.load_weights(tensors.Arrays(self.folder / "best.safetensors"))
        else:
            self.session.load_weights(self._best)

    def _log(self, row: dict[str, Any]) -> None:
        if self.saving:
            storage.append_line(self.folder / "metrics.jsonl", row)
        if self.tracking is not None:
            self.tracking.write(row)

    # Trouble

    def _set_back(self, why: str) -> bool:
        """Go back to the last good state with half the rate; the third time, give up."""
        p = self.position
        failed, setbacks, scale = p.step, p.setbacks + 1, p.rate_scale / 2
        spent = p.training_seconds
        if setbacks >= SETBACKS or not self.saving:
            raise errors.Diverged(
                f"{why} at step {failed}, the {setbacks}{'st' if setbacks == 1 else 'nd' if setbacks == 2 else 'rd'} time, at {p.rate_scale:g} of the learning rate. "
                "Give a lower --lr, clip gradients (--clip 1.0), or look for extreme values in the data. The last good state is kept."
            )
        found = self._take_up_newest()
        assert found, "a checkpoint is written before the first step"
        self._pending, p = [], self.position
        self.decisions.take("setback", p.step, failed_at=failed, why=why, rate_scale=scale, parts=self.session.parts)
        self._slow_down(setbacks, scale, spent)
        self.progress.note(f"{why} at step {failed}: back to step {p.step} with half the learning rate.")
        return False

    def _slow_down(self, setbacks: int, scale: float, spent: float) -> None:
        p = self.position
        p.setbacks, p.rate_scale, p.training_seconds, p.decisions = setbacks, scale, spent, self.decisions.count
        self._save()

    def _follow(self) -> None:
        """Splits before this very step and setbacks to it are taken again at once, in their order, without failing first."""
        while True:
            split = self.guard.follow(self.decisions, self.position)
            line = self.decisions.scripted("setback", self.position.step)
            if line is not None:
                self.decisions.take("setback", self.position.step)
                self.session.parts = max(self.session.parts, line.get("parts", 0))
                self._slow_down(self.position.setbacks + 1, line["rate_scale"], self.position.training_seconds)
            elif not split:
                return

    def _stop_evaluation(self) -> None:
        """An evaluation that a signal interrupts is done again on resume: the state before it is saved."""
        if self.signals.received is not None:
            self._interrupt()

    def _interrupt(self) -> None:
        assert self.signals.received is not None
        if self._save():
            raise errors.Interrupted(self.signals.received, "")


def _not_finite(weights: Mapping[str, Any]) -> str | None:
    """The first weights that hold NaN or infinity, in words."""
    for name, array in weights.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            return f"the weights {name} are not finite"
    return None
