"""Plans by real steps: which is taken, and what is said of the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch import nn

import delest
from delest import errors, processes
from delest.cli import main
from delest.footprint import probe
from delest.planning.request import MARGIN_BYTES, Request, make_choice
from delest.records.footprint import Footprint
from delest.records.form import from_json, to_json
from delest.records.plan import Choice, Option, Plan, Rejection
from delest.reporting import text
from delest.training.progress import Progress
from delest.verbs import probing
from delest.verbs.workplace import open_workplace, preprocessing_json

MIB = 1 << 20
PROBE = {"batch_statistics": False, "device": "cpu", "busy": ""}
CHECKPOINTS = make_choice("activation_checkpointing", {"modules": ["0", "1"]}, PROBE, "less memory")
IN_BACKWARD = make_choice("optimizer_in_backward", {}, PROBE, "")
EIGHT_BITS = make_choice("optimizer_state", {"bits": 8}, PROBE, "")


def job() -> delest.Job:
    random = np.random.default_rng(0)
    data = (random.normal(size=(64, 8)).astype("float32"), np.arange(64) % 2)
    return delest.Job(model=lambda: nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)), data=data, batch_size=16)


def option(*choices: Choice, rows: int = 16, seconds: float = 1.0, fits: bool = True) -> Option:
    keeps = "changed" if EIGHT_BITS in choices else "bitwise" if rows == 16 else "rounding"
    names = tuple(choice.method for choice in choices)
    return Option(
        methods=names, blocks=0, micro_batch=rows, peak_bytes=0, step_seconds=seconds, fits=fits, keeps=keeps, choices=choices
    )


@pytest.fixture
def chosen() -> Plan:
    """With blocks recomputed; updates in the backward pass, and a batch in parts, are expected to fit too and to be slower."""
    predicted = Footprint(
        peak_bytes=300 * MIB, runtime_bytes=100 * MIB, low_bytes=200 * MIB, high_bytes=400 * MIB, step_seconds=1.0, batch_size=16,
        micro_batch=16, device="cpu", basis="estimate", how="trace",
    )  # fmt: skip
    return Plan(
        choices=(CHECKPOINTS,),
        batch_size=16,
        micro_batch=16,
        predicted=predicted,
        rejected=(Rejection(method="optimizer_in_backward", why="slower"), Rejection(method="micro_batch", why="slower")),
        considered=(
            option(CHECKPOINTS),
            option(EIGHT_BITS, seconds=1.1),
            option(IN_BACKWARD, seconds=1.2),
            option(rows=4, seconds=1.3),
            option(seconds=0.8, fits=False),
        ),
    )


class Notes(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def probed(
    chosen: Plan, monkeypatch: pytest.MonkeyPatch, *taken: tuple[float, float] | Exception
) -> tuple[Plan, list[Plan], list[str]]:
    """What is made of a plan where real steps take these MiB and seconds by turns; the plans that were tried, and what was noted."""
    tried, answers, notes = [], iter(taken), Notes()

    def call(function: str, job: Any, *, plan: dict[str, Any], **rest: Any) -> dict[str, Any]:
        tried.append(from_json(Plan, plan))
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        grown = int(answer[0] * MIB)
        return {"first": grown // 2, "steady": grown, "evaluation": grown // 4, "seconds": answer[1]}

    monkeypatch.setattr(processes, "call", call)
    place = open_workplace(job(), Progress())
    request = Request(
        job=place.job, probe=PROBE, budget_bytes=400 * MIB, asked=True, idle_bytes=100 * MIB, threads=1
    )  # 252 MiB are left for training
    return probing.by_real_steps(place, chosen, request, notes), tried, notes.notes


def test_the_fastest_of_those_that_kept_the_budget_is_taken(chosen, monkeypatch):
    plan, tried, _ = probed(chosen, monkeypatch, (200, 1.0), (210, 0.7), (260, 0.5))
    assert [one.choices for one in tried[:2]] == [
        (CHECKPOINTS,),
        plan.choices,
    ]  # what changes results is no rival of what does not
    assert [choice.method for choice in plan.choices] == ["optimizer_in_backward"]
    assert plan.choices[0].why == probing.FASTEST
    assert plan.predicted.peak_bytes == 310 * MIB
    assert (plan.predicted.basis, plan.predicted.step_seconds) == ("measurement", 0.7)
    assert "optimizer" in plan.code
    reasons = {one.method: one.why for one in plan.rejected}
    assert "optimizer_in_backward" not in reasons
    assert "1 s a step against 0.70 s" in reasons["activation_checkpointing"]
    assert [one.measured_seconds for one in plan.considered] == [0.7, 1.0, 0.5, None, None]
    assert [one.fits for one in plan.considered[:3]] == [True, True, False]
    said = text.plan_text(plan)
    assert "real steps" in said
    assert "0.70 s" in said


def test_parts_of_the_batch_are_followed_as_they_were_tried(chosen, monkeypatch):
    plan, tried, _ = probed(chosen, monkeypatch, (200, 1.0), (210, 1.0), (150, 0.5))
    assert plan.micro_batch == tried[2].micro_batch == 4
    assert plan.config("micro_batch") == {"rows": 4}
    assert plan.predicted.micro_batch == 4


def test_a_plan_that_runs_out_of_memory_is_left_out_and_said_so(chosen, monkeypatch):
    plan, _, notes = probed(chosen, monkeypatch, errors.ProbeFailed("killed by signal 9"), (210, 0.9), (150, 1.5))
    assert plan.choices[0].method == "optimizer_in_backward"
    assert "killed by signal 9" in notes[0]


def test_where_none_keeps_the_budget_the_plan_stays_and_a_note_says_so(chosen, monkeypatch):
    plan, _, _ = probed(chosen, monkeypatch, (270, 1.0), (280, 0.7), (290, 0.5))
    assert plan.choices == chosen.choices
    assert "kept the budget" in plan.notes[-1]
    assert 300 * MIB - MARGIN_BYTES == 252 * MIB


def test_a_plan_that_was_compared_with_none_is_measured_alone(chosen, monkeypatch):
    plan, tried, _ = probed(Plan(batch_size=16, micro_batch=16, predicted=chosen.predicted), monkeypatch, (200, 0.4))
    assert len(tried) == 1
    assert plan.predicted.step_seconds == 0.4
    assert plan.considered[0].measured_bytes == 300 * MIB


def test_real_steps_follow_a_plan():
    place = open_workplace(job(), Progress())
    plan = Plan(choices=(EIGHT_BITS,), batch_size=16, micro_batch=4, threads=1)
    found = probe.examine_plan(
        place.job, plan=to_json(plan), preprocessing=preprocessing_json(place), index=list(place.splits["train"][:16])
    )
    assert found["rows"] == 16
    assert found["seconds"] > 0
    assert max(found["first"], found["steady"], found["evaluation"]) >= 0


def test_real_steps_are_of_this_machine(tmp_path, capsys):
    (tmp_path / "job.py").write_text("import delest\njob = delest.Job(model=lambda: None, data=delest.synthetic(8, 8, 1))\n")
    assert main(["plan", str(tmp_path / "job.py"), "--devices", "t4", "--probe", "--quiet"]) == 2
    assert "--probe" in capsys.readouterr().err
