"""A text through the verbs: looked at, estimated, trained, shrunk, reported, asked."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest

import delest
from delest import errors
from delest.backends.torch import starters
from delest.cli.predict import csv_text
from delest.shrinking import ladder, layer_times, pipeline
from delest.training.progress import Progress


def write_text(path, words: int = 4000) -> None:
    """Sentences of a small grammar."""
    random = np.random.default_rng(0)
    nouns, verbs = ("cat", "dog", "sailor", "queen"), ("sees", "follows", "finds")
    sentences = (f"the {random.choice(nouns)} {random.choice(verbs)} the {random.choice(nouns)}.\n" for _ in range(words // 5))
    path.write_text("".join(sentences))


def small(schema):
    return starters.CausalTransformer(schema.outputs, schema.input_shape[0], width=32, layers=2, heads=4)


@pytest.fixture
def job(tmp_path, monkeypatch) -> delest.Job:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "book.txt")
    recipe = delest.Recipe(epochs=6, lr=5e-3, precision="fp32", memory_format="contiguous")
    return delest.Job(model=small, data="book.txt", context=32, batch_size=16, recipe=recipe, name="book")


@pytest.fixture
def quick(monkeypatch):
    timed = pipeline.time_alternating
    monkeypatch.setattr(pipeline, "time_alternating", lambda calls: timed(calls, seconds=0.0))
    monkeypatch.setattr(layer_times, "_CALLS", 1)
    monkeypatch.setattr(ladder, "suitable_step", lambda threads: 4)
    monkeypatch.setattr(ladder, "RUNGS", 1)
    monkeypatch.setattr(ladder, "LEAST_EPOCHS", 0.0)


def test_a_text_goes_all_the_way(job, quick, monkeypatch):
    from delest import runs

    summary = delest.inspect(job)
    assert (summary.kind, summary.target) == ("text", "next")
    footprint = delest.estimate(job)
    assert footprint.peak_bytes > footprint.runtime_bytes
    run = delest.train(job, out="r", threads=1, say=Progress())
    assert (run.metric, run.higher_is_better) == ("loss", False)
    assert run.test["loss"] < 0.6 * run.data.baseline["loss"]
    monkeypatch.setattr(runs, "job_of", lambda folder, given: job)
    shrunk = delest.shrink("r", max_drop=1.0, time=8, threads=1, say=Progress())
    found = {candidate.name: candidate for candidate in shrunk.candidates}
    assert shrunk.max_drop == pytest.approx(found["torch"].selection["loss"])  # a share of the loss
    assert found["fp32"].bound.upper < 1e-3
    assert found["weights"].bound.rows == run.data.splits["selection"]
    assert found["dynamic"].selection["loss"] == pytest.approx(found["torch"].selection["loss"], rel=0.2)
    pruned = next(stage for stage in shrunk.stages if stage.name == "pruned-1")
    assert pruned.accepted, pruned.why
    assert pruned.parameters < 0.8 * run.parameters
    assert "loss" in (run.path / "report.html").read_text()

    answers = delest.predict("r", ["book.txt"])
    assert len(answers) == -(-len(Path("book.txt").read_text()) // 32)
    assert np.mean([answer["loss"] for answer in answers]) < 0.7 * run.data.baseline["loss"]
    assert list(csv.DictReader(io.StringIO(csv_text(answers))))[3]["input"] == "book.txt:3"
    network = delest.load("r", small)
    assert sum(parameter.numel() for parameter in network.parameters()) <= run.parameters


def test_only_the_loss_judges_a_text(job):
    from dataclasses import replace

    assert delest.inspect(replace(job, metric="loss")).kind == "text"
    for changes, words in (
        ({"metric": "accuracy"}, "the metric accuracy does not judge a text: use loss"),
        ({"loss": "mse"}, "the loss mse does not fit"),
        ({"context": 0}, "context is 0"),
    ):
        with pytest.raises(errors.BadInput, match=words):
            delest.inspect(replace(job, **changes))


def test_a_loss_of_ones_own_is_no_proof(job):
    from dataclasses import replace

    from delest.verbs.workplace import open_workplace

    own = replace(job, loss=lambda outputs, targets: outputs.square().mean())
    assert not open_workplace(own, Progress()).metric.by_row
    assert open_workplace(job, Progress()).metric.by_row


def test_a_text_alone_gets_a_batch_of_windows(tmp_path):
    from delest.verbs.workplace import open_workplace

    write_text(tmp_path / "book.txt")
    assert open_workplace(delest.Job(data=tmp_path / "book.txt"), Progress()).job.batch_size == 32
    told = delest.Job(data=tmp_path / "book.txt", batch_size=64, set_by={"batch_size": "command line"})
    assert open_workplace(told, Progress()).job.batch_size == 64
