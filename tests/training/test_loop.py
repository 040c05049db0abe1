"""The loop: schedule, stopping, setbacks, signals, exact resume, all in one process."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from delest import errors, storage
from delest.backends.torch.session import TorchSession
from delest.data import Feed, fit_preprocessing, open_source
from delest.job import Job, Recipe
from delest.metrics import named
from delest.records.plan import Plan
from delest.training import checkpoints
from delest.training.loop import Limits, Trainer


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


def data(rows: int = 120) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    labels = np.arange(rows) % 3
    return (random.normal(size=(rows, 4)) + 2 * np.eye(4)[labels]).astype(np.float32), labels


def trainer(folder, *, recipe=None, step=None, limits=None, factory=model, rows=120, validation=30) -> Trainer:
    torch.set_num_threads(1)
    recipe = recipe or Recipe(epochs=6, lr=0.01)
    job = Job(
        model=factory,
        data=data(rows),
        batch_size=16,
        recipe=recipe,
        step=step,
        predict=(lambda net, x: net(x)) if step else None,
    )
    source = open_source(job.data)
    cut = rows - validation
    prepared = fit_preprocessing(source, np.arange(cut))
    feeds = [Feed(source, index, prepared, batch_size=16) for index in (np.arange(cut), np.arange(cut, rows))]
    return Trainer(
        session=TorchSession(job, Plan(batch_size=16, micro_batch=16, threads=1), source.schema),
        train_feed=feeds[0],
        validation_feed=feeds[1],
        recipe=recipe,
        metric=named("accuracy"),
        folder=folder,
        limits=limits or Limits(),
    )


def final(made: Trainer) -> dict[str, np.ndarray]:
    return {name: array for name, array in made.session.state().arrays.items() if name.startswith(("model.", "optimizer."))}


def same(left, right) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def test_it_learns_and_writes_what_it_did(tmp_path):
    made = trainer(tmp_path)
    made.train()
    assert made.position.step == 36
    assert made.position.validation["accuracy"] > 0.7
    rows = storage.read_lines(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "validation"] == [6, 12, 18, 24, 30, 36]
    assert {"loss", "rate", "seconds", "samples_per_second", "resident_bytes"} <= rows[0].keys()
    best = load_file(tmp_path / "best.safetensors")
    assert same(best, made.session.weights())


def test_the_best_weights_are_in_the_session_at_the_end(tmp_path):
    made = trainer(tmp_path, recipe=Recipe(epochs=8, lr=0.3, schedule="constant"))
    made.train()
    scores = {
        row["step"]: (row["score"], -row["loss"])
        for row in storage.read_lines(tmp_path / "metrics.jsonl")
        if row["kind"] == "validation"
    }
    assert made.position.best_step == max(scores, key=scores.get)
    from delest.training.evaluate import evaluate

    assert evaluate(made.session, made.validation_feed, made.metric).score == pytest.approx(made.position.best_score)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("at", [1, 5, 6, 7, 20, 35])
def test_a_resumed_run_ends_bit_for_bit_like_one_that_was_not_interrupted(tmp_path, at):
    whole = trainer(tmp_path / "whole")
    whole.folder.mkdir()
    whole.train()
    expected, best = final(whole), storage.checksum(whole.folder / "best.safetensors")
    folder = tmp_path / "parts"
    folder.mkdir()
    first = trainer(folder, limits=Limits(checkpoint_seconds=0))
    step = first.session.step

    def stopping(batch, rate):
        if first.position.step == at:
            raise Stopped
        return step(batch, rate)

    first.session.step = stopping
    with pytest.raises(Stopped):
        first.train()
    second = trainer(folder)
    assert second.resume()
    assert second.position.step <= at
    second.train()
    assert same(expected, final(second))
    assert storage.checksum(folder / "best.safetensors") == best
    steps = [(row["kind"], row["step"]) for row in storage.read_lines(folder / "metrics.jsonl")]
    assert len(steps) == len(set(steps))


def test_patience_begins_the_decay_and_writes_the_decision(tmp_path):
    recipe = Recipe(epochs=40, lr=1e-7, patience=2, warmup=0.0)  # learns nothing
    made = trainer(tmp_path, recipe=recipe)
    made.train()
    lines = storage.read_lines(tmp_path / "decisions.jsonl")
    assert [line["kind"] for line in lines] == ["decay"]
    assert lines[0]["reason"] == made.position.stopped_by == "plateau"
    assert made.position.step == made.position.total_steps == lines[0]["total_steps"] < 240
    rates = [row["rate"] for row in storage.read_lines(tmp_path / "metrics.jsonl") if row["kind"] == "train"]
    assert rates[-1] < 0.5


def test_a_time_limit_begins_the_decay_and_a_resumed_run_follows_it(tmp_path):
    recipe = Recipe(epochs=400, lr=0.01, patience=1000)
    whole = trainer(tmp_path, recipe=recipe, limits=Limits(seconds=0.3, checkpoint_seconds=0))
    saved = []
    save = whole._save

    def copying():
        done = save()
        if whole.position.step == 3 and not saved:
            import shutil

            shutil.copytree(tmp_path, tmp_path.parent / "copy", dirs_exist_ok=True)
            saved.append(True)
        return done

    whole._save = copying
    whole.train()
    assert whole.position.stopped_by == "time"
    assert whole.position.total_steps < 400 * 6
    copy = tmp_path.parent / "copy"
    (copy / "decisions.jsonl").write_text((tmp_path / "decisions.jsonl").read_text())
    again = trainer(copy, recipe=recipe)
    assert again.resume()
    again.train()
    assert again.position.total_steps == whole.position.total_steps
    assert same(final(whole), final(again))
    assert len(storage.read_lines(copy / "decisions.jsonl")) == 1


def poisoned(times):
    """A step whose loss is NaN at the given calls."""
    calls = iter(range(10**9))

    def step(net, batch):
        loss = nn.functional.cross_entropy(net(batch.inputs), batch.targets)
        return loss * float("nan") if net.training and next(calls) in times else loss

    return step


def test_a_loss_that_is_not_finite_goes_back_with_half_the_rate(tmp_path):
    made = trainer(tmp_path, step=poisoned({15}))
    made.train()
    assert made.position.setbacks == 1
    assert made.position.rate_scale == 0.5
    assert made.position.step == 36
    line = storage.read_lines(tmp_path / "decisions.jsonl")[0]
    assert (line["kind"], line["at"], line["rate_scale"]) == ("setback", 12, 0.5)
    assert all(np.isfinite(array).all() for array in made.session.weights().values())
    steps = [row["step"] for row in storage.read_lines(tmp_path / "metrics.jsonl") if row["kind"] == "train"]
    assert steps == sorted(set(steps)), "what was undone is still in the metrics"


def test_the_third_time_it_stops_and_the_last_good_state_is_kept(tmp_path):
    made = trainer(tmp_path, step=poisoned(set(range(15, 10**4))))
    with pytest.raises(errors.Diverged, match=r"the 3rd time, at 0\.25 of the learning rate.*--lr"):
        made.train()
    state, position, _ = checkpoints.newest(tmp_path / "checkpoints")
    assert position["step"] == 12
    assert all(np.isfinite(array).all() for name, array in state.arrays.items() if name.startswith("model."))


def test_a_run_killed_after_a_setback_ends_like_one_that_was_not(tmp_path):
    """Resumed from the checkpoint before the setback, the decision is taken again without failing again."""
    whole = trainer(tmp_path, step=poisoned({15}))
    whole.train()
    copy = tmp_path.parent / "copied"
    copy.mkdir()
    lone = trainer(copy, step=poisoned(set()))
    (copy / "decisions.jsonl").write_text((tmp_path / "decisions.jsonl").read_text())
    lone.decisions = type(lone.decisions)(copy / "decisions.jsonl", 0)
    lone.train()
    assert lone.position.rate_scale == 0.5
    assert same(final(whole), final(lone))


@pytest.mark.parametrize(
    ("number", "during"), [(signal.SIGTERM, "step"), (signal.SIGINT, "step"), (signal.SIGTERM, "evaluation")]
)
def test_a_signal_saves_and_a_resume_ends_the_same(tmp_path, number, during):
    whole = trainer(tmp_path / "whole")
    whole.folder.mkdir()
    whole.train()
    folder = tmp_path / "stopped"
    folder.mkdir()
    first = trainer(folder)
    target, name = (first.session, "step") if during == "step" else (first.session, "outputs")
    original, calls = getattr(target, name), []

    def sending(*arguments):
        calls.append(1)
        if len(calls) == (9 if during == "step" else 2):
            os.kill(os.getpid(), number)
        return original(*arguments)

    setattr(target, name, sending)
    before = signal.getsignal(number)
    with pytest.raises(errors.Interrupted) as raised:
        first.train()
    assert raised.value.exit_status == 128 + number
    assert first.position.step == (9 if during == "step" else 12)
    assert signal.getsignal(number) == before
    second = trainer(folder)
    assert second.resume()
    second.train()
    assert same(final(whole), final(second))


def test_without_validation_rows_the_last_weights_are_kept(tmp_path):
    made = trainer(tmp_path, validation=0, rows=96)
    made.train()
    assert made.position.best_score is None
    assert same(load_file(tmp_path / "best.safetensors"), made.session.weights())


def test_metrics_are_json_without_nan(tmp_path):
    trainer(tmp_path).train()
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(word))
