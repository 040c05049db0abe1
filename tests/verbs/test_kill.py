"""Kill -9 at random moments of a run with dropout, saves included; damaged checkpoints; signals to the command."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

JOB = """
import numpy as np
from torch import nn
import delest

random = np.random.default_rng(0)
labels = np.arange(3000) % 4
x = (random.normal(size=(3000, 24)) + 2 * np.eye(24)[labels]).astype("float32")

def model():
    return nn.Sequential(nn.Linear(24, 96), nn.BatchNorm1d(96), nn.ReLU(), nn.Dropout(0.4), nn.Linear(96, 4))

job = delest.Job(model=model, data=(x, labels), batch_size=16, recipe=delest.Recipe(epochs=8, patience=9))
"""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(folder: Path, out: str, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "delest",
        "train",
        str(folder / "job.py"),
        "--out",
        str(folder / out),
        "--threads",
        "1",
        "--checkpoint-every",
        "0.01",
        "--json",
        *more,
    ]


def start(folder: Path, out: str, *more: str) -> subprocess.Popen:
    return subprocess.Popen(
        command(folder, out, *more), cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(folder: Path, out: str, *more: str) -> dict:
    done = subprocess.run(command(folder, out, *more), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def wait_for_step(run: Path, process: subprocess.Popen, beyond: int) -> None:
    """Until a checkpoint beyond that step is there, or the process has ended."""
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        if any(int(path.name[5:]) > beyond for path in (run / "checkpoints").glob("step-*")):
            return
        time.sleep(0.005)


def newest_step(run: Path) -> int:
    return max((int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")), default=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kill")
    (folder / "job.py").write_text(JOB)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(folder) -> dict:
    return finish(folder, "whole")


def kill_and_resume(folder: Path, out: str, times: int, seed: int) -> tuple[dict, int]:
    chance, killed, more = random.Random(seed), 0, []
    for _ in range(times):
        before = newest_step(folder / out)
        process = start(folder, out, *more)
        wait_for_step(folder / out, process, before)
        time.sleep(chance.uniform(0, 0.25))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.communicate()
        more = ["--resume"]
        if json.loads((folder / out / "run.json").read_text())["status"] == "done":
            break
    return finish(folder, out, *more), killed


def check_kills(folder: Path, uninterrupted: dict, times: int) -> None:
    killed, seed = 0, 0
    while killed < times:  # a run that ends before its kills are spent is followed by another
        run, now = kill_and_resume(folder, f"killed-{seed}", times - killed, seed)
        assert run["weights_sha256"] == uninterrupted["weights_sha256"]
        assert run["test"] == uninterrupted["test"]
        killed, seed = killed + now, seed + 1


def test_killed_three_times_it_ends_like_the_uninterrupted_run(folder, uninterrupted):
    check_kills(folder, uninterrupted, 3)


@pytest.mark.slow
def test_killed_twenty_times_it_ends_like_the_uninterrupted_run(folder, uninterrupted):
    check_kills(folder, uninterrupted, 20)


@pytest.fixture(scope="module")
def stopped(folder, uninterrupted) -> Path:
    """A run that SIGTERM stopped half-way, and what it said."""
    process = start(folder, "stopped")
    wait_for_step(folder / "stopped", process, 200)
    process.terminate()
    output, errors = process.communicate()
    assert process.returncode == 143, errors
    answer = json.loads(output)["error"]
    assert answer["exit_status"] == 143
    assert f"--out {folder / 'stopped'} --resume" in errors
    assert json.loads((folder / "stopped" / "run.json").read_text())["status"] == "interrupted"
    return folder / "stopped"


def corrupt(checkpoint: Path) -> None:
    data = bytearray((checkpoint / "state.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (checkpoint / "state.safetensors").write_bytes(bytes(data))


def truncate(checkpoint: Path) -> None:
    with open(checkpoint / "state.safetensors", "r+b") as file:
        file.truncate(1000)


def remove(checkpoint: Path) -> None:
    (checkpoint / "state.safetensors").unlink()


@pytest.mark.parametrize("damage", [corrupt, truncate, remove])
def test_a_damaged_checkpoint_is_survived(folder, stopped, uninterrupted, damage):
    copy = folder / damage.__name__
    shutil.copytree(stopped, copy)
    newest = max((copy / "checkpoints").glob("step-*"))
    damage(newest)
    done = subprocess.run(command(folder, copy.name, "--resume"), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"checkpoint {newest.name} is damaged" in done.stderr
    assert json.loads(done.stdout)["weights_sha256"] == uninterrupted["weights_sha256"]
