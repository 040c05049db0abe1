"""Keras jobs from the command line, each command in a process of its own, on the framework that KERAS_BACKEND names."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

keras = pytest.importorskip("keras", reason="`make test-keras` runs this test where Keras is installed")

import delest  # noqa: E402
from delest import errors  # noqa: E402

ON = keras.backend.backend()
EXAMPLES = Path(__file__).parents[2] / "examples"
JOB = """
import keras
import numpy as np

import delest

print("loaded")  # a user's file may print: with --json not on standard output


def net():
    return keras.Sequential([
        keras.Input((8, 8, 1)), keras.layers.Conv2D(8, 3, use_bias=False), keras.layers.BatchNormalization(),
        keras.layers.ReLU(), keras.layers.Flatten(), keras.layers.Dropout(0.2), keras.layers.Dense(3)])


random = np.random.default_rng(0)
classes = random.integers(0, 3, ROWS)
images = (random.integers(0, 100, (ROWS, 8, 8)) + 50 * classes[:, None, None]).astype(np.uint8)
job = delest.Job(model=net, data=(images, classes), batch_size=32, recipe=delest.Recipe(epochs=3), name="tiny")
"""


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "DELEST_CACHE": str(folder / "cache"), "TMPDIR": str(folder)}


def call(folder: Path, *arguments: str, status: int = 0) -> Any:
    """The object that a command prints, or where it fails the end of what it says."""
    command = [sys.executable, "-m", "delest", *arguments, "--json"]
    done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout) if status == 0 else done.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a small job, in `run`."""
    place = tmp_path_factory.mktemp("keras")
    (place / "tiny.py").write_text(JOB.replace("ROWS", "600"))
    call(place, "run", "tiny.py", "--out", "run", "--max-drop", "0.2")
    return place


def test_run_goes_all_the_way(folder: Path):
    run = json.loads((folder / "run" / "run.json").read_text())
    assert (run["status"], run["steps"]) == ("done", 3 * 14)
    assert run["test"]["accuracy"] > 0.6
    assert run["versions"].keys() == {"delest", "python", "numpy", "keras", ON}
    assert "nothing was estimated" in run["plan"]["notes"][0]
    page = (folder / "run" / "report.html").read_text()
    assert "accuracy" in page
    shrunk = json.loads((folder / "run" / "shrunk" / "shrink.json").read_text())
    candidates = {candidate["name"]: candidate for candidate in shrunk["candidates"]}
    assert candidates["keras"]["runtime"] == f"Keras on {ON}"
    assert candidates["fp32"]["parity"] < 1e-3
    assert candidates["int8"]["bound"]["rows"] == 60
    assert candidates["int8"]["bound"]["upper"] < 0.2


def test_bundle_answers_raw_images_like_the_session_and_for_any_batch(folder: Path):
    from delest.bundle import load

    model = load(folder / "run" / "bundle")
    images = np.random.default_rng(3).integers(0, 255, (7, 8, 8, 1)).astype(np.uint8)
    whole = model.predict({"image": images})
    assert whole.shape == (7, 3)
    np.testing.assert_allclose(
        np.concatenate([model.predict({"image": images[k : k + 1]}) for k in range(7)]), whole, atol=1e-6
    )
    assert set(load_file(folder / "run" / "bundle" / "weights.safetensors")) >= {"sequential/conv2d/kernel"}
    np.save(folder / "images.npy", images)
    answers = call(folder, "predict", "run", "images.npy")
    assert [answer["label"] for answer in answers["rows"]] == [str(k) for k in whole.argmax(1)]


def test_shrink_again_and_report(folder: Path):
    assert call(folder, "shrink", "run", "--time", "0", "--max-drop", "0.2")["shipped"]
    assert Path(folder, call(folder, "report", "run")["path"]).exists()


def test_tensorboard_is_told_of_a_keras_run(folder: Path):
    pytest.importorskip("tensorboard", reason="the extra tracking is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    call(folder, "train", "tiny.py", "--epochs", "2", "--out", "tracked", "--track", "tensorboard")
    found = EventAccumulator(str(folder / "tracked" / "tensorboard")).Reload()
    lines = [json.loads(line) for line in (folder / "tracked" / "metrics.jsonl").read_text().splitlines()]
    scores = [(event.step, event.value) for event in found.Scalars("validation/accuracy")]
    assert scores == [(line["step"], pytest.approx(line["accuracy"])) for line in lines if line["kind"] == "validation"]


REFUSED = [
    ["estimate", "tiny.py", "--device", "t4"],
    ["measure", "tiny.py", "--allocator", "mmap"],
    ["plan", "tiny.py", "--devices", "t4,l4"],
    ["run", "tiny.py", "--device", "cuda", "--out", "never"],
    ["shrink", "run", "--student", "tiny.py"],
    ["shrink", "run", "--teacher", "run", "--time", "10s"],
]


def test_what_does_not_work_yet_is_refused_with_what_does(folder: Path):
    code = f"from delest.cli import main\nprint([main([*given, '--json']) for given in {REFUSED!r}])"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment(folder), capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == str([2] * len(REFUSED)), done.stderr
    assert "Traceback" not in done.stderr
    said = "does not work with a Keras job yet. What does: inspect, estimate, measure, plan, train and run"
    assert done.stderr.count(said) == len(REFUSED)
    assert not (folder / "never").exists()


def test_plan_says_what_it_did_not_do(folder: Path):
    plan = call(folder, "plan", "tiny.py")
    assert (plan["batch_size"], plan["micro_batch"], plan["predicted"], plan["choices"]) == (32, 32, None, [])
    assert "nothing was estimated" in plan["notes"][0]


def test_threads_reach_the_framework_or_are_refused(folder: Path):
    if ON == "jax":
        assert "JAX takes the cores" in call(folder, "train", "tiny.py", "--threads", "1", "--out", "one", status=2)
    else:
        assert call(folder, "train", "tiny.py", "--threads", "1", "--epochs", "1", "--out", "one")["plan"]["threads"] == 1


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path):
    (tmp_path / "tiny.py").write_text(JOB.replace("ROWS", "2000"))
    call(tmp_path, "train", "tiny.py", "--out", "whole")
    command = [sys.executable, "-m", "delest", "train", "tiny.py", "--out", "killed", "--checkpoint-every", "10ms"]
    child = subprocess.Popen(
        command, cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and child.poll() is None:
        steps = [int(path.name[5:]) for path in (tmp_path / "killed" / "checkpoints").glob("step-*")]
        if max(steps, default=0) > 46:  # in the second epoch of 44 steps
            child.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    assert child.wait() == -signal.SIGKILL
    call(tmp_path, "train", "tiny.py", "--out", "killed", "--resume")
    whole, killed = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("whole", "killed"))
    assert (whole["steps"], killed["steps"]) == (132, 132)
    assert whole["weights_sha256"] == killed["weights_sha256"]
    assert whole["test"] == killed["test"]


@pytest.mark.parametrize(
    ("example", "options"), [("keras_table.py", ["--epochs", "8"]), ("keras_digits.py", ["--rows", "1500", "--epochs", "4"])]
)
def test_examples(tmp_path: Path, example: str, options: list[str]):
    answer = call(tmp_path, "run", str(EXAMPLES / example), *options, "--out", "run")
    if example == "keras_table.py":  # noise of 6 minutes is what no network can foretell
        assert 5 < answer["test"]["rmse"] < 8
    else:
        assert answer["test"]["accuracy"] > 0.8
    assert (tmp_path / "run" / "shrunk" / "model.onnx").exists()


def test_a_job_of_python_objects_is_trained_here(tmp_path: Path):
    random = np.random.default_rng(0)
    x = random.normal(size=(300, 5)).astype(np.float32)
    job = delest.Job(
        model=lambda schema: keras.Sequential([keras.Input((5,)), keras.layers.Dense(schema.outputs)]),
        data=(x, (x[:, 0] > 0).astype(int)),
        batch_size=20,
        recipe=delest.Recipe(epochs=4, lr=0.05),
    )
    if ON == "jax":
        with pytest.raises(errors.BadInput, match="put it in a file, or train with KERAS_BACKEND"):
            delest.run(job, out=tmp_path / "run", max_drop=0.5)
    else:
        delest.run(job, out=tmp_path / "run", max_drop=0.5)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["status"] == "done"
    assert run["test"]["accuracy"] > 0.8
    assert (tmp_path / "run" / "report.html").exists()
    assert (tmp_path / "run" / "bundle").exists() == (ON != "jax")


TORCH_JOB = """
import delest, numpy as np, torch
random = np.random.default_rng(0)
x = random.normal(size=(200, 5)).astype(np.float32)
job = delest.Job(model=lambda: torch.nn.Linear(5, 2), data=(x, (x[:, 0] > 0).astype(int)), batch_size=20,
                 recipe=delest.Recipe(epochs=1))
"""


@pytest.mark.skipif(ON != "torch", reason="says the same whatever Keras computes with")
def test_a_torch_job_loads_none_of_the_other_frameworks(tmp_path: Path):
    (tmp_path / "plain.py").write_text(TORCH_JOB)
    code = (
        "import sys\nfrom delest.cli import main\nassert main(['run', 'plain.py', '--out', 'run', '--max-drop', '0.5']) == 0\n"
        "print(sorted({'keras', 'tensorflow', 'jax'} & {name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
