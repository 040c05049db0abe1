import contextlib
import itertools
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sessions import Backend, Network, Session, Table, fit, make_feeds

from delest import errors, metrics
from delest.bundle import load
from delest.data import open_source
from delest.records.form import read_json
from delest.records.shrunk import Shrunk
from delest.reporting.text import shrunk_text
from delest.shrinking import forms, pipeline
from delest.shrinking.pipeline import shrink_run
from delest.training.evaluate import evaluate

ACCURACY = metrics.named("accuracy")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """The fewest timed calls: these tests promise nothing about speed."""
    timed = pipeline.time_alternating
    monkeypatch.setattr(pipeline, "time_alternating", lambda calls: timed(calls, seconds=0.0))


def draw(random, label, height=10, width=10):
    """A picture of class `label`: its third of the columns is bright."""
    pixels = random.integers(0, 120, (height, width, 1))
    start = label * width // 3
    pixels[:, start : start + width // 3] += 100
    return pixels.astype(np.uint8)


@pytest.fixture(scope="module")
def digits():
    """A trained session for 1,200 pictures of three classes, its feeds and preprocessing."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    labels = np.arange(1200) % 3
    source = open_source((np.stack([draw(random, label) for label in labels]), labels))
    feeds, preprocessing = make_feeds(source, train=500, validation=50, selection=500, test=150)
    return SimpleNamespace(session=fit(Network(1, 3), feeds["train"], 8), feeds=feeds, preprocessing=preprocessing)


def shrink(folder, given, **changes):
    said = []
    settings = {
        "session": given.session,
        "backend": Backend(),
        "feeds": given.feeds,
        "preprocessing": given.preprocessing,
        "metric": ACCURACY,
        "weights": given.session.weights(),
        "name": "test",
        "max_drop": 0.02,
        "threads": 1,
        "reduce_range": True,
        "say": said.append,
        **changes,
    }
    return shrink_run(folder=folder, **settings), said


def candidates(shrunk):
    return {candidate.name: candidate for candidate in shrunk.candidates}


def test_int8_ships_where_it_is_smaller_and_proven(tmp_path, digits):
    shrunk, said = shrink(tmp_path, digits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "shrinking", "shrunk"]
    assert shrunk.path == tmp_path / "shrunk"
    assert shrunk.shipped in ("int8", "weights")  # as large as one another: the faster one here
    found = candidates(shrunk)
    assert list(found) == ["torch", "fp32", "int8", "weights"]
    assert found["int8"].kept
    assert found["torch"].bound is None
    assert found["fp32"].bound.upper <= 0.001
    assert found["fp32"].parity < 1e-5 < found["int8"].parity
    assert found["int8"].bound.upper <= 0.02
    assert found["int8"].file_bytes < 0.6 * found["fp32"].file_bytes
    assert "times smaller" in found["int8"].why
    assert any(line == f"{shrunk.shipped} ships: {found[shrunk.shipped].why}" for line in said)
    for candidate in found.values():
        assert set(candidate.latency_seconds) == set(candidate.latency_spread) == {1, 32}
        assert all(low <= candidate.latency_seconds[size] <= high for size, (low, high) in candidate.latency_spread.items())
        assert candidate.selection["accuracy"] > 0.9
    assert found["torch"].weights_bytes == sum(array.nbytes for array in digits.session.weights().values())
    assert found["int8"].weights_bytes < 0.5 * found["fp32"].weights_bytes


def test_what_is_written_agrees_with_what_is_returned(tmp_path, digits):
    shrunk, _ = shrink(tmp_path, digits)
    assert read_json(Shrunk, tmp_path / "shrunk" / "shrink.json") == shrunk
    architecture = json.loads((tmp_path / "shrunk" / "architecture.json").read_text())
    assert architecture["form"] == shrunk.shipped
    stored, computed = architecture["int8_weights"], architecture["int8_layers"]
    assert (computed, stored) == ((["first", "second", "head"], []) if shrunk.shipped == "int8" else ([], ["second"]))
    small, plain = load(tmp_path / "shrunk"), load(tmp_path / "bundle")
    assert evaluate(small, digits.feeds["test"], ACCURACY).score == shrunk.test["accuracy"]
    assert evaluate(plain, digits.feeds["selection"], ACCURACY).score == candidates(shrunk)["fp32"].selection["accuracy"]
    assert (tmp_path / "shrunk" / "model.onnx").stat().st_size == candidates(shrunk)[shrunk.shipped].file_bytes
    assert (tmp_path / "bundle" / "model.onnx").stat().st_size == candidates(shrunk)["fp32"].file_bytes
    assert (tmp_path / "bundle" / "weights.safetensors").exists()
    assert not (tmp_path / "shrunk" / "weights.safetensors").exists()


def test_the_trained_model_is_timed_without_the_cost_of_keeping_its_state(tmp_path, digits, monkeypatch):
    class Costly(Session):
        def predict(self, inputs):
            called.append("predict")
            return super().predict(inputs)

        @contextlib.contextmanager
        def answering(self):
            yield super().predict

    called = []
    session = Costly(digits.session.module)

    def timed(calls):
        called.clear()
        for call in calls.values():
            call()
        assert list(calls) == ["torch", "fp32", "int8", "weights"]
        assert not called
        return dict.fromkeys(calls, (1.0, 0.9, 1.1))

    monkeypatch.setattr(pipeline, "time_alternating", timed)
    shrink(tmp_path, digits, session=session)


def test_int8_is_rejected_where_nothing_may_be_lost(tmp_path, digits):
    shrunk, said = shrink(tmp_path, digits, max_drop=0.0)
    found = candidates(shrunk)
    assert (shrunk.shipped, found["int8"].kept) == ("fp32", False)
    assert "0 is allowed" in found["int8"].why
    assert any("int8 is rejected" in line for line in said)
    assert json.loads((tmp_path / "shrunk" / "architecture.json").read_text())["int8_layers"] == []
    one, other = ((tmp_path / name / "model.onnx").read_bytes() for name in ("bundle", "shrunk"))
    assert one == other
    assert shrunk.test["accuracy"] == evaluate(load(tmp_path / "bundle"), digits.feeds["test"], ACCURACY).score


def test_too_few_rows_are_counted(tmp_path, digits):
    feeds = {**digits.feeds, "selection": digits.feeds["validation"]}
    shrunk, _ = shrink(tmp_path, digits, feeds=feeds, max_drop=0.005)
    assert shrunk.shipped == "fp32"
    assert "too few rows" in candidates(shrunk)["int8"].why
    assert re.search(r"about \d+ such rows would", candidates(shrunk)["int8"].why)
    assert shrunk.judged_on == "selection"


def test_validation_rows_judge_where_there_are_no_others(tmp_path, digits):
    feeds = {"train": digits.feeds["train"], "validation": digits.feeds["selection"]}
    shrunk, _ = shrink(tmp_path, digits, feeds=feeds)
    assert shrunk.judged_on == "validation"
    assert candidates(shrunk)["int8"].kept
    assert "95 % paired bound on 500 validation rows" in shrunk_text(shrunk)


def test_a_busy_machine_is_told(tmp_path, digits, monkeypatch):
    def timed(spread):
        return lambda calls: dict.fromkeys(calls, (1.0, 1 - spread / 2, 1 + spread / 2))

    for spread, told in ((0.1, False), (0.6, True)):
        monkeypatch.setattr(pipeline, "time_alternating", timed(spread))
        shrunk, said = shrink(tmp_path / str(spread), digits)
        assert any("the time of an answer varies by 60%" in line for line in said) is told
        assert ("restless: answers vary by 60%" in shrunk_text(shrunk)) is told


def test_times_are_followed_until_what_they_led_to_is_there(tmp_path, digits, monkeypatch):
    clock = itertools.count(1)
    monkeypatch.setattr(pipeline, "time_alternating", lambda calls: dict.fromkeys(calls, (float(next(clock)),) * 3))
    replace = pipeline.replace_folder

    def fail(new, old):
        raise OSError("the machine went down")

    monkeypatch.setattr(pipeline, "replace_folder", fail)
    with pytest.raises(OSError, match="went down"):
        shrink(tmp_path, digits)
    monkeypatch.setattr(pipeline, "replace_folder", replace)
    for seconds in (1.0, 3.0):  # those of the call that failed; then a call that asks anew
        shrunk, _ = shrink(tmp_path, digits)
        assert candidates(shrunk)["int8"].latency_seconds == {1: seconds, 32: seconds + 1}


def test_without_selection_and_validation_rows_nothing_is_proven(tmp_path, digits):
    shrunk, _ = shrink(tmp_path, digits, feeds={"train": digits.feeds["train"]})
    assert shrunk.shipped == "fp32"
    assert "nothing says how accurate it is" in candidates(shrunk)["int8"].why
    assert shrunk.test == {}


def test_a_model_that_answers_differently_gets_no_bundle(tmp_path, digits):
    class Wrong(Backend):
        def export(self, session, inputs, path):
            super().export(Session(Network(1, 3)), inputs, path)

    with pytest.raises(errors.CheckFailed, match="does not answer like the trained one") as caught:
        shrink(tmp_path, digits, backend=Wrong())
    assert caught.value.exit_status == 6
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_the_earlier_bundle(tmp_path, digits):
    shrink(tmp_path, digits)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    class Failing(Backend):
        def export(self, session, inputs, path):
            raise errors.BadInput("no ONNX form")

    with pytest.raises(errors.BadInput):
        shrink(tmp_path, digits, backend=Failing())
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_network_that_cannot_be_quantised_ships_in_fp32(tmp_path, digits, monkeypatch):
    def fail(*arguments, **named):
        raise RuntimeError("operator of an unknown kind\nand much more")

    monkeypatch.setattr(forms, "best_static", fail)
    monkeypatch.setattr(forms, "quantize_weights", fail)
    shrunk, _ = shrink(tmp_path, digits)
    assert shrunk.shipped == "fp32"
    assert (
        candidates(shrunk)["int8"].why
        == "ONNX Runtime cannot quantise this network (RuntimeError: operator of an unknown kind)"
    )
    assert read_json(Shrunk, tmp_path / "shrunk" / "shrink.json") == shrunk


def test_pictures_of_different_sizes(tmp_path):
    random = np.random.default_rng(0)
    for place in range(90):
        folder = tmp_path / "pictures" / "abc"[place % 3]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = draw(random, place % 3, 24 + place % 5, 24 + place % 7)
        Image.fromarray(pixels[..., 0]).save(folder / f"{place:03}.png")
    source = open_source(tmp_path / "pictures")
    feeds, preprocessing = make_feeds(source, train=60, selection=30)
    given = SimpleNamespace(session=fit(Network(1, 3), feeds["train"], 2), feeds=feeds, preprocessing=preprocessing)
    shrunk, _ = shrink(tmp_path / "run", given)
    model = load(tmp_path / "run" / "bundle")
    assert model.description["inputs"][0]["shape"] == ["batch", "height", "width", 1]
    assert candidates(shrunk)["fp32"].parity < 1e-5
    assert model.predict({"image": draw(random, 0, 50, 31)[None]}).shape == (1, 3)


def test_a_table_with_a_number_as_its_target(tmp_path):
    random = np.random.default_rng(0)
    lines = ["size,kind,price"]
    for _ in range(600):
        size, kind = random.normal(50, 20), random.integers(0, 3)
        lines.append(f"{'' if random.random() < 0.1 else f'{size:.2f}'},{'abc'[kind]},{1000 + 10 * size + 200 * kind:.2f}")
    (tmp_path / "table.csv").write_text("\n".join(lines))
    source = open_source(tmp_path / "table.csv", target="price")
    feeds, preprocessing = make_feeds(source, train=300, selection=200, test=100)
    session = fit(Table(source.schema), feeds["train"], 30)
    given = SimpleNamespace(session=session, feeds=feeds, preprocessing=preprocessing)
    shrunk, _ = shrink(tmp_path / "run", given, metric=metrics.named("rmse"), max_drop=100.0)
    found = candidates(shrunk)
    assert found["fp32"].parity < 1e-4
    assert found["fp32"].selection["rmse"] == pytest.approx(found["torch"].selection["rmse"], rel=1e-3)
    assert found["fp32"].selection["loss"] == pytest.approx(found["torch"].selection["loss"], rel=1e-3)
    assert 0 < found["int8"].bound.upper < 100
    assert shrunk.max_drop == pytest.approx(100.0 * found["torch"].selection["rmse"])  # of an error it is a share
    raw = {"size": np.array([50.0, np.nan], np.float32), "kind": np.array(["b", "?"], object)}
    assert load(tmp_path / "run" / "bundle").predict(raw)[0] == pytest.approx(1700, abs=150)


def test_a_metric_that_is_the_loss_cannot_prove_int8(tmp_path, digits):
    shrunk, _ = shrink(tmp_path, digits, metric=metrics.LossMetric())
    assert shrunk.shipped == "fp32"
    assert "nothing says how accurate it is" in candidates(shrunk)["int8"].why
