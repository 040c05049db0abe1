"""What a Keras job takes: measured, estimated from smaller batches, held within a budget; each command in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

keras = pytest.importorskip("keras", reason="`make test-keras` runs this test where Keras is installed")

MIB = 1 << 20
JOB = """
import keras
import numpy as np

import delest


def net():
    layers = [keras.layers.Conv2D(width, 3, padding="same", activation="relu") for width in (32, 32, 32)]
    return keras.Sequential([keras.Input((32, 32, 3)), *layers, keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(4)])


random = np.random.default_rng(0)
classes = random.integers(0, 4, 1024)
images = (random.integers(0, 100, (1024, 32, 32, 3)) + 30 * classes[:, None, None, None]).astype(np.uint8)
job = delest.Job(model=net, data=(images, classes), batch_size=256, recipe=delest.Recipe(epochs=2), name="wide")
"""
PARAMETERS = 3 * 3 * 3 * 32 + 32 + 2 * (3 * 3 * 32 * 32 + 32) + 32 * 4 + 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("keras")
    (place / "wide.py").write_text(JOB)
    return place


def call(folder: Path, *arguments: str, status: int = 0) -> Any:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DELEST_CACHE": str(folder / "cache"), "TMPDIR": str(folder)}
    command = [sys.executable, "-m", "delest", *arguments, "--json"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def measured(folder: Path) -> Any:
    return call(folder, "measure", "wide.py", "--steps", "2")


def test_measurement_has_phases_and_parts_that_sum_to_the_peak(measured):
    assert measured["basis"] == "measurement"
    assert measured["phases"].keys() == {"start", "first_step", "steady_step", "evaluation", "saving", "resuming"}
    assert sum(measured["breakdown"].values()) == measured["peak_bytes"] == max(measured["phases"].values())
    assert measured["breakdown"]["parameters"] == measured["breakdown"]["gradients"] == 4 * PARAMETERS
    assert measured["breakdown"]["optimizer"] >= 2 * 4 * PARAMETERS
    assert measured["breakdown"]["activations"] >= 256 * 3 * 32 * 32 * 32 * 4  # of the three convolutions
    assert 0 < measured["step_seconds"] < 60


def test_estimate_from_smaller_batches_is_near_the_measurement(folder: Path, measured):
    estimated = call(folder, "estimate", "wide.py")
    assert (estimated["basis"], estimated["how"]) == ("estimate", "probe")
    assert estimated["low_bytes"] <= measured["peak_bytes"] <= estimated["high_bytes"]
    assert sum(estimated["breakdown"].values()) == estimated["peak_bytes"]
    assert "64 and 128 rows" in estimated["notes"][0]


def test_a_budget_is_planned_in_parts_and_held(folder: Path, measured):
    runtime, peak = measured["runtime_bytes"], measured["peak_bytes"]
    budget = f"{(runtime + (peak - runtime) * 2 // 3 + 64 * MIB) // MIB}MiB"
    run = call(folder, "train", "wide.py", "--memory", budget, "--out", f"run-{budget}")
    assert run["status"] == "done"
    assert run["plan"]["micro_batch"] < 256
    assert run["measured"]["peak_bytes"] <= run["plan"]["memory_bytes"]
    assert run["test"]["accuracy"] > 0.3


def test_a_budget_below_any_names_the_smallest_that_works(folder: Path):
    told = call(folder, "plan", "wide.py", "--memory", "100MiB", status=3)
    assert "The smallest budget that works is --memory" in told["error"]["message"]


def test_what_needs_a_trace_is_refused(folder: Path):
    for wish in (["--device", "t4"], ["--allocator", "mmap"], ["--sequence-length", "8"]):
        told = call(folder, "estimate", "wide.py", *wish, status=2)
        assert "does not work with a Keras job yet" in told["error"]["message"]
