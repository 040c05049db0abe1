"""The verbs together, on small real work: budget, preview, time, weights to begin with, shrink, report, predict."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

import delest
from delest import errors, runs
from delest.backends.torch.model import fingerprint
from delest.training.progress import Progress


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(16 * 16, 4),
    )


def images(rows: int = 800) -> tuple[np.ndarray, np.ndarray]:
    random, labels = np.random.default_rng(0), np.arange(rows) % 4
    prototypes = random.integers(0, 200, (4, 8, 8))
    return np.clip(prototypes[labels] + random.integers(-30, 30, (rows, 8, 8)), 0, 255).astype(np.uint8), labels


@pytest.fixture
def job(tmp_path, monkeypatch) -> delest.Job:
    monkeypatch.chdir(tmp_path)
    return delest.Job(
        model=network, data=images(), batch_size=32, recipe=delest.Recipe(epochs=3, memory_format="contiguous"), name="small"
    )


class Notes(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_run_goes_all_the_way(job):
    run = delest.run(job, say=Progress())
    assert run.status == "done"
    assert run.test["accuracy"] > 0.9
    assert run.path == Path("runs/small-001")
    written = {path.name for path in run.path.iterdir()}
    assert {
        "job.json",
        "plan.json",
        "data.json",
        "preprocessing.json",
        "metrics.jsonl",
        "checkpoints",
        "best.safetensors",
        "run.json",
        "bundle",
        "shrunk",
        "report.html",
    } <= written
    assert json.loads((run.path / "run.json").read_text())["format"] == 1
    assert run.measured.basis == "measurement"
    assert run.plan.predicted.basis == "estimate"
    np.save("new.npy", images()[0][:5])
    answers = delest.predict(run.path, ["new.npy"])
    assert [answer["label"] for answer in answers] == ["0", "1", "2", "3", "0"]
    assert all(0.5 < answer["probability"] <= 1 for answer in answers)


def test_runs_count_up_and_the_same_seed_gives_the_same_weights(job):
    first, second = (delest.train(job, plan=one_plan(job), say=Progress()) for _ in range(2))  # a probe may choose otherwise
    assert (first.path.name, second.path.name) == ("small-001", "small-002")
    assert first.weights_sha256 == second.weights_sha256


def test_a_finished_run_is_shrunk_and_predicted_with_from_its_folder(job, tmp_path):
    (tmp_path / "job.py").write_text(
        "import numpy as np\nimport delest\nx = np.load('x.npy'); y = np.load('y.npy')\njob = delest.Job(data=(x, y), batch_size=32, recipe=delest.Recipe(epochs=2))\n"
    )
    x, y = images()
    np.save("x.npy", x)
    np.save("y.npy", y)
    run = delest.train("job.py", out="r", say=Progress())
    shrunk = delest.shrink("r", max_drop=0.02, say=Progress())
    assert shrunk.shipped in ("fp32", "int8")
    assert runs.read(Path("r")).weights_sha256 == run.weights_sha256
    assert delest.report("r").exists()


def test_a_budget_splits_the_batch_and_keeps_steps_and_schedule(job):
    whole = delest.train(job, say=Progress(), threads=1)
    tight = runs.read(whole.path).plan
    from dataclasses import replace

    from delest.records.plan import Choice

    split = replace(
        tight,
        choices=(*tight.choices, Choice(method="micro_batch", config={"rows": 8}, keeps="rounding", why="")),
        micro_batch=8,
    )
    parts = delest.train(job, plan=split, say=Progress())
    assert parts.steps == whole.steps
    rates = [
        [
            row["rate"]
            for row in map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines())
            if row["kind"] == "train"
        ]
        for run in (whole, parts)
    ]
    assert rates[0] == rates[1]
    assert parts.test["accuracy"] == pytest.approx(whole.test["accuracy"], abs=0.05)


def test_a_preview_says_what_the_full_run_will_take(job):
    notes = Notes()
    run = delest.train(job, preview="20%", say=notes)
    assert run.preview["rows"] == pytest.approx(0.2 * 560, abs=4)
    assert run.preview["full_seconds"] > 0
    assert any("the full run will take about" in note for note in notes.notes)
    assert run.steps == 3 * 18  # the run itself is whole


def test_a_preview_changes_nothing_about_the_run(job):
    plan = delest.plan(job, threads=1)  # one for both: what a probe finds faster differs from one moment to the next
    assert plan.model == fingerprint(network())
    plain = delest.train(job, plan=plan, say=Progress())
    assert delest.train(job, plan=plan, preview=0.2, say=Progress()).weights_sha256 == plain.weights_sha256


def test_training_begins_with_given_weights(job):
    torch.manual_seed(3)
    weights = {name: tensor.numpy() for name, tensor in network().state_dict().items()}
    save_file(weights, "start.safetensors")
    from dataclasses import replace

    run = delest.train(
        replace(job, recipe=delest.Recipe(epochs=1, lr=1e-12, weight_decay=0.0)), init_from="start.safetensors", say=Progress()
    )
    for name, array in load_file(run.path / "best.safetensors").items():
        np.testing.assert_allclose(array, weights[name], atol=1e-6)


def test_a_job_with_its_own_step_and_no_predict_is_trained_on_its_loss(job):
    from dataclasses import replace

    def step(net, batch):
        return nn.functional.cross_entropy(net(batch.inputs), batch.targets)

    run = delest.run(replace(job, step=step), say=Progress())
    assert run.metric == "loss"
    assert run.test.keys() == {"loss"}
    assert not (run.path / "bundle").exists()
    assert (run.path / "report.html").exists()


def test_resuming_a_job_of_objects_needs_the_job_and_a_finished_one_has_nothing_left(job):
    run = delest.train(job, say=Progress())
    with pytest.raises(errors.BadInput, match="no unfinished run of this job"):
        delest.train(job, resume=True, say=Progress())
    again = delest.train(job, out=run.path, resume=True, say=Progress())
    assert (again.weights_sha256, again.measured, again.seconds) == (run.weights_sha256, run.measured, run.seconds)
    with pytest.raises(errors.BadInput, match="pass it again"):
        delest.train(out=run.path, resume=True, say=Progress())


def test_tables_train_from_a_path_alone(job, tmp_path):
    random = np.random.default_rng(0)
    rows = ["size,colour,price"]
    for _ in range(600):
        size, colour = random.normal(), random.choice(["red", "blue"])
        rows.append(
            f"{'' if random.random() < 0.1 else f'{size:.3f}'},{colour},{100 + 20 * size + (30 if colour == 'red' else 0):.2f}"
        )
    Path("homes.csv").write_text("\n".join(rows))
    from delest.job import load, override

    run = delest.run(override(load("homes.csv"), {"target": "price", "batch_size": 32}), say=Progress())
    assert run.metric == "rmse"
    assert run.test["rmse"] < 0.6 * run.data.baseline["rmse"]
    answer = delest.predict(run.path, ["homes.csv"])[0]
    assert 20 < answer["value"] < 220


def test_a_preview_neither_follows_nor_writes_decisions_of_the_working_folder(job):
    line = json.dumps({"kind": "setback", "at": 0, "rate_scale": 0.0}) + "\n"
    Path("decisions.jsonl").write_text(line)
    run = delest.train(job, preview=0.3, say=Progress())
    assert run.preview["validation"]["accuracy"] > 0.5
    assert Path("decisions.jsonl").read_text() == line


def interrupted(job, monkeypatch, **settings) -> Path:
    """A run that a signal stopped after its first steps."""
    import signal

    from delest.backends.torch.session import TorchSession

    original, calls = TorchSession.step, []

    def stepping(self, batch, rate):
        calls.append(1)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGTERM)
        return original(self, batch, rate)

    with monkeypatch.context() as patch:
        patch.setattr(TorchSession, "step", stepping)
        with pytest.raises(errors.Interrupted) as raised:
            delest.train(job, out="stopped", say=Progress(), plan=one_plan(job), **settings)
    assert "resume=True" in str(raised.value)
    return Path("stopped")


def one_plan(job):
    from delest.records.plan import Plan

    return Plan(batch_size=job.batch_size, micro_batch=job.batch_size, threads=1)


def test_a_run_goes_on_with_the_settings_it_began_with(job, monkeypatch):
    from dataclasses import replace

    long = replace(job, recipe=replace(job.recipe, epochs=2000, patience=10_000))
    folder = interrupted(long, monkeypatch, time=2.0)
    for name, value in (("memory", "1GiB"), ("threads", 7), ("init_from", "w.safetensors")):
        with pytest.raises(errors.BadInput, match=f"--{name.replace('_', '-')}: a run goes on with the settings it began with"):
            delest.train(long, out=folder, resume=True, say=Progress(), **{name: value})
    run = delest.train(long, out=folder, resume=True, say=Progress())
    assert run.stopped_by == "time"


def test_a_run_without_its_checkpoints_begins_anew_and_says_so(job, monkeypatch):
    import shutil

    folder = interrupted(job, monkeypatch)
    shutil.rmtree(folder / "checkpoints")
    notes = Notes()
    run = delest.train(job, out=folder, resume=True, say=notes)
    assert any("training begins anew" in note for note in notes.notes)
    steps = [
        row["step"] for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if row["kind"] == "train"
    ]
    assert steps == sorted(set(steps))
    assert run.weights_sha256 == delest.train(job, plan=one_plan(job), say=Progress()).weights_sha256


def test_a_plan_and_a_budget_together_are_refused(job):
    with pytest.raises(errors.BadInput, match="the plan that was given says so already"):
        delest.train(job, plan=one_plan(job), memory="1GiB", say=Progress())


class Unexportable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 4)

    def forward(self, x):
        scores = self.inner(x.flatten(1))
        return scores if scores.sum().item() > 0 else scores + 0  # a branch on data has no graph


def test_a_model_that_cannot_be_exported_is_trained_and_reported(job):
    from dataclasses import replace

    with pytest.raises(errors.DelestError):
        delest.run(replace(job, model=Unexportable), say=Progress())
    assert runs.read(Path("runs/small-001")).status == "done"
    assert Path("runs/small-001/report.html").exists()
    assert not Path("runs/small-001/bundle").exists()


def test_a_killed_shrink_is_gone_on_with(job, monkeypatch):
    from delest.shrinking import pipeline

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "quantize", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            delest.run(job, say=Progress())
    run = delest.run(job, resume=True, say=Progress())
    assert run.path == Path("runs/small-001")
    assert (run.path / "shrunk" / "shrink.json").exists()


def test_data_alone_get_a_batch_that_fits(job):
    x, y = images(60)
    np.savez("few.npz", x=x, y=y)
    assert delest.train("few.npz", say=Progress()).plan.batch_size == 5


def test_a_run_that_is_overtaken_takes_the_next_folder(job, monkeypatch):
    claim, overtaken = runs.claim, []

    def claiming(folder, *arguments, **named):
        if not overtaken:
            overtaken.append(folder)
            claim(folder, *arguments, **named)  # another process was faster
        claim(folder, *arguments, **named)

    monkeypatch.setattr(runs, "claim", claiming)
    assert delest.train(job, say=Progress()).path.name == "small-002"
    overtaken.clear()
    with pytest.raises(errors.FolderTaken):
        delest.train(job, out="mine", say=Progress())
