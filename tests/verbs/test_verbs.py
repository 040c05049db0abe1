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
    first, second = delest.train(job, say=Progress(), threads=1), delest.train(job, say=Progress(), threads=1)
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
    parts = delest.train(job, plan=split, say=Progress(), threads=1)
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
    plain = delest.train(job, say=Progress(), threads=1)
    assert delest.train(job, preview=0.2, say=Progress(), threads=1).weights_sha256 == plain.weights_sha256


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
