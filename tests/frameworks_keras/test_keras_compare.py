"""The same job on all frameworks: only run where Keras is on torch, since it starts the others itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

keras = pytest.importorskip("keras", reason="`make test-keras` runs this test where Keras is installed")
if keras.backend.backend() != "torch":
    pytest.skip("it starts all three itself, once", allow_module_level=True)

JOB = """
import keras
import numpy as np

import delest


@keras.saving.register_keras_serializable()
class Odd(keras.layers.Layer):
    def call(self, inputs):
        return inputs * (2.0 if keras.backend.backend() == "jax" and ODD else 1.0)


def net():
    return keras.Sequential([
        keras.Input((8, 8, 1)), keras.layers.Conv2D(8, 3, use_bias=False), keras.layers.BatchNormalization(),
        keras.layers.ReLU(), Odd(), keras.layers.Flatten(), keras.layers.Dropout(0.2), keras.layers.Dense(3)])


random = np.random.default_rng(0)
classes = random.integers(0, 3, 600)
images = (random.integers(0, 100, (600, 8, 8)) + 50 * classes[:, None, None]).astype(np.uint8)
job = delest.Job(model=net, data=(images, classes), batch_size=32, recipe=delest.Recipe(epochs=9), name="tiny")
"""


def call(folder: Path, *arguments: str, status: int = 0) -> Any:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DELEST_CACHE": str(folder / "cache"), "TMPDIR": str(folder)}
    command = [sys.executable, "-m", "delest", "compare", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout) if "--json" in arguments else done.stdout


def test_all_train_from_the_same_weights_and_one_is_recommended(tmp_path: Path):
    (tmp_path / "tiny.py").write_text(JOB.replace("ODD", "False"))
    found = call(tmp_path, "tiny.py", "--json")
    results = {one["name"]: one for one in found["results"]}
    assert list(results) == ["tensorflow", "jax", "torch"]
    assert (found["epochs"], found["whole_epochs"], found["steps"]) == (3, 9, 14)
    for one in results.values():
        assert one["fault"] is None
        assert one["differs_at"] is None
        assert one["first_loss"] == pytest.approx(results["tensorflow"]["first_loss"], rel=1e-3)
        assert 0 < one["runtime_bytes"] < one["peak_bytes"]
        assert one["start_seconds"] + 9 * 14 * one["step_seconds"] < one["whole_seconds"]
        assert one["validation"]["accuracy"] > 0.5
    assert found["recommended"] == min(results.values(), key=lambda one: one["whole_seconds"])["name"]
    assert results["jax"]["versions"].keys() == {"keras", "jax"}


def test_the_layer_that_differs_is_named(tmp_path: Path):
    (tmp_path / "tiny.py").write_text(JOB.replace("ODD", "True"))
    shown = call(tmp_path, "tiny.py", "--backends", "torch,jax", "--epochs", "2", "--priority", "memory")
    assert shown.startswith("take ")
    assert "2 epochs of 14 steps of 32 rows each, from the same weights; the whole run is 9 epochs" in " ".join(shown.split())
    assert "the first that gives something else is sequential/odd" in " ".join(shown.split())


def test_what_cannot_be_compared_is_refused(tmp_path: Path):
    (tmp_path / "tiny.py").write_text(JOB.replace("ODD", "False"))
    (tmp_path / "plain.py").write_text(
        "import delest\nfrom torch import nn\nimport numpy as np\n"
        "job = delest.Job(model=lambda: nn.Linear(4, 2), data=(np.zeros((90, 4), np.float32), np.arange(90) % 2), batch_size=8)\n"
    )
    for given, words in (
        (["plain.py"], "runs on PyTorch alone"),
        (["tiny.py", "--backends", "mxnet"], "unknown framework 'mxnet'"),
        (["tiny.py", "--priority", "beauty"], "unknown priority 'beauty'"),
        (["tiny.py", "--backends", ","], "no framework is named"),
        (["tiny.py", "--epochs", "0"], "0"),
        (["tiny.py", "--epochs", "1"], "1 epoch of 9"),
    ):
        assert words in call(tmp_path, *given, "--json", status=2)["error"]["message"]


def test_a_budget_that_none_keeps_ends_with_3(tmp_path: Path):
    (tmp_path / "tiny.py").write_text(JOB.replace("ODD", "False"))
    found = call(tmp_path, "tiny.py", "--backends", "torch", "--epochs", "2", "--memory", "10MiB", "--json", status=3)
    assert found["recommended"] is None
    assert "none stays within 10 MiB" in found["why"]


SEQUENCES = """
import keras
import numpy as np

import delest


def net():
    layers = keras.layers
    return keras.Sequential([
        keras.Input((6, 4)), layers.TimeDistributed(layers.Dense(8)), layers.Bidirectional(layers.GRU(5, return_sequences=True)),
        layers.LSTM(6), layers.Dense(3)])


random = np.random.default_rng(0)
job = delest.Job(
    model=net, data=(random.normal(size=(40, 6, 4)).astype(np.float32), random.integers(0, 3, 40)), batch_size=36, split=delest.Split(train=0.9, validation=0.1, selection=0.0, test=0.0),
    recipe=delest.Recipe(epochs=8), name="steps")
"""


def test_recurrent_layers_and_epochs_of_one_step_are_compared(tmp_path: Path):
    (tmp_path / "steps.py").write_text(SEQUENCES)
    found = call(tmp_path, "steps.py", "--json")
    assert [(one["name"], one["fault"], one["differs_at"]) for one in found["results"]] == [
        (name, None, None) for name in ("tensorflow", "jax", "torch")
    ]
    assert found["steps"] == 1
    for one in found["results"]:
        assert one["step_seconds"] < 0.5  # compiling is not in it
        assert one["whole_seconds"] < one["start_seconds"] + one["compile_seconds"] + 8
