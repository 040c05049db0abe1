"""A teacher and a student of the user's own in `delest.shrink`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import delest
from delest import errors, runs, storage
from delest.backends.torch import distillation
from delest.cli import main
from delest.shrinking import ladder, layer_times, pipeline
from delest.training.progress import Progress


def network(hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, 3))


class Student(nn.Module):
    """Built otherwise than the trained network: no cut of it."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 4), nn.Linear(4, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.tanh(self.inner(x)))


class Changed(Student):
    """The same weights, and another activation that no layer tells of."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.relu(self.inner(x)))


def rows(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    labels = np.arange(1200) % 3
    return (np.random.default_rng(seed).normal(size=(1200, 8)) + 3 * np.eye(8)[labels]).astype(np.float32), labels


def a_job(hidden: int, **changes) -> delest.Job:
    recipe = delest.Recipe(epochs=3, precision="fp32")
    return delest.Job(**{"model": lambda: network(hidden), "data": rows(), "batch_size": 32, "recipe": recipe, **changes})


@pytest.fixture
def trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    timed = pipeline.time_alternating
    monkeypatch.setattr(pipeline, "time_alternating", lambda calls: timed(calls, seconds=0.0))
    monkeypatch.setattr(layer_times, "_CALLS", 1)
    monkeypatch.setattr(ladder, "suitable_step", lambda threads: 8)
    monkeypatch.setattr(ladder, "RUNGS", 1)
    jobs = {"r": a_job(64), "t": a_job(256), "other": a_job(64, data=rows(1)), "split": a_job(64, seed=1)}
    monkeypatch.setattr(runs, "job_of", lambda folder, given: jobs[folder.name])
    return {name: delest.train(job, out=name, threads=1, say=Progress()) for name, job in jobs.items() if name == "r"}, jobs


ENOUGH = {"time": "12s", "max_drop": 0.3}  # for a student, also where something else computes


def shrink(**changes):
    return delest.shrink("r", **{"max_drop": 0.05, "time": "4s", "threads": 1, "say": Progress(), **changes})


def test_a_student_of_the_user_learns_first_and_is_a_candidate(trained):
    shrunk = shrink(student=Student, **ENOUGH)
    stage = shrunk.stages[0]
    assert (stage.name, stage.accepted, stage.parameters) == ("student", True, 51), stage.why
    forms = {one.name: one for one in shrunk.candidates}
    assert forms["student"].bound.upper <= 0.3
    assert forms["student"].file_bytes < forms["fp32"].file_bytes
    settings = storage.read_lines(Path("r/shrinking/decisions.jsonl"))[0]
    assert len(settings["student"]) == 64
    again = shrink(student=Student, **ENOUGH)
    assert again.stages[0] == stage, "what was decided is not decided again"
    other = shrink(student=Changed, **ENOUGH)
    assert storage.read_lines(Path("r/shrinking/decisions.jsonl"))[0]["student"] != settings["student"]
    assert other.stages[0].seconds != stage.seconds, "a student that computes otherwise learns anew"
    without = shrink()
    assert "student" not in [one.name for one in without.stages]


def test_a_student_that_ships_is_loaded_by_its_factory(trained, monkeypatch):
    monkeypatch.setattr(ladder, "RUNGS", 0)
    shrunk = shrink(student=Student, **ENOUGH)
    assert shrunk.stages[0].accepted, shrunk.stages[0].why
    small = "r/shrunk" if shrunk.shipped.startswith("student") else f"r/shrunk/{shrunk.small}"
    with pytest.raises(errors.BadInput, match="a student of your own: say what builds it"):
        delest.load(small)
    loaded = delest.load(small, Student)
    inputs, labels = rows()
    prepared = torch.from_numpy((inputs - inputs.mean(0)) / inputs.std(0))
    assert (loaded(prepared).argmax(1).numpy() == labels).mean() > 0.8


def test_a_teacher_is_a_finished_run_or_a_module(trained, monkeypatch):
    answered, teacher_of = [], distillation.Teacher.__init__

    def watched(self, session, **given):
        answered.append(sum(p.numel() for p in session.model.parameters()))
        teacher_of(self, session, **given)

    monkeypatch.setattr(distillation.Teacher, "__init__", watched)
    delest.train(trained[1]["t"], out="t", threads=1, say=Progress())
    assert shrink(teacher="t").stages
    assert shrink(teacher=network(128)).stages
    assert shrink().stages
    assert answered == [(8 + 1) * 256 + (256 + 1) * 3, (8 + 1) * 128 + (128 + 1) * 3, (8 + 1) * 64 + (64 + 1) * 3]


def test_what_does_not_fit_is_refused_before_anything_is_taught(trained, capsys):
    delest.train(trained[1]["other"], out="other", threads=1, say=Progress())
    delest.train(trained[1]["split"], out="split", threads=1, say=Progress())
    with pytest.raises(errors.BadInput, match="prepared otherwise|another split"):
        shrink(teacher="split")
    with pytest.raises(errors.BadInput, match="prepared otherwise"):
        shrink(teacher="other")
    with pytest.raises(errors.BadInput, match="the student: .*3 classes"):
        shrink(student=lambda: Student(outputs=2))
    with pytest.raises(errors.BadInput, match="names no model"):
        shrink(student=delest.Job(data="x.csv"))
    with pytest.raises(errors.BadInput, match="does not exist|no run"):
        shrink(teacher="nowhere")
    with pytest.raises(errors.BadInput, match="the teacher: .*3 classes"):
        shrink(teacher=Student(outputs=2))
    with pytest.raises(errors.BadInput, match="take time and validation rows"):
        shrink(student=Student, time=0)
    with pytest.raises(errors.BadInput, match="a str builds no network"):
        delest.load("r", "nets.py:small")
    assert main(["shrink", "r", "--student", "nets.py:job", "--quiet"]) == 2
    assert "nets.py does not exist" in capsys.readouterr().err
    assert not (runs.find("r") / "shrinking").exists()
