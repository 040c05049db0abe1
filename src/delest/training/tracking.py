"""What a training tells trackers as it goes: event files of TensorBoard in the run's folder, and MLflow's store.

They get the rows of `metrics.jsonl`, which stays the record: a tracker that fails is left out, and the training goes on.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from delest import errors, storage
from delest.job import unknown
from delest.records.form import to_plain
from delest.records.run import Run

SEND_SECONDS = 2.0  # between two messages to MLflow's store, of steps
_MODULES = {"tensorboard": ("tensorboard",), "mlflow": ("mlflow", "sqlalchemy", "alembic")}
_ABOUT_THE_ROW = ("kind", "step", "best")
_UNNAMED = re.compile(r"[^\w\-. :/]", re.ASCII)  # what MLflow allows in no name
_STATUS = {"done": "FINISHED", "interrupted": "KILLED"}


class Tracker(Protocol):
    """One place that rows are written to."""

    place: str  # where they can be looked at, in words

    def write(self, row: Mapping[str, Any]) -> None:
        """A row as of `metrics.jsonl`: its `kind`, its `step`, and numbers by name."""

    def went_back(self, step: int) -> None:
        """What was written of later steps is void: they are made again."""

    def close(self, run: Run) -> None:
        """The training has ended as `run` says."""


def read_names(names: str | Sequence[str] | None) -> tuple[str, ...]:
    """Trackers by name, of "tensorboard,mlflow" or a sequence. Raises `BadInput` for one that is not known, `MissingExtra` for one that is not installed."""
    if names is not None and not isinstance(names, (str, Sequence)):
        raise errors.BadInput(f"track={names!r}: give names of trackers, as {', '.join(_MODULES)}.")
    given = names.split(",") if isinstance(names, str) else list(names or ())
    found = tuple(dict.fromkeys(word.strip().lower() for word in map(str, given) if word.strip()))
    for name in found:
        if name not in _MODULES:
            raise errors.BadInput(unknown("tracker", name, tuple(_MODULES)))
        if missing := [module for module in _MODULES[name] if importlib.util.find_spec(module) is None]:
            raise errors.MissingExtra(
                f"--track {name} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
                "pip install 'delest[tracking]'."
            )
    return found


class Tracking:
    """The trackers of one training. One that fails, when it is opened too, is named by `note` and left out."""

    def __init__(self, names: Sequence[str], run: Run, step: int, note: Callable[[str], None]):
        """`step` is where the training begins: of a run that goes on, what was written of later steps is void."""
        openers: dict[str, Callable[[Run, int], Tracker]] = {"tensorboard": TensorBoard, "mlflow": MLflow}
        self._note, self._open = note, dict[str, Tracker]()
        for name in names:
            try:
                self._open[name] = openers[name](run, step)
                note(f"tracked: {self._open[name].place}")
            except Exception as error:
                self._leave_out(name, error)

    def write(self, row: Mapping[str, Any]) -> None:
        self._each(lambda tracker: tracker.write(row))

    def went_back(self, step: int) -> None:
        self._each(lambda tracker: tracker.went_back(step))

    def close(self, run: Run) -> None:
        self._each(lambda tracker: tracker.close(run))

    def _each(self, work: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                work(tracker)
            except Exception as error:
                del self._open[name]
                self._leave_out(name, error)

    def _leave_out(self, name: str, error: Exception) -> None:
        words = str(error).partition("\n")[0]
        self._note(f"{name} is told nothing more: {type(error).__name__}: {words}")


class TensorBoard:
    """An event file in `RUN/tensorboard`; TensorBoard reads all that are there as one run."""

    def __init__(self, run: Run, step: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder = run.path / "tensorboard"
        folder.mkdir(exist_ok=True)
        goes_on = any(folder.iterdir())
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(folder / name, "wb")  # noqa: SIM115  # as long as the training
        self._writer, self._event, self._summary = RecordWriter(self._file), Event, Summary
        self._start = SessionLog(status=SessionLog.START)
        self.place = f"tensorboard --logdir {run.path.parent}"
        self._add(file_version="brain.Event:2")
        if goes_on:
            self.went_back(step)

    def write(self, row: Mapping[str, Any]) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in _numbers(row)]
        self._add(step=row["step"], summary=self._summary(value=values))

    def went_back(self, step: int) -> None:
        self._add(step=step + 1, session_log=self._start)

    def close(self, run: Run) -> None:
        if run.test:
            self.write({"kind": "test", "step": run.steps, **run.test})
        self._file.close()

    def _add(self, **content: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), **content).SerializeToString())
        self._writer.flush()


class MLflow:
    """A run in the store of MLFLOW_TRACKING_URI, else in the SQLite file mlflow.db of the working folder; its experiment has the job's name."""

    def __init__(self, run: Run, step: int):
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric, self._waiting, self._sent = Metric, list[Any](), time.monotonic()
        kept = run.path / "mlflow.json"
        if kept.exists():
            known = json.loads(kept.read_text())
            self._client, self._id = MlflowClient(known["store"]), known["run"]
            self._client.update_run(self._id, status="RUNNING")
        else:
            store = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"
            self._client = MlflowClient(store)
            title = str(run.job.get("name") or run.name)
            experiment = self._client.get_experiment_by_name(title)
            number = self._client.create_experiment(title) if experiment is None else experiment.experiment_id
            self._id = self._client.create_run(
                number, run_name=run.name, tags={"delest.run": str(run.path.resolve())}
            ).info.run_id
            params = [Param(name, str(value)[:6000]) for name, value in _settings(run)]
            self._client.log_batch(self._id, params=params)
            storage.write_atomic(kept, json.dumps({"store": store, "run": self._id}))
        self.place = f"MLflow run {self._id} in {self._client.tracking_uri}"

    def write(self, row: Mapping[str, Any]) -> None:
        moment = int(time.time() * 1000)
        self._waiting += [self._metric(_UNNAMED.sub("_", name), value, moment, row["step"]) for name, value in _numbers(row)]
        if row["kind"] != "train" or time.monotonic() - self._sent >= SEND_SECONDS:
            self._send()

    def went_back(self, step: int) -> None:
        """What is in the store stays there: both values of a step."""
        self._waiting = [metric for metric in self._waiting if metric.step <= step]

    def close(self, run: Run) -> None:
        ended = {"kind": "test", "step": run.steps, **run.test}
        if run.measured is not None:
            ended["peak_bytes"] = run.measured.peak_bytes
        self.write(ended)
        self._client.set_terminated(self._id, _STATUS.get(run.status, "FAILED"))

    def _send(self) -> None:
        waiting, self._waiting = self._waiting, []
        for begin in range(0, len(waiting), 1000):  # as many as the store takes at once
            self._client.log_batch(self._id, metrics=waiting[begin : begin + 1000])
        self._sent = time.monotonic()


def _numbers(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """What a row tells, by "train/loss" and the like."""
    for name, value in row.items():
        if name not in _ABOUT_THE_ROW and isinstance(value, (int, float)):
            yield f"{row['kind']}/{name}", float(value)


def _settings(run: Run) -> Iterator[tuple[str, Any]]:
    """The job's plain fields, its recipe's, and what the plan chose."""
    job = dict(to_plain(run.job))
    for group in ("recipe", "split"):
        yield from ((f"{group}.{name}", value) for name, value in (job.pop(group, None) or {}).items())
    yield from job.items()
    if run.plan is not None:
        yield "plan.micro_batch", run.plan.micro_batch
        yield "plan.methods", ", ".join(choice.method for choice in run.plan.choices)
    yield "parameters", run.parameters
