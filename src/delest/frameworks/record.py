"""The run folder of a training in somebody else's loop, in delest's own form, and early stopping by what is evaluated there."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from delest import __version__, errors, runs, storage
from delest.hardware import machine
from delest.records.footprint import Footprint
from delest.records.plan import Plan
from delest.records.run import Best, Run
from delest.reporting.page import write_report
from delest.training.decisions import Decisions
from delest.training.position import Position
from delest.training.progress import PlainProgress

READ_EVERY = 10  # steps between two readings of the loss
LOW_IS_GOOD = ("loss", "error", "perplexity", "mse", "rmse", "mae", "wer", "cer")
PREFIXES = ("val_", "valid_", "validation_", "eval_", "val/", "eval/")


class Record:
    """Where a run stands and what is written of it: `metrics.jsonl` and `decisions.jsonl` as it goes, `run.json` and
    `report.html` at its end. Raises `BadInput` where `out` cannot be the folder of a new run."""

    def __init__(self, out: str | Path | None, job: dict[str, Any], plan: Plan, batches: int, versions: Mapping[str, str]):
        """`job` describes the training: its `name`, the `loop` that trains, `origin` None; `batches` make one update."""
        self.folder = _claim(out, job, plan)
        self.batches = batches
        self.position, self.decisions = Position(), Decisions(self.folder / "decisions.jsonl")
        self.progress = PlainProgress()
        self.epoch = self._read_at = 0.0
        self._rate: float | Callable[[], float] = 0.0
        self._losses: list[Any] = []
        self._rows = 0
        self.run = Run(
            path=self.folder,
            name=self.folder.name,
            status="running",
            job=job,
            plan=plan,
            versions={
                "delest": __version__,
                "python": platform.python_version(),
                **versions,
            },
        )
        storage.write_json(self.folder / "run.json", self.run)
        machine.reset_peak()
        self._idle_bytes, self._begun = machine.resident_bytes(), time.monotonic()
        self._mark = self._begun

    def note(self, text: str) -> None:
        """Something worth knowing, on standard error."""
        self.progress.note(text)

    def stepped(self, step: int, epoch: float, loss: Any, rate: float | Callable[[], float], rows: int) -> None:
        """One more update was made: its number from 1, epochs done with a fraction, mean loss (read later), learning rate (or what reads it, later), rows."""
        now, p = time.monotonic(), self.position
        p.training_seconds, self._mark = p.training_seconds + now - self._mark, now
        p.step, self.epoch = step, epoch
        self._losses.append(loss)
        self._rows, self._rate = self._rows + rows, rate
        if step % READ_EVERY == 0:
            self._read()

    def _read(self) -> None:
        losses, p = [float(loss) for loss in self._losses if loss is not None], self.position
        seconds = p.training_seconds - self._read_at
        row: dict[str, Any] = {"kind": "train", "step": p.step, "epoch": self.epoch, "seconds": p.training_seconds}
        rate = self._rate() if callable(self._rate) else self._rate
        row |= {"loss": sum(losses) / len(losses) if losses else None, "rate": rate}
        row |= {"samples_per_second": self._rows / seconds if seconds else None, "resident_bytes": machine.resident_bytes()}
        storage.append_line(self.folder / "metrics.jsonl", row)
        self._losses, self._rows, self._read_at = [], 0, p.training_seconds

    def evaluated(self, values: Mapping[str, float], monitor: str | None, mode: str | None, patience: int | None) -> bool:
        """Write down an evaluation's values by name; whether training should stop, as `monitor` (None: the loss) was no better
        in `patience` evaluations (None: never stop). Raises `BadInput` where what is to be watched is not among them."""
        now, p = time.monotonic(), self.position
        p.evaluating_seconds, self._mark = p.evaluating_seconds + now - self._mark, now
        named = {_short(name): float(value) for name, value in values.items()}
        wanted = _short(monitor) if monitor else next((name for name in named if "loss" in name), None)
        if wanted not in named:
            if monitor or patience is not None:
                asked = f"monitor={monitor!r} is not" if monitor else "no loss is"
                known = ", ".join(sorted(values)) or "nothing"
                raise errors.BadInput(f"{asked} among what was evaluated ({known}): name one of these with monitor=.")
            return False
        lower = any(word in wanted.lower() for word in LOW_IS_GOOD) if mode is None else mode == "min"
        score, best = named[wanted], p.best_score
        better = math.isfinite(score) and (best is None or (score < best if lower else score > best))
        if better:
            p.best_score, p.best_step, p.best_epoch, p.validation = score, p.step, self.epoch, named
        p.waited = 0 if better else p.waited + 1
        self.run = replace(self.run, metric=wanted, higher_is_better=not lower)
        loss = named.get("loss", named[wanted] if "loss" in wanted else None)
        row = {"kind": "validation", "step": p.step, "epoch": self.epoch, **named, "loss": loss, "score": score, "best": better}
        storage.append_line(self.folder / "metrics.jsonl", {**row, "seconds": p.training_seconds})
        if patience is None or p.waited < patience:
            return False
        why = f"no better {wanted} in {p.waited} evaluation{'s' * (p.waited > 1)}"
        self.decisions.take("stop", p.step, why=why)
        p.stopped_by = "plateau"
        self.note(f"step {p.step:,}: {why}: training stops.")
        return True

    def finish(self, rows: int, micro_batch: int, parameters: int, error: BaseException | None) -> Run:
        """Write `run.json` and `report.html`. `rows` are those of a batch, in parts of `micro_batch`; `error` is what ended a
        training that did not come to its end."""
        p, peak = self.position, machine.peak_resident_bytes()
        if self._losses:
            self._read()
        assert self.run.plan is not None
        plan = replace(self.run.plan, batch_size=rows * self.batches, micro_batch=micro_batch)
        measured = Footprint(
            peak_bytes=peak,
            runtime_bytes=self._idle_bytes,
            low_bytes=peak,
            high_bytes=peak,
            step_seconds=p.training_seconds / max(1, p.step),
            batch_size=plan.batch_size,
            micro_batch=micro_batch,
            basis="measurement",
            how="run",
            isolated=False,
        )
        seconds = {"training": p.training_seconds, "evaluating": p.evaluating_seconds, "wall": time.monotonic() - self._begun}
        self.run = replace(
            self.run,
            status="done" if error is None else "failed",
            job={**self.run.job, "batch_size": plan.batch_size},
            plan=plan,
            parameters=parameters,
            steps=p.step,
            epochs=self.epoch,
            stopped_by=p.stopped_by if error is None else type(error).__name__,
            measured=measured,
            best=None if p.best_score is None else Best(step=p.best_step, epoch=p.best_epoch, score=p.best_score),
            validation=p.validation or {},
            seconds=seconds,
            decisions=tuple(storage.read_lines(self.folder / "decisions.jsonl")),
        )
        storage.write_json(self.folder / "plan.json", plan)
        storage.write_json(self.folder / "run.json", self.run)
        lines = storage.read_lines(self.folder / "metrics.jsonl")
        machine.give_back_unused()
        try:
            here = machine.describe_for_report()
            path = write_report(self.folder, self.run, metrics=lines, shrunk=None, hardware=here)
        except (MemoryError, SystemError):  # the latter where a module cannot be read in for want of it
            self.note(f"memory ran out before the report was written: delest report {self.folder} writes it.")
        else:
            self.note(f"report: {path}")
        return self.run


def _claim(out: str | Path | None, job: dict[str, Any], plan: Plan) -> Path:
    """The folder of a new run, with its plan and what it is."""
    while True:
        folder = runs.place(out, job["name"], option="out=", resume="")
        try:
            runs.claim(folder, job, plan)
            return folder
        except errors.FolderTaken:
            if out is not None:
                raise


def _short(name: str) -> str:
    """Without the prefix by which loops tell validation from training."""
    return next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), name)
