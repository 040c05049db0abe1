"""verify: methods beside the plain step, wrong ones found, a short run killed and resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import delest
from delest import cli, errors
from delest.backends.torch.methods import memory_format, micro_batch
from delest.records.footprint import Footprint
from delest.records.form import from_json, to_json
from delest.records.plan import Choice, Plan
from delest.records.verification import Verification
from delest.training.progress import Progress
from delest.verbs import verification

ROOT = Path(__file__).parents[2]
HALVES = Choice(method="micro_batch", config={"rows": 16}, keeps="rounding", why="")
LAST = Choice(method="memory_format", config={"format": "channels_last"}, keeps="rounding", why="")
PLAN = Plan(batch_size=32, micro_batch=32, threads=1)


def network(*layers: Callable[[], nn.Module]) -> nn.Module:
    middle = [layer() for layer in layers]
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), *middle, nn.Flatten(), nn.Linear(4 * 64, 4))


def job(*layers: Callable[[], nn.Module], rows: int = 400, **settings) -> delest.Job:
    random, labels = np.random.default_rng(0), np.arange(rows) % 4
    images = np.clip(random.integers(0, 200, (4, 8, 8))[labels] + random.integers(-30, 30, (rows, 8, 8)), 0, 255)
    made = {"model": lambda: network(*layers), "data": (images.astype(np.uint8), labels), "batch_size": 32}
    return delest.Job(**{**made, **settings})


def verify(given: delest.Job, *choices: Choice) -> Verification:
    rows = next((choice.config["rows"] for choice in choices if choice.method == "micro_batch"), 32)
    return delest.verify(given, plan=replace(PLAN, choices=choices, micro_batch=rows), say=Progress())


def test_methods_that_round_otherwise_agree_in_fp64():
    found = verify(job(), HALVES, LAST)
    assert found.ok
    assert [check.name for check in found.methods] == ["micro_batch", "memory_format", "all together"]
    for check in found.methods:
        assert (check.ok, check.precision, check.steps, check.tolerance) == (True, "fp64", 20, 1e-9), check
        assert check.loss_difference < 1e-12
        assert 0 < check.gradient_difference < 1e-12
        assert check.weight_difference < 1e-9
    assert found.rows == 32


def test_a_job_of_python_objects_is_compared_and_not_killed():
    found = verify(job())
    assert (found.ok, found.methods, found.resume.ok) == (True, (), None)
    assert "Python objects" in found.resume.why


class InFp32(nn.Module):
    def forward(self, x):
        return x + torch.zeros(x.shape).to(x.dtype)


def test_a_model_that_insists_on_fp32_is_compared_over_ten_steps_of_it():
    (check,) = verify(job(InFp32), HALVES).methods
    assert (check.ok, check.precision, check.steps, check.tolerance) == (True, "fp32", 10, 1e-4)
    assert check.loss_difference < 1e-5
    assert "does not stay in fp64" in check.why


def test_one_dropout_draws_the_same_masks_for_parts():
    (check,) = verify(job(nn.Dropout), HALVES).methods
    assert (check.ok, check.tolerance) == (True, 1e-9)
    assert "dropout" not in check.why


def test_several_dropouts_draw_other_masks_for_parts_and_are_held_still():
    (check,) = verify(job(nn.Dropout, nn.Dropout), HALVES).methods
    assert (check.ok, check.tolerance) == (True, 1e-9)
    assert "dropout off" in check.why


def normalisation() -> nn.Module:
    return nn.BatchNorm2d(4)


class Noise(nn.Module):
    def forward(self, x):
        return x + 0.1 * torch.randn_like(x)


def test_random_numbers_that_cannot_be_held_still_are_not_judged():
    (check,) = verify(job(Noise, Noise), HALVES).methods
    assert (check.ok, check.tolerance) == (True, None)
    assert "random numbers outside dropout layers" in check.why
    assert check.loss_difference > 1e-6


def test_what_changes_the_mathematics_is_reported():
    choice = Choice(method="precision", config={"dtype": "bf16"}, keeps="changed", why="")
    (check,) = verify(job(normalisation), choice).methods
    assert (check.ok, check.tolerance, check.precision) == (True, None, "fp32")
    assert 1e-6 < check.loss_difference < 0.2
    assert "within a factor of 2" in check.why


def unweighted(training, config):
    """The whole gradient of each part, as if the rest of the batch were not there."""
    micro_batch_applied(training, config)
    loss = training.batch_loss
    training.batch_loss = lambda batch: loss(batch) * training.parts


micro_batch_applied = micro_batch.apply


@pytest.mark.parametrize(("keeps", "words"), [("rounding", "differ by more than 1e-09"), ("bitwise", "differ by more than 0")])
def test_a_method_that_does_not_weight_its_parts_is_found(monkeypatch, keeps, words):
    monkeypatch.setattr(micro_batch, "apply", unweighted)
    found = verify(job(), replace(HALVES, keeps=keeps))
    (check,) = found.methods
    assert not found.ok
    assert not check.ok
    assert check.gradient_difference == pytest.approx(1.0, abs=0.1)
    assert words in check.why


def test_a_method_that_counts_statistics_twice_is_found(monkeypatch):
    """Losses of training do not show it: running statistics are for evaluation."""

    def twice(training, config):
        layer = training.model[2]
        forward = layer.forward
        layer.forward = lambda x: (forward(x), forward(x))[0]

    monkeypatch.setattr(memory_format, "apply", twice)
    (check,) = verify(job(normalisation), replace(LAST, keeps="bitwise")).methods
    assert (check.ok, check.loss_difference, check.gradient_difference) == (False, 0.0, 0.0)
    assert check.weight_difference > 1e-3
    assert "weights differ" in check.why


def test_a_method_that_states_too_much_is_found():
    (check,) = verify(job(), replace(HALVES, keeps="bitwise")).methods
    assert (check.ok, check.precision, check.tolerance) == (False, "fp32", 0.0)
    assert 0 < check.loss_difference < 1e-4


@pytest.mark.parametrize(("size", "tolerance", "words"), [(1e-7, 1e-9, "differs from itself"), (0.1, None, "does not repeat")])
def test_a_model_that_does_not_repeat_itself_is_no_method_s_fault(size, tolerance, words):
    chance = np.random.default_rng(
        0
    )  # goes on from session to session: each gets other numbers, every run of this test the same

    class Unsteady(nn.Module):
        def forward(self, x):
            return x * (1 + size * chance.normal())

    (check,) = verify(job(Unsteady), replace(LAST, keeps="bitwise")).methods
    assert check.ok
    assert words in check.why
    assert check.tolerance is None if tolerance is None else tolerance < check.tolerance < 1e-4


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda x: 1 / 0, "steps with it fail: ZeroDivisionError"),
        (lambda x: x * float("nan"), "its loss is not finite at step 1"),
    ],
)
def test_a_method_whose_steps_fail_is_told_beside_the_others(monkeypatch, harm, words):
    def apply(training, config):
        training.model.register_forward_hook(lambda module, inputs, outputs: harm(outputs))

    monkeypatch.setattr(memory_format, "apply", apply)
    halves, last, both = verify(job(), HALVES, LAST).methods
    assert (halves.ok, last.ok, both.ok) == (True, False, False)
    assert words in last.why
    assert last.loss_difference is None


@pytest.mark.parametrize(
    ("plan", "told", "words"),
    [
        (replace(PLAN, batch_size=64), {}, "the plan is for a batch of 64 rows, the job has 32"),
        (Path("no-plan.json"), {}, "no-plan.json does not exist"),
        (PLAN, {"memory": "1GiB", "threads": 2}, "--memory, --threads: the plan"),
        (replace(PLAN, device="tpu"), {}, "unknown device 'tpu'"),
        (replace(PLAN, choices=(replace(HALVES, method="magic"),)), {}, "unknown method 'magic'"),
    ],
)
def test_a_plan_that_cannot_be_followed_is_bad_input(plan, told, words):
    with pytest.raises(errors.BadInput, match=words):
        delest.verify(job(), plan=plan, say=Progress(), **told)


def test_memory_that_runs_out_halves_the_rows(monkeypatch):
    from delest.backends.torch.session import TorchSession

    step = TorchSession.step

    def limited(self, batch, rate):
        if batch.count > 16:
            raise errors.OutOfMemory("forward")
        return step(self, batch, rate)

    monkeypatch.setattr(TorchSession, "step", limited)
    found = verify(job(), replace(HALVES, config={"rows": 8}))
    assert (found.ok, found.rows) == (True, 16)
    with pytest.raises(errors.OutOfMemory):  # 16 rows would be one part
        verify(job(), HALVES)


JOB = """
import numpy as np
from torch import nn
import delest

random, labels = np.random.default_rng(0), np.arange(400) % 4
x = (random.normal(size=(400, 24)) + 2 * np.eye(24)[labels]).astype("float32")

def model():
    return nn.Sequential(nn.Linear(24, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.4), nn.Linear(32, 4))

job = delest.Job(model=model, data=(x, labels), batch_size=32)
"""
WRONG = """
from delest.backends.torch.methods import micro_batch
apply = micro_batch.apply

def wrong(training, config):
    apply(training, config)
    loss = training.batch_loss
    training.batch_loss = lambda batch: 2 * loss(batch)

micro_batch.apply = wrong
"""


def command(folder: Path, code: str, plan: Plan, capsys, *more: str) -> tuple[int, str]:
    (folder / "job.py").write_text(code)
    (folder / "plan.json").write_text(json.dumps(to_json(plan)))
    status = cli.main(["verify", str(folder / "job.py"), "--plan", str(folder / "plan.json"), "--quiet", *more])
    return status, capsys.readouterr().out


def test_a_killed_run_goes_on_bit_for_bit(tmp_path, capsys):
    status, printed = command(tmp_path, JOB, PLAN, capsys, "--json")
    assert status == 0
    told = json.loads(printed)
    found = from_json(Verification, told)
    assert (told["ok"], told["methods"], told["rows"], told["plan"]["batch_size"]) == (True, [], 32, 32)
    assert found.resume.ok
    assert (found.resume.steps, found.resume.killed_at, found.resume.resumed_from) == (8, 6, 5)
    assert found.resume.sha256 == found.resume.resumed_sha256
    assert len(found.resume.sha256) == 64


def test_a_wrong_method_ends_with_status_6(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(micro_batch, "apply", micro_batch.apply)  # the job's file changes it here too
    plan = replace(PLAN, choices=(HALVES,), micro_batch=16)
    status, printed = command(tmp_path, JOB.replace("nn.BatchNorm1d(32), ", "") + WRONG, plan, capsys)
    assert status == 6
    assert printed.startswith("1 of 2 checks failed: micro_batch\n")
    assert "gradients" in printed


def test_a_run_that_resumes_otherwise_fails(tmp_path, capsys):
    """A model that counts its own steps where no checkpoint sees them."""
    code = JOB + (
        "\nclass Counting(nn.Sequential):\n"
        "    count = 0\n"
        "    def forward(self, x):\n"
        "        self.count += self.training\n"
        "        return super().forward(x) * (1 + self.count)\n"
        "\njob = delest.Job(model=lambda: Counting(*model()), data=(x, labels), batch_size=32)\n"
    )
    status, printed = command(tmp_path, code, PLAN, capsys)
    assert status == 6
    assert printed.startswith("1 of 1 check failed: kill and resume\n")


def test_a_plan_that_is_not_there_ends_with_status_2(tmp_path, capsys):
    (tmp_path / "job.py").write_text(JOB)
    assert cli.main(["verify", str(tmp_path / "job.py"), "--plan", str(tmp_path / "none.json")]) == 2
    assert "none.json does not exist" in capsys.readouterr().err


def test_the_digits_are_planned_and_verified():
    example = delest.Job(
        model=digits,
        data=ROOT / "examples" / "data" / "mnist10k.npz",
        rows=600,
        recipe=delest.Recipe(memory_format="channels_last"),
    )
    found = delest.verify(example, threads=1, say=Progress())
    assert found.ok
    assert "memory_format" in [check.name for check in found.methods]
    assert found.plan.predicted is not None


def digits() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 5, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))


def test_rows_shrink_to_what_is_free(monkeypatch):
    from delest.hardware import machine

    plain = {"peak_bytes": 900, "runtime_bytes": 100, "low_bytes": 900, "high_bytes": 1100, "basis": "estimate", "how": "probe"}
    footprint = Footprint(batch_size=64, micro_batch=64, **plain)
    plan = replace(PLAN, batch_size=64, plain=footprint)
    here = replace(machine.describe(), available_bytes=1200)
    monkeypatch.setattr(machine, "describe", lambda: here)
    assert verification._rows(plan, least=8) == 32  # 100 + twice 1000 / 2
    assert verification._rows(plan, least=48) == 48
    assert verification._rows(replace(plan, plain=None), least=8) == 64
