"""Narrower networks through the verbs: made, judged, shipped, loaded, gone on with."""

from __future__ import annotations

import json
import re
import signal

import numpy as np
import pytest
import torch
from torch import nn

import delest
from delest import errors, runs, storage
from delest.cli import main
from delest.detection import MeanAveragePrecision
from delest.records.shrunk import Bound
from delest.shrinking import ladder, layer_times, pipeline
from delest.training.progress import Progress


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.second = nn.Conv2d(32, 64, 3, padding=1)
        self.head = nn.Linear(64 * 16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.norm(self.first(x))), 2)
        return self.head(torch.relu(self.second(x)).flatten(1))


class Bessel(nn.Module):
    """Computes what ONNX has no operator for."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + torch.special.bessel_j0(x.detach()).sum(1, keepdim=True)


def images(rows: int = 1500) -> tuple[np.ndarray, np.ndarray]:
    random, labels = np.random.default_rng(0), np.arange(rows) % 4
    prototypes = random.integers(0, 200, (4, 8, 8))
    return np.clip(prototypes[labels] + random.integers(-30, 30, (rows, 8, 8)), 0, 255).astype(np.uint8), labels


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few timed calls, and always the same step: these tests promise nothing about speed."""
    timed = pipeline.time_alternating
    monkeypatch.setattr(pipeline, "time_alternating", lambda calls: timed(calls, seconds=0.0))
    monkeypatch.setattr(layer_times, "_CALLS", 1)
    monkeypatch.setattr(ladder, "suitable_step", lambda threads: 8)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = delest.Recipe(epochs=3, memory_format="contiguous", precision="fp32")
    job = delest.Job(model=Network, data=images(), batch_size=32, recipe=recipe, name="small")
    return delest.train(job, out="r", threads=1, say=Progress()), job


@pytest.fixture
def shrinkable(run, monkeypatch):
    """A run whose job has no file to come from."""
    found, job = run
    monkeypatch.setattr(runs, "job_of", lambda folder, given: job)
    return found.path


def shrink(folder, **changes):
    return delest.shrink(folder, **{"max_drop": 0.05, "time": "6s", "threads": 1, "say": Progress(), **changes})


def test_narrower_networks_learn_and_ship_and_are_loaded_without_pickle(shrinkable):
    shrunk = shrink(shrinkable)
    assert shrunk.stages[0].accepted, shrunk.stages
    names = [candidate.name for candidate in shrunk.candidates]
    assert names[:7] == ["torch", "fp32", "int8", "weights", "pruned-1", "pruned-1-int8", "pruned-1-weights"]
    plain, narrow = (next(one for one in shrunk.candidates if one.name == name) for name in ("fp32", "pruned-1"))
    assert narrow.parameters < 0.65 * plain.parameters
    assert narrow.file_bytes < 0.7 * plain.file_bytes
    assert narrow.bound.upper <= 0.05
    small = next(one for one in shrunk.candidates if one.name == shrunk.small)
    assert small.file_bytes == min(one.file_bytes for one in shrunk.candidates if one.kept and one.file_bytes)
    assert shrunk.shipped not in ("fp32", "int8", "weights")
    loaded = delest.load(shrinkable, Network)
    assert sum(parameter.numel() for parameter in loaded.parameters()) == next(
        one.parameters for one in shrunk.candidates if one.name == shrunk.shipped
    )
    architecture = json.loads((shrinkable / "shrunk" / "architecture.json").read_text())
    assert architecture["tensors"]["head.weight"]["before"] == [4, 1024] > architecture["tensors"]["head.weight"]["now"]
    with pytest.raises(errors.BadInput, match="another network"):
        delest.load(shrinkable / "shrunk", lambda: nn.Linear(3, 3))


def test_a_wish_that_nothing_meets_ships_the_nearest_and_says_so(shrinkable):
    with pytest.raises(errors.AccuracyNotMet, match="the nearest is") as raised:
        shrink(shrinkable, time=0, size="1kB", latency="5ms")
    assert raised.value.exit_status == 4
    assert (shrinkable / "shrunk" / "model.onnx").exists()
    assert (shrinkable / "report.html").exists()


def test_a_latency_below_any_form_ends_with_4_and_names_the_nearest(shrinkable, capsys, monkeypatch):
    assert main(["shrink", str(shrinkable), "--time", "0", "--max-drop", "5%", "--latency", "0.001ms", "--quiet"]) == 4
    said = capsys.readouterr().err
    shipped = json.loads((shrinkable / "shrunk" / "shrink.json").read_text())["shipped"]
    assert "no form within the accuracy bound answers in 1 µs" in said
    assert f"the nearest is {shipped}" in said


def test_what_the_rows_cannot_prove_says_how_many_would(shrinkable):
    shrunk = shrink(shrinkable, time=0, max_drop=0.0005)
    assert shrunk.shipped == "fp32"
    assert any(re.search(r"too few rows to prove it; about [\d,]+ such rows would", one.why) for one in shrunk.candidates)


def test_a_network_without_an_onnx_form_names_the_operator_and_stays_usable(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    data = random.normal(size=(300, 6)).astype(np.float32), np.arange(300) % 3
    recipe = delest.Recipe(epochs=1, precision="fp32")
    job = delest.Job(model=Bessel, data=data, batch_size=32, recipe=recipe, name="bessel")
    delest.train(job, out="r", threads=1, say=Progress())
    monkeypatch.setattr(runs, "job_of", lambda folder, given: job)
    assert main(["shrink", "r", "--time", "0", "--quiet"]) == 2
    said = capsys.readouterr().err
    assert "the operator prims.bessel_j0 has no ONNX form" in said
    assert "The trained model is kept" in said
    assert not [name for name in ("bundle", "shrunk") if (tmp_path / "r" / name).exists()]
    kept = delest.load("r", Bessel)
    assert kept.layer.weight.shape == (3, 6)
    assert not torch.equal(kept.layer.weight, Bessel().layer.weight)


def test_data_that_changed_since_training_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = [f"{value % 7},{value % 3},{'yes' if value % 2 else 'no'}\n" for value in range(300)]
    (tmp_path / "loans.csv").write_text("income,years,repaid\n" + "".join(lines))
    job = delest.Job(data="loans.csv", target="repaid", batch_size=32, recipe=delest.Recipe(epochs=1))
    delest.train(job, out="r", threads=1, say=Progress())
    monkeypatch.setattr(runs, "job_of", lambda folder, given: job)
    before = sorted(path.name for path in (tmp_path / "r").iterdir())
    (tmp_path / "loans.csv").write_text("income,years,repaid\n" + "".join(reversed(lines)))
    assert main(["shrink", "r", "--time", "0", "--quiet"]) == 2
    assert (
        "the data have changed since r was started with 300 rows of 2 columns in loans.csv: its content is another now"
        in capsys.readouterr().err
    )
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == before


def test_without_time_the_network_keeps_its_widths(shrinkable):
    shrunk = shrink(shrinkable, time=0)
    assert [candidate.name for candidate in shrunk.candidates] == ["torch", "fp32", "int8", "weights"]
    assert [path.name for path in (shrinkable / "shrinking").iterdir()] == ["decisions.jsonl"]


def test_what_cannot_be_proven_is_taken_back(shrinkable, monkeypatch):
    unsure = Bound(drop=0.0, upper=0.2, rows=40, disagreeing=0.1)
    monkeypatch.setattr(ladder, "bound_drop", lambda *given: unsure)
    shrunk = shrink(shrinkable)
    assert [stage.upper for stage in shrunk.stages] == [0.2] * len(shrunk.stages)
    assert shrunk.stages
    assert not any(stage.accepted for stage in shrunk.stages)
    assert not any(name.startswith("pruned") for name in (one.name for one in shrunk.candidates))
    assert teaching(shrinkable)["teacher"], "what is not surely better is not believed"


def teaching(folder):
    lines = (folder / "shrinking" / "decisions.jsonl").read_text().splitlines()
    return next(line for line in map(json.loads, lines) if line["kind"] == "teaching")


def test_where_targets_alone_surely_teach_better_the_trained_network_is_not_asked(shrinkable, monkeypatch):
    train, taught = ladder.Trainer.train, []

    def watched(self):
        taught.append((self.saving, type(self.session).__name__))
        train(self)

    monkeypatch.setattr(ladder.Trainer, "train", watched)
    monkeypatch.setattr(ladder, "LEAST_EPOCHS", 0.0)  # a rung is short here
    monkeypatch.setattr(ladder, "bound_drop", lambda *given: Bound(drop=-0.1, upper=-0.05, rows=40, disagreeing=0.1))
    shrunk = shrink(shrinkable)
    line = teaching(shrinkable)
    assert (line["teacher"], line["on"]) == (False, "pruned-1")
    assert 0 < line["seconds"] < shrunk.stages[0].seconds
    assert taught[:2] == [(False, "StudentSession"), (False, "TorchSession")]
    assert len(taught) > 3
    assert set(taught[2:]) == {(True, "TorchSession")}


def test_a_network_that_nearly_kept_its_accuracy_learns_on(shrinkable, monkeypatch):
    uppers = iter([0.01, 0.1, 0.01])  # of which 0.05 are allowed
    monkeypatch.setattr(ladder.Ladder, "_choose_teacher", lambda self, *given: (self._teacher, 0.0))
    monkeypatch.setattr(ladder, "bound_drop", lambda *given: Bound(drop=0.0, upper=next(uppers, 0.4), rows=40, disagreeing=0.1))
    _, first, second, *_ = shrink(shrinkable, time="9s").stages
    assert (first.accepted, second.accepted) == (False, True)
    assert first.parameters == second.parameters
    home = shrinkable / "shrinking"
    begun = {line["name"]: line for line in storage.read_lines(home / "decisions.jsonl") if line["kind"] == "begun"}
    assert (begun["pruned-3"]["from"], begun["pruned-3"]["remove"]) == ("pruned-2", 0.0)
    assert (home / "pruned-3" / "cut.safetensors").read_bytes() == (home / "pruned-2" / "best.safetensors").read_bytes()
    learnt = (home / "pruned-3" / "best.safetensors").read_bytes()
    for path in [path for path in home.rglob("*") if path.is_file() and path.name != "decisions.jsonl"]:
        path.unlink()
    shrink(shrinkable, time="9s")  # by the journal alone
    assert (home / "pruned-3" / "best.safetensors").read_bytes() == learnt


@pytest.mark.parametrize(
    ("keep", "upper", "then"),
    [
        (0.25, 0.0037, 0.406),
        (0.25, 0.006, 0.5),
        (0.5, 0.006, 0.707),
        (0.25, 0.3, 0.8),
        (0.25, None, 0.8),
        (0.25, 0.0, 0.406),
        (0.7, 0.0031, 0.793),
    ],
)
def test_the_rung_after_one_that_failed_leaves_more_the_more_was_lost(keep, upper, then):
    assert ladder._gentler(keep, upper, 0.003) == pytest.approx(then, abs=1e-3)


def test_an_interrupted_shrink_ships_what_was_kept_and_goes_on_with_what_was_decided(shrinkable, monkeypatch):
    train, trained = ladder.Trainer.train, []

    def interrupted(self):
        if self.saving:
            trained.append(self.folder.name)
        if len(trained) == 2:
            raise errors.Interrupted(2, "")
        train(self)

    monkeypatch.setattr(ladder.Trainer, "train", interrupted)
    with pytest.raises(errors.Interrupted, match="delest shrink r --max-drop 0.05 --time 6s --threads 1"):
        shrink(shrinkable)
    architecture = json.loads((shrinkable / "shrunk" / "architecture.json").read_text())
    assert architecture["form"].startswith("pruned-1")
    journal = [json.loads(line) for line in (shrinkable / "shrinking" / "decisions.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["name"]) for line in journal][1:7] == [
        ("step", ""),
        ("begun", "pruned-1"),
        ("layers", "pruned-1"),
        ("teaching", ""),
        ("decided", "pruned-1"),
        ("begun", "pruned-2"),
    ]
    cut = (shrinkable / "shrinking" / "pruned-2" / "architecture.json").read_text()
    shrunk = shrink(shrinkable)
    assert trained[:3] == ["pruned-1", "pruned-2", "pruned-2"]
    assert (shrinkable / "shrinking" / "pruned-2" / "architecture.json").read_text() == cut
    assert shrunk.stages[0].seconds == journal[5]["seconds"]
    for name in {shrunk.fast, shrunk.small} - {shrunk.shipped}:
        assert delest.load(shrinkable / "shrunk" / name, Network) is not None


def test_a_signal_before_anything_was_taught_ships_the_forms_of_the_trained_network(shrinkable, monkeypatch):
    timed, sent = ladder.time_layers, []

    def signalled(*given, **named):
        if not sent:  # a second one ends it at once
            sent.append(True)
            signal.raise_signal(signal.SIGINT)
        return timed(*given, **named)

    monkeypatch.setattr(ladder, "time_layers", signalled)
    with pytest.raises(errors.Interrupted) as raised:
        shrink(shrinkable)
    assert raised.value.signal_number == signal.SIGINT
    assert json.loads((shrinkable / "shrunk" / "shrink.json").read_text())["shipped"] in ("int8", "weights")
    assert not list((shrinkable / "shrinking").glob("pruned-1/checkpoints"))


def test_a_damaged_rung_is_taught_again(run, shrinkable):
    seconds = max(2.0, 10 * run[0].seconds["training"])  # of which a fifth is for the first rung, also on a busy machine
    before = shrink(shrinkable, time=seconds)
    assert before.stages[0].accepted
    best = shrinkable / "shrinking" / "pruned-1" / "best.safetensors"
    whole = best.read_bytes()
    best.write_bytes(whole[:-4] + b"gone")
    after = shrink(shrinkable, time=seconds)
    assert after.stages == before.stages
    assert best.read_bytes() == whole


def test_a_rung_that_diverges_is_taken_back_and_gone_on_from(shrinkable, monkeypatch):
    def diverges(self):
        raise errors.Diverged("the loss is nan")

    monkeypatch.setattr(ladder.Trainer, "train", diverges)
    for _ in range(2):  # the second time from the journal: no weights were written
        shrunk = shrink(shrinkable)
        assert [(stage.accepted, stage.why) for stage in shrunk.stages] == [(False, "the loss is nan")] * 2
        assert not any(one.name.startswith("pruned") for one in shrunk.candidates)


def test_time_that_is_too_short_for_half_an_epoch_says_what_would_do(shrinkable):
    notes = []
    said = Progress()
    said.note = notes.append
    shrunk = shrink(shrinkable, time=0.001, say=said)
    assert not shrunk.stages
    assert any("too short to teach a narrower network: give --time" in note for note in notes)


def test_bad_lengths_and_sizes_are_named(shrinkable):
    with pytest.raises(errors.BadInput, match="'soon' is not a length of time"):
        shrink(shrinkable, time="soon")
    for size in ("small", "80%"):  # of what?
        with pytest.raises(errors.BadInput, match=f"'{size}' is not a size: .* as in 500kB or 2MB"):
            shrink(shrinkable, size=size)


def scenes(rows: int = 900) -> tuple[np.ndarray, np.ndarray]:
    """A bright or a grey square in each picture, and its box [B, 1, 5]."""
    random = np.random.default_rng(0)
    pictures, corners, kinds = random.integers(0, 40, (rows, 16, 16)), random.integers(0, 11, (rows, 2)), np.arange(rows) % 2
    for picture, (x, y), kind in zip(pictures, corners, kinds, strict=True):
        picture[y : y + 6, x : x + 6] = 120 + 120 * kind
    return pictures.astype(np.uint8), np.hstack([corners, corners + 6, kinds[:, None]])[:, None].astype(np.float32)


class Detector(nn.Sequential):
    """[B, 1, 16, 16] -> [B, 4, 4, 4]: objectness, the middle's distance from the cell's, the class."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 5, 2, 2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, 1, 1),
            nn.ReLU(),
            nn.Conv2d(64, 4, 1),
        )


def detector_step(model, batch):
    answers, target = model(batch.inputs).flatten(2), batch.targets[:, 0]  # [B, 4, 16] and [B, 5]
    middle = (target[:, :2] + target[:, 2:4]) / 2
    cell = (middle // 4).long().clamp(0, 3)
    place = cell[:, 1] * 4 + cell[:, 0]
    chosen = answers.gather(2, place[:, None, None].expand(-1, 4, 1))[..., 0]
    functional = nn.functional
    found = functional.cross_entropy(answers[:, 0], place)
    moved = functional.smooth_l1_loss(chosen[:, 1:3], (middle - 4 * cell - 2) / 4)
    return found + moved + functional.binary_cross_entropy_with_logits(chosen[:, 3], target[:, 4])


def decoded(outputs):
    found = []
    for answers in outputs.reshape(len(outputs), 4, 16):
        place = answers[0].argmax()
        middle = 4 * (answers[1:3, place] + np.array([place % 4, place // 4]) + 0.5)
        found.append(
            (np.hstack([middle - 3, middle + 3])[None], answers[0, place][None], (answers[3, place] > 0)[None].astype(int))
        )
    return found


def test_a_detector_is_made_narrower_by_its_mean_average_precision(tmp_path, monkeypatch):
    from delest import runs

    monkeypatch.chdir(tmp_path)
    job = delest.Job(
        model=Detector,
        data=scenes(),
        step=detector_step,
        predict=lambda model, pictures: model(pictures),
        metric=MeanAveragePrecision(decoded, name="mAP@0.5"),
        batch_size=32,
        recipe=delest.Recipe(epochs=10, lr=0.01, memory_format="contiguous", precision="fp32"),
        name="squares",
    )
    found = delest.train(job, out="r", threads=1, say=Progress())
    assert found.test["mAP@0.5"] > 0.5
    monkeypatch.setattr(runs, "job_of", lambda folder, given: job)
    shrunk = shrink(found.path, max_drop=0.3)
    assert shrunk.stages[0].accepted, shrunk.stages
    plain, narrow = (next(one for one in shrunk.candidates if one.name == name) for name in ("fp32", "pruned-1"))
    assert plain.selection["mAP@0.5"] == pytest.approx(shrunk.candidates[0].selection["mAP@0.5"], abs=1e-3)
    assert narrow.parameters < 0.7 * plain.parameters
    assert narrow.bound.drop <= narrow.bound.upper <= 0.3
