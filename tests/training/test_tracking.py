"""Trackers: which there are, what they are told, and that a training outlives them. Real ones where they are installed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import delest
from delest import errors
from delest.records.run import Run
from delest.training import tracking

JOB = """
import numpy as np
import torch

import delest

random = np.random.default_rng(0)
rows = random.normal(size=(640, 4)).astype(np.float32)


def net():
    return torch.nn.Linear(4, 2)


job = delest.Job(model=net, data=(rows, (rows.sum(1) > 0).astype(np.int64)), batch_size=32, recipe=delest.Recipe(epochs=4), name="tiny")
"""


def installed(name: str) -> bool:
    return all(importlib.util.find_spec(module) for module in tracking._MODULES[name])


def needs(name: str) -> Any:
    return pytest.mark.skipif(not installed(name), reason=f"`make test-keras` runs this test, where {name} is installed")


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.py").write_text(JOB)
    return tmp_path / "job.py"


def test_names_are_told_by_commas_or_one_by_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: object())
    assert tracking.read_names(None) == ()
    assert tracking.read_names("TensorBoard, mlflow,") == ("tensorboard", "mlflow")
    assert tracking.read_names(["mlflow", "mlflow"]) == ("mlflow",)


def test_an_unknown_tracker_is_refused_before_training(job: Path):
    with pytest.raises(errors.BadInput, match=r"tensorbord.*tensorboard"):
        delest.train(job, track="tensorbord")
    assert not (job.parent / "runs").exists()


def test_what_is_not_installed_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None if name == "sqlalchemy" else object())
    with pytest.raises(errors.MissingExtra, match=r"sqlalchemy.*delest\[tracking\]"):
        tracking.read_names("mlflow")


told: list[Any] = []


class Fake:
    place = "here"

    def __init__(self, run: Run, step: int):
        self.step = step

    def write(self, row: Any) -> None:
        told.append(row)
        if row["step"] > 20:
            raise OSError("the disk is full\nreally")

    def close(self, run: Run) -> None:
        raise AssertionError("it was left out")


def test_a_tracker_that_fails_is_left_out_and_the_training_goes_on(job: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(tracking, "TensorBoard", Fake)
    monkeypatch.setattr(tracking, "read_names", lambda names: ("tensorboard",))
    run = delest.train(job, track="tensorboard")
    assert run.status == "done"
    assert run.steps > 20
    assert [row["step"] for row in told if row["step"] > 20] == [max(row["step"] for row in told)]
    assert "tensorboard is told nothing more: OSError: the disk is full\n" in capsys.readouterr().err


def test_what_is_no_name_is_refused():
    with pytest.raises(errors.BadInput, match="track=3"):
        tracking.read_names(3)  # type: ignore[arg-type]


@needs("mlflow")
def test_a_store_that_cannot_be_opened_is_left_out_and_the_training_goes_on(job: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////proc/nowhere/mlflow.db")
    assert delest.train(job, track="mlflow").status == "done"
    assert "mlflow is told nothing more: " in capsys.readouterr().err


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of the store that MLflow makes where nothing names one."""
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")


def only_run(store: Any) -> Any:
    (found,) = store.search_runs([store.get_experiment_by_name("tiny").experiment_id])
    return found


def events_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


@needs("tensorboard")
def test_tensorboard_has_the_rows_of_the_run(job: Path):
    run = delest.train(job, track="tensorboard")
    found = events_of(run.path / "tensorboard")
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    for kind, name in (("train", "loss"), ("train", "rate"), ("validation", "accuracy")):
        rows = [(line["step"], line[name]) for line in lines if line["kind"] == kind]
        assert [step for step, _ in found[f"{kind}/{name}"]] == [step for step, _ in rows]
        np.testing.assert_allclose([value for _, value in found[f"{kind}/{name}"]], [value for _, value in rows], rtol=1e-6)
    assert found["test/accuracy"][0][1] == pytest.approx(run.test["accuracy"])


@needs("tensorboard")
@pytest.mark.parametrize("step", [0, 20])
def test_what_was_written_before_a_run_went_on_is_void(tmp_path: Path, step: int):
    run = Run(path=tmp_path, name="run", status="running")
    first = tracking.TensorBoard(run, 0)
    for step in (10, 20, 30):
        first.write({"kind": "train", "step": step, "loss": 1.0})
    second = tracking.TensorBoard(run, step)
    second.write({"kind": "train", "step": 30, "loss": 2.0})
    second.went_back(20)
    second.write({"kind": "train", "step": 30, "loss": 3.0})
    second.close(replace(run, status="done"))
    kept = [(10, 1.0), (20, 1.0)] if step else []
    assert events_of(tmp_path / "tensorboard")["train/loss"] == [*kept, (30, 3.0)]


@needs("tensorboard")
def test_tensorboard_loads_no_tensorflow(job: Path):
    code = "import delest, sys; delest.train('job.py', track='tensorboard'); assert 'tensorflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=job.parent)


@needs("mlflow")
def test_names_that_mlflow_does_not_take_are_written_otherwise(tmp_path: Path, store):
    run = Run(path=tmp_path, name="run", status="done", job={"name": "tiny"})
    tracker = tracking.MLflow(run, 0)
    tracker.write({"kind": "validation", "step": 10, "mAP@0.5": 0.25})
    tracker.close(run)
    assert only_run(store).data.metrics["validation/mAP_0.5"] == 0.25


@needs("mlflow")
def test_mlflow_has_the_run_in_its_sqlite_store(job: Path, store):
    run = delest.train(job, track="mlflow,tensorboard")
    assert (run.path / "tensorboard").exists()
    found = only_run(store)
    assert found.info.status == "FINISHED"
    assert found.data.params["recipe.epochs"] == "4"
    assert found.data.metrics["test/accuracy"] == pytest.approx(run.test["accuracy"])
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    losses = [(one.step, one.value) for one in store.get_metric_history(found.info.run_id, "train/loss")]
    assert losses == [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]


@needs("mlflow")
def test_a_run_that_goes_on_is_the_same_run_of_mlflow(tmp_path: Path, store, monkeypatch: pytest.MonkeyPatch):
    run = Run(path=tmp_path, name="run", status="running", job={"name": "tiny"})
    first = tracking.MLflow(run, 0)
    first.write({"kind": "validation", "step": 10, "loss": 1.0})
    first.close(replace(run, status="interrupted"))
    assert only_run(store).info.status == "KILLED"
    monkeypatch.chdir("/")
    second = tracking.MLflow(run, 10)
    second.write({"kind": "validation", "step": 20, "loss": 0.5})
    second.close(replace(run, status="done"))
    found = only_run(store)
    assert found.info.status == "FINISHED"
    assert [one.step for one in store.get_metric_history(found.info.run_id, "validation/loss")] == [10, 20]
