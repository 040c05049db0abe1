"""Runs with a budget, as commands: an estimate that was too low, a process that is killed, signals, a parent that is gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from delest.records.form import read_json
from delest.records.plan import Plan
from delest.records.run import Run
from delest.storage import read_lines, write_json
from delest.training.guard import MARGIN_BYTES

JOB = """
import os
from pathlib import Path
import numpy as np
import torch
from torch import nn
import delest

random = np.random.default_rng(0)
labels = np.arange(320) % 4
x = (random.normal(size=(320, 24)) + 2 * np.eye(24)[labels]).astype("float32")

class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.last = nn.Parameter(torch.linspace(0.5, 1.5, 65536)), nn.Linear(24, 4)

    def forward(self, x):
        wide = x.sum(1, keepdim=True) * self.scale
        for _ in range(8):
            wide = torch.sin(wide)
        return self.last(x) + wide.mean(1, keepdim=True)

def step(model, batch):
    if model.training and Path("kill").exists():
        left = Path("kill").read_text().split()
        if len(left) > 1:
            Path("kill").write_text(" ".join(left[:-1]))
        else:
            number = int(left[0])
            Path("kill").unlink()
            os.kill(os.getpid(), number)
    return nn.functional.cross_entropy(model(batch.inputs), batch.targets)

recipe = delest.Recipe(epochs=4, lr=0.01, patience=99)
job = delest.Job(model=Wide, data=(x, labels), batch_size=64, recipe=recipe, step=step, predict=lambda model, x: model(x))
"""


def command(folder: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "delest", "train", *more, "--json", "--checkpoint-every", "0.01"]


def train(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, *more), cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "job.py").write_text(JOB)
    write_json(folder / "plain.json", Plan(batch_size=64, micro_batch=64, threads=1))
    return folder


@pytest.fixture(scope="module")
def free(folder) -> Run:
    """A run without a budget."""
    done = train(folder, "job.py", "--plan", "plain.json", "--out", "free")
    assert done.returncode == 0, done.stderr
    return read_json(Run, folder / "free" / "run.json")


@pytest.fixture(scope="module")
def roomy(folder, free) -> Plan:
    """A plan with twice the memory that the run takes."""
    plan = Plan(batch_size=64, micro_batch=64, threads=1, memory_bytes=2 * free.measured.peak_bytes)
    write_json(folder / "roomy.json", plan)
    return plan


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_lines(run / "metrics.jsonl") if row["kind"] == "train"]


def test_half_the_memory_that_it_takes_ends_in_the_same_losses(folder, free):
    """A plan whose estimate is half of what the whole batch truly takes above the idle process."""
    idle = free.measured.runtime_bytes
    taken = free.measured.peak_bytes - idle
    assert taken > 100 << 20
    budget = idle + taken // 2 + MARGIN_BYTES
    write_json(folder / "half.json", Plan(batch_size=64, micro_batch=64, threads=1, memory_bytes=budget))
    done = train(folder, "job.py", "--plan", "half.json", "--out", "half")
    assert done.returncode == 0, done.stderr
    run = json.loads(done.stdout)
    assert run["status"] == "done"
    assert {line["kind"] for line in run["decisions"]} == {"split"}
    assert "of a budget of" in done.stderr
    assert losses(folder / "half") == pytest.approx(losses(folder / "free"), rel=1e-4)
    assert run["measured"]["peak_bytes"] < budget + (8 << 20)


def test_a_run_that_crashes_goes_on_in_smaller_parts(folder, free, roomy):
    (folder / "kill").write_text(f"{int(signal.SIGSEGV)} x x x x x x")  # at the seventh step
    done = train(folder, "job.py", "--plan", "roomy.json", "--out", "crashed")
    assert done.returncode == 0, done.stderr
    run = json.loads(done.stdout)
    (line,) = run["decisions"]
    assert (line["kind"], line["phase"], line["parts"]) == ("split", "crash", 2)
    assert f"signal {int(signal.SIGSEGV)}" in line["why"]
    assert "going on from its last checkpoint in smaller parts" in done.stderr
    assert losses(folder / "crashed")[-1] == pytest.approx(losses(folder / "free")[-1], rel=1e-4)


def test_a_run_that_somebody_kills_goes_on_as_it_was(folder, free, roomy):
    (folder / "kill").write_text(f"{int(signal.SIGKILL)} x x x x x x")
    done = train(folder, "job.py", "--plan", "roomy.json", "--out", "killed")
    assert done.returncode == 0, done.stderr
    run = json.loads(done.stdout)
    assert run["decisions"] == []
    assert "going on from its last checkpoint as it was, since memory was not short" in done.stderr
    assert run["weights_sha256"] == free.weights_sha256


def test_a_budget_that_does_not_hold_the_opened_data_is_told_before_anything_is_built(folder):
    write_json(folder / "none.json", Plan(batch_size=64, micro_batch=64, threads=1, memory_bytes=64 << 20))
    done = train(folder, "job.py", "--plan", "none.json", "--out", "none")
    assert done.returncode == 3, done.stderr
    assert "in use once the data were opened" in done.stderr
    assert not (folder / "none").exists()


def wait_for(path: Path, process: subprocess.Popen) -> None:
    until = time.monotonic() + 120
    while not any(path.glob("step-*[1-9]")) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)


def start(folder: Path, out: str) -> subprocess.Popen:
    arguments = command(folder, "job.py", "--plan", "roomy.json", "--out", out, "--epochs", "400")
    process = subprocess.Popen(arguments, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(folder / out / "checkpoints", process)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_command_saves_the_run(folder, roomy, number):
    out = f"stopped-{int(number)}"
    process = start(folder, out)
    process.send_signal(number)
    output, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    assert json.loads(output)["error"]["exit_status"] == 128 + number
    assert f"--out {out} --resume" in said
    assert json.loads((folder / out / "run.json").read_text())["status"] == "interrupted"


def test_the_run_ends_with_its_command(folder, roomy):
    process = start(folder, "orphan")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 1
    process.kill()
    process.communicate()
    until = time.monotonic() + 5
    while os.path.exists(f"/proc/{children[0]}/status") and time.monotonic() < until:
        if "zombie" in Path(f"/proc/{children[0]}/status").read_text():
            break
        time.sleep(0.01)
    else:
        assert time.monotonic() < until, "the child outlived its parent"


def test_a_process_that_dies_before_its_run_began_is_said(folder, roomy):
    (folder / "dies.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    done = train(folder, "dies.py", "--memory", "1GiB", "--out", "dead")
    assert done.returncode == 1
    assert "before it began: memory may have run out" in json.loads(done.stdout)["error"]["message"]
