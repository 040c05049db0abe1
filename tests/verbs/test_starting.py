"""A malloc that a plan holds: trained with it, told where it cannot be had any more, and the command that starts anew for it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import delest
from delest import errors, malloc, methods, processes
from delest.data import fit_preprocessing, open_job
from delest.job import load
from delest.records.form import to_json
from delest.records.plan import Choice, Plan
from delest.storage import write_json

JOB = """
import numpy as np
import delest
from torch import nn

labels = np.arange(320) % 4
x = (np.random.default_rng(0).normal(size=(320, 24)) + 2 * np.eye(24)[labels]).astype("float32")
model = lambda: nn.Sequential(nn.Linear(24, 2048), nn.ReLU(), nn.Linear(2048, 4))
job = delest.Job(model=model, data=(x, labels), batch_size=64, recipe=delest.Recipe(epochs=2))
"""
pytestmark = pytest.mark.skipif(not malloc.is_glibc(), reason="this system's malloc is not glibc's")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("starting")
    (folder / "job.py").write_text(JOB)
    return folder


def plan(name: str | None, folder: Path | None = None) -> Plan:
    choices = () if name is None else (Choice(method="allocator", config={"name": name}, keeps="bitwise", why="by hand"),)
    made = Plan(batch_size=64, micro_batch=64, threads=1, choices=choices)
    if folder is not None:
        write_json(folder / f"{name}.json", made)
    return made


def train(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "LD_PRELOAD"))}
    command = [sys.executable, "-m", "delest", "train", "job.py", "--json", *words]
    return subprocess.run(command, cwd=folder, env={**clean, **variables}, capture_output=True, text=True, timeout=300)


def test_a_run_has_the_plans_malloc_and_the_same_weights(folder):
    runs = {}
    for name in ("mmap", None):
        plan(name, folder)
        done = train(folder, "--plan", f"{name}.json", "--out", f"run-{name}")
        assert done.returncode == 0, done.stderr
        runs[name] = json.loads(done.stdout)
    assert {name: run["measured"]["allocator"] for name, run in runs.items()} == {"mmap": "mmap", None: "glibc"}
    assert runs["mmap"]["weights_sha256"] == runs[None]["weights_sha256"]


def test_a_sample_under_a_fixed_threshold_comes_from_a_process_that_has_it(folder):
    job = load(f"{folder}/job.py")
    source = open_job(job)
    index = list(range(32))
    sample = processes.call(
        "delest.footprint.probe:examine_allocator",
        job,
        environment=malloc.environment("mmap"),
        preprocessing=to_json(fit_preprocessing(source, index, ids=True)),
        index=index,
        threads=1,
        plain_seconds=2.0,
    )
    assert sample["rows"] == 32
    assert sample["steady"] > 0
    assert sample["seconds"] > 0.2  # of 2 s that the plain step is said to take


@pytest.fixture
def fake_library(tmp_path) -> Path:
    """A library that can be loaded, by the name of one that it is not: the process that starts with it has the malloc it had."""
    (real,) = {
        line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if line.split()[-1].endswith("libm.so.6")
    }
    shutil.copy(real, tmp_path / "libjemalloc.so.2")
    return tmp_path


def test_a_command_starts_anew_once_and_says_where_that_did_not_help(folder, fake_library):
    plan("jemalloc", folder)
    done = train(folder, "--plan", "jemalloc.json", "--out", "anew", LD_LIBRARY_PATH=str(fake_library))
    assert done.returncode == 2
    told = json.loads(done.stdout)["error"]["message"]
    assert "allocator must act before the process starts" in told
    assert "delest exec plan.json -- python train.py" in told
    assert done.stderr.count("data: ") == 2  # the process before it, and the one that was started for it


def test_a_process_that_is_no_command_of_delest_is_told_what_to_do(folder, fake_library, monkeypatch):
    monkeypatch.setenv("LD_LIBRARY_PATH", str(fake_library))
    with pytest.raises(errors.BadInput, match="must act before the process starts.*delest exec plan.json -- python train.py"):
        delest.train(load(f"{folder}/job.py"), plan=plan("jemalloc"), out=folder / "here")
    assert not (folder / "here").exists()


def test_a_library_that_is_not_here_is_told_by_its_files(folder, monkeypatch):
    monkeypatch.setattr(malloc, "_folders", list)
    with pytest.raises(errors.BadInput, match=r"libjemalloc\.so\.2"):
        delest.train(load(f"{folder}/job.py"), plan=plan("jemalloc"), out=folder / "here")


def test_in_ones_own_loop_it_is_named_as_waiting_where_it_cannot_be_had_any_more(monkeypatch):
    import torch

    def changes(name: str) -> str:
        model = torch.nn.Linear(3, 2)
        return "\n".join(delest.apply(plan(name), model, torch.optim.SGD(model.parameters(), lr=0.1)).changes)

    assert "allocator: name jemalloc; not yet applied" in changes("jemalloc")
    assert "delest exec plan.json -- python train.py" in changes("jemalloc")
    monkeypatch.setattr(malloc, "current", lambda: "jemalloc")
    assert "not yet applied" not in changes("jemalloc")
    assert "not yet applied" in changes("mmap")


def test_plans_name_what_they_need_before_the_start():
    assert methods.environment(plan("mmap")) == {"MALLOC_MMAP_THRESHOLD_": "65536"}
    assert methods.environment(plan(None)) == {}
    with pytest.raises(errors.BadInput, match="the choice allocator has 'tinyalloc' as config.name: it should be \"glibc\" or"):
        methods.configs(plan("tinyalloc"))
