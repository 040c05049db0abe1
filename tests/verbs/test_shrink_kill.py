"""Kill -9 while a network is cut, taught, quantised, timed, chosen and written: who asks again ends like who followed the same journal undisturbed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import delest
from delest import bundle, runs, storage
from delest.shrinking import pipeline
from delest.training.progress import Progress

JOB = """
import importlib, itertools, os, signal
import numpy as np
from torch import nn
import delest
from delest.bundle.timing import time_alternating
from delest.shrinking import pipeline

pipeline.time_alternating = lambda calls: time_alternating(calls, seconds=0.2)  # nothing is promised about speed
random, labels = np.random.default_rng(0), np.arange(1500) % 4
prototypes = random.integers(0, 200, (4, 8, 8))
x = np.clip(prototypes[labels] + random.integers(-30, 30, (1500, 8, 8)), 0, 255).astype("uint8")

def model():
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 48, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.2), nn.Linear(48 * 16, 4),
    )

recipe = delest.Recipe(epochs=3, memory_format="contiguous", precision="fp32")
job = delest.Job(model=model, data=(x, labels), batch_size=32, recipe=recipe)

if "KILL_BEFORE" in os.environ:  # module:function:the how many-th call
    home, name, call = os.environ["KILL_BEFORE"].split(":")
    calls, module = itertools.count(1), importlib.import_module(home)
    original = getattr(module, name)

    def deadly(*given, **named):
        if next(calls) == int(call):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*given, **named)

    setattr(module, name, deadly)
"""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
WISHES = {"max_drop": 0.05, "threads": 1}
# What the process has said when it is killed, a random moment later; or the call before which it is.
THREE = ("shrink: pruned-1", "quantising pruned-1", "measuring the time of an answer")
TEN = (
    "exporting the trained",
    "quantising trained",
    "cutting",
    "shrink: pruned-1",
    "delest.shrinking.ladder:evaluate:2",
    "shrink: fresh",
    "exporting the pruned-1",
    "measuring the time of an answer",
    "judging what ships",
    "delest.shrinking.pipeline:replace_folder:2",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Iterator[Path]:
    folder, timed = tmp_path_factory.mktemp("shrink"), pipeline.time_alternating
    (folder / "job.py").write_text(JOB)
    delest.train(str(folder / "job.py"), out=folder / "run", threads=1, say=Progress())
    yield folder / "run"
    pipeline.time_alternating = timed  # which the job's file replaced in this process too


def kill(run: Path, seconds: str, moment: str, delay: float) -> bool:
    """Begin or go on, and kill; whether it was killed before it ended."""
    more = {"KILL_BEFORE": moment} if moment.startswith("delest.") else {}
    command = [sys.executable, "-m", "delest", "shrink", str(run), "--max-drop", "5%", "--threads", "1", "--time", seconds]
    process = subprocess.Popen(
        command, env={**ENVIRONMENT, **more}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if moment in line:
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            break
    process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), "".join(said)
    return process.returncode != 0


def check_whole(run: Path) -> None:
    """What lies there as an artefact is one."""
    for folder in (run / "bundle", run / "shrunk"):
        if folder.exists():
            bundle.load(folder)  # checks each file
    if (run / "shrunk").exists():
        assert json.loads((run / "shrunk" / "shrink.json").read_text())["shipped"]
        assert (run / "shrunk" / "architecture.json").exists()


def artefact(run: Path) -> dict[str, object]:
    """Every file of what ships, by its content; of `shrink.json` all but where it lies and how long that took."""
    found: dict[str, object] = {}
    for path in sorted((*(run / "bundle").rglob("*"), *(run / "shrunk").rglob("*"))):
        if path.name == "shrink.json":
            found["shrink.json"] = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("path", "seconds")}
        elif path.is_file():
            found[str(path.relative_to(run))] = storage.checksum(path)
    return found


def journals(run: Path) -> dict[Path, list[dict]]:
    return {path.relative_to(run): storage.read_lines(path) for path in sorted((run / "shrinking").rglob("decisions.jsonl"))}


def check_kills(trained: Path, moments: tuple[str, ...], least: float) -> None:
    """`least` seconds for narrower networks, more on a busy machine, so that there is time to teach one."""
    seconds = f"{max(least, 5 * runs.read(trained).seconds['training']):.1f}s"
    run, replayed = (trained.with_name(f"{name}-{len(moments)}") for name in ("killed", "replayed"))
    shutil.copytree(trained, run)
    chance = random.Random(len(moments))
    for moment in moments:
        assert kill(run, seconds, moment, chance.uniform(0, 0.4)), moment
        check_whole(run)
        with (
            open(run / "shrinking" / "decisions.jsonl", "ab")
            if (run / "shrinking").exists()
            else open(os.devnull, "ab") as file
        ):
            file.write(b'{"kind": "decided", "name": "pruned-1", "acc')  # as a power failure leaves it
    shrunk = delest.shrink(run, time=seconds, say=Progress(), **WISHES)
    assert shrunk.stages[0].accepted, shrunk.stages
    assert not list(run.glob(".*.tmp"))

    shutil.copytree(trained, replayed)
    for path in journals(run):
        (replayed / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(run / path, replayed / path)
    followed = journals(run)
    delest.shrink(replayed, time=seconds, say=Progress(), **WISHES)
    assert artefact(replayed) == artefact(run)
    assert "shrunk/model.onnx" in artefact(run)
    again = journals(replayed)
    assert again.keys() == followed.keys()
    for path, lines in followed.items():  # nothing was decided anew
        assert [line for line in again[path] if line["kind"] != "shipped"] == [
            line for line in lines if line["kind"] != "shipped"
        ]


def test_killed_three_times_it_ends_like_who_follows_its_journal(trained):
    check_kills(trained, THREE, 3.0)


@pytest.mark.slow
def test_killed_ten_times_it_ends_like_who_follows_its_journal(trained):
    check_kills(trained, TEN, 12.0)
