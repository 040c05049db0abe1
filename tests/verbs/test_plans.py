"""Plans: kept by job and machine, made anew for another job or machine, and what is said where nothing fits."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

import delest
from delest import errors, job as jobs, processes
from delest.cli import main
from delest.hardware import machine
from delest.records.form import from_json
from delest.records.plan import Plan
from delest.storage import write_json
from delest.training.progress import Progress
from delest.verbs import kept_plans, planning

JOB = """
import numpy as np
from torch import nn
import delest
import beside

random = np.random.default_rng(0)
labels = np.arange(200) % 4
x = (random.normal(size=(200, 24)) + 2 * np.eye(24)[labels]).astype("float32")

def model():
    return nn.Sequential(nn.Linear(24, beside.WIDTH), nn.BatchNorm1d(beside.WIDTH), nn.ReLU(), nn.Linear(beside.WIDTH, 4))

job = delest.Job(model=model, data=(x, labels), batch_size=32, recipe=delest.Recipe(epochs=1, precision="fp32"))
"""


@pytest.fixture
def job(tmp_path, monkeypatch) -> Path:
    """A job's file, and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DELEST_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "beside.py").write_text("WIDTH = 48\n")
    (tmp_path / "job.py").write_text(JOB)
    return tmp_path / "job.py"


@pytest.fixture
def probed(job, monkeypatch) -> list[str]:
    """Functions that were called in child processes; the machine is quiet, and this process does not grow between two plans of one probe."""
    called, call, compare = [], processes.call, planning._compared_on_traces
    held, idle_bytes = {}, planning._idle_bytes

    def counted(function, *arguments, **named):
        called.append(function.rpartition(":")[2])
        found = call(function, *arguments, **named)
        return {**found, "busy": ""} if function.endswith(":examine") else found

    def compared(place, asked, mallocs, say):
        called.append("choose_on_traces")
        return compare(place, asked, mallocs, say)

    monkeypatch.setattr(processes, "call", counted)
    monkeypatch.setattr(planning, "_compared_on_traces", compared)
    monkeypatch.setattr(
        planning, "_idle_bytes", lambda place, probe: held.setdefault(probe["idle_bytes"], idle_bytes(place, probe))
    )
    return called


class Notes(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_job_is_probed_once_until_its_code_changes(job, probed):
    loaded = jobs.load(job)
    first = delest.plan(loaded, threads=1)
    assert probed == ["examine"]
    again = delest.plan(jobs.load(job), threads=1)
    assert probed == ["examine"]
    assert again.predicted.high_bytes == first.predicted.high_bytes
    delest.plan(loaded, threads=1, memory="2GiB")  # the same figures tell
    assert probed == ["examine"]
    (job.parent / "beside.py").write_text("WIDTH = 49\n")  # which the job imports
    delest.plan(jobs.load(job), threads=1)
    assert probed == ["examine", "examine"]
    delest.plan(replace(loaded, batch_size=16), threads=1)
    assert probed == ["examine"] * 3


def test_what_was_probed_on_a_busy_machine_is_said_and_kept_for_a_while_only(job, monkeypatch):
    call, called = processes.call, []

    def busy(function, *arguments, **named):
        called.append(function)
        return {**call(function, *arguments, **named), "busy": "threads waited for a core in 60% of the time"}

    monkeypatch.setattr(processes, "call", busy)
    for _ in range(2):
        plan = delest.plan(jobs.load(job), threads=1)
        assert "threads waited for a core in 60% of the time" in plan.notes[0]
    assert len(called) == 1
    monkeypatch.setattr(planning, "BUSY_KEPT_SECONDS", 0.0)
    delest.plan(jobs.load(job), threads=1)
    assert len(called) == 2


def test_where_nothing_fits_the_answer_is_kept_and_the_named_budget_works(job, probed):
    smallest = []
    for _ in range(2):
        with pytest.raises(errors.NothingFits) as raised:
            delest.plan(jobs.load(job), threads=1, memory="64MiB")
        smallest.append(raised.value.smallest_bytes)
    assert smallest[0] == smallest[1]
    assert [name for name in probed if name != "examine_allocator"] == ["examine", "choose_on_traces"]
    assert from_json(Plan, raised.value.plan).memory_bytes == smallest[0]
    notes = Notes()
    run = delest.train(jobs.load(job), memory=smallest[0], threads=1, say=notes)
    assert run.status == "done"
    if run.plan.micro_batch < 32:
        assert any("normalises over the batch" in note for note in notes.notes)
    assert run.plan.memory_bytes == smallest[0]


def test_where_nothing_fits_a_method_is_explained_all_the_same(job, probed, capsys):
    arguments = ["plan", str(job), "--memory", "64MiB", "--threads", "1", "--exact", "--quiet", "--json"]
    assert main(arguments) == 3
    told = json.loads(capsys.readouterr().out)["error"]
    reasons = {one["method"]: one["why"] for one in told["plan"]["rejected"]}
    assert "exact ones are asked for" in reasons["optimizer_state"]
    assert told["smallest_bytes"] == told["plan"]["memory_bytes"]
    with pytest.raises(errors.NothingFits) as raised:
        delest.train(jobs.load(job), memory="64MiB", exact=True, threads=1)
    assert raised.value.smallest_bytes == told["smallest_bytes"]
    arguments = [*arguments[:-2], "--explain", "optimizer_state"]
    assert main(arguments) == 3
    said = capsys.readouterr().err
    assert "optimizer_state: not chosen" in said
    assert "exact ones are asked for" in said
    assert "Dettmers" in said
    assert "smallest budget that works" in said


def test_a_plan_of_another_job_or_machine_is_made_anew_and_said_so(job, probed):
    loaded = jobs.load(job)
    plan = delest.plan(loaded, threads=1, memory="2GiB")
    write_json(Path("plan.json"), plan)
    notes = Notes()
    assert delest.train(loaded, plan="plan.json", say=notes).plan == plan
    assert not [note for note in notes.notes if "planning anew" in note]
    run = delest.train(replace(loaded, batch_size=16), plan="plan.json", say=notes)
    assert any("made for another job: planning anew within its 2 GiB" in note for note in notes.notes)
    assert run.plan.batch_size == 16
    elsewhere = replace(plan, made_for={**plan.made_for, "machine": "Cray-1, 1 core"}, batch_size=8)
    run = delest.train(loaded, plan=elsewhere, say=notes)
    assert any("another machine (Cray-1, 1 core, and this is" in note for note in notes.notes)
    assert run.plan.batch_size == 32


def test_a_budget_above_the_machines_is_bad_input(job, probed):
    with pytest.raises(errors.BadInput, match=r"--memory 100 TiB is more than this machine has \(.*\): give at most that"):
        delest.plan(jobs.load(job), memory="100TiB", threads=1)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"method": "micro_batch", "config": {}}, "the choice micro_batch lacks config.rows"),
        (
            {"method": "micro_batch", "config": {"rows": 8}},
            "the plan's micro_batch is 4 rows, its choice micro_batch makes it 8 of 32",
        ),
        (
            {"method": "micro_batch", "config": {"rows": 32}},
            "the plan's micro_batch is 4 rows, its choice micro_batch makes it 32",
        ),
        ({"method": "optimizer_in_backward", "config": {}}, "optimizer_in_backward excludes micro_batch: "),
    ],
)
def test_a_plan_that_was_edited_wrongly_is_bad_input(job, choice, words, capsys):
    parts = {"method": "micro_batch", "config": {"rows": 4}, "keeps": "rounding", "why": ""}
    choices = [*([parts] if choice["method"] != "micro_batch" else []), {**parts, **choice}]
    Path("plan.json").write_text(json.dumps({"batch_size": 32, "micro_batch": 4, "choices": choices}))
    assert main(["train", str(job), "--plan", "plan.json", "--quiet"]) == 2
    assert words in capsys.readouterr().err


def test_a_plan_for_a_gpu_that_is_not_here_is_bad_input(job, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    Path("plan.json").write_text(json.dumps({"batch_size": 32, "micro_batch": 32, "choices": [], "device": "cuda"}))
    assert main(["train", str(job), "--plan", "plan.json", "--quiet"]) == 2
    assert "--device cuda cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("grown", "again"), [(0, False), (planning.STARTS_HIGHER_BYTES, False), (4 * planning.STARTS_HIGHER_BYTES, True)]
)
def test_a_process_that_has_grown_a_little_since_it_planned_gets_the_same_plan(job, probed, grown, again, monkeypatch):
    """Reading the first plan takes some MiB."""
    traced = []

    def without_traces(place, asked, mallocs, say):
        traced.append(asked["idle_bytes"])
        raise errors.NothingFits("nothing fits", 300 << 20, None)

    monkeypatch.setattr(planning, "_compared_on_traces", without_traces)
    for idle in (200 << 20, (200 << 20) + grown):
        monkeypatch.setattr(planning, "_idle_bytes", lambda place, probe, idle=idle: idle)
        with pytest.raises(errors.NothingFits):
            delest.plan(jobs.load(job), memory="210MiB", threads=1)
    assert traced == [200 << 20, (200 << 20) + grown][: 1 + again]


def test_the_key_holds_what_surrounds_a_job(job, monkeypatch):
    from delest.verbs.workplace import open_workplace

    place = open_workplace(jobs.load(job), Progress())
    here = machine.describe()
    keys = [kept_plans.key_of(place, here, 1, "cpu", False), kept_plans.key_of(place, here, 2, "cpu", False)]
    monkeypatch.setitem(os.environ, "MALLOC_ARENA_MAX", "1")
    keys.append(kept_plans.key_of(place, here, 1, "cpu", False))
    keys.append(kept_plans.key_of(place, replace(here, memory_limit_bytes=1 << 30), 1, "cpu", False))
    assert len({json.dumps(key) for key in keys}) == 4
    assert kept_plans.key_of(replace(place, job=replace(place.job, origin=None)), here, 1, "cpu", False) is None
