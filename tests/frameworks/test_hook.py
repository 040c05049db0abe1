"""What callbacks of all loops share: what may be given, the plan, the run folder, early stopping. No loop is needed for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import delest
from delest import errors, runs, storage
from delest.backends.torch.model import fingerprint
from delest.backends.torch.parts import ignoring
from delest.backends.torch.quantised_adamw import AdamW8bit
from delest.frameworks.hook import Hook
from delest.records.plan import Choice, Plan


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def plan(model: dict[str, Any] | None = None, **configs: dict[str, Any]) -> Plan:
    choices = tuple(Choice(method=name, config=config, keeps="rounding", why="") for name, config in configs.items())
    return Plan(choices=choices, batch_size=8, micro_batch=8, model=model)


class Outer(nn.Module):
    """A network inside somebody's module, as in Lightning."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(3, 3)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def begun(hook: Hook) -> Hook:
    model = Outer()
    hook.apply(model, torch.optim.AdamW(model.parameters(), lr=0.1), {})
    hook.begin(loop="a loop 1.0", versions={"loop": "1.0"}, batches=2, ways=ignoring(model))
    return hook


def test_all_faults_of_what_is_given_are_told_together(tmp_path: Path) -> None:
    with pytest.raises(errors.BadInput) as raised:
        Hook("lots", 3, mode="best", patience=0)  # type: ignore[arg-type]
    assert len(raised.value.faults) == 4
    with pytest.raises(errors.BadInput, match="this machine has"):
        Hook("900TiB")
    with pytest.raises(errors.BadInput, match="does not exist"):
        Hook(plan=tmp_path / "plan.json")
    with pytest.raises(errors.BadInput, match="unknown method 'magic'"):
        Hook(plan=plan(magic={}))
    storage.write_json(tmp_path / "plan.json", plan(micro_batch={"rows": 4}))
    assert Hook(plan=str(tmp_path / "plan.json")).plan == plan(micro_batch={"rows": 4})


def test_a_plans_own_budget_is_held_unless_another_is_given() -> None:
    from dataclasses import replace

    budgeted = replace(plan(), memory_bytes=1 << 30)
    assert Hook(plan=budgeted).budget_bytes == 1 << 30
    assert Hook("2GiB", budgeted).budget_bytes == 2 << 30
    assert not Hook().acts


def test_a_plan_acts_on_the_part_of_the_module_that_it_was_made_for() -> None:
    model = Outer()
    made = plan(fingerprint(model.net), activation_checkpointing={"modules": ["0"]})
    hook = Hook(plan=made)
    hook.apply(model, torch.optim.AdamW(model.parameters()), {})
    assert "forward" in vars(model.net[0])
    with pytest.raises(errors.BadInput, match="made for another model"):
        Hook(plan=plan(fingerprint(nn.Linear(2, 2)))).apply(model, torch.optim.AdamW(model.parameters()), {})


def test_a_scheduler_on_an_optimizer_that_must_go_is_refused_by_name() -> None:
    model = Outer()
    optimizer = torch.optim.AdamW(model.parameters())
    assert type(Hook(plan=plan(optimizer_state={"bits": 8})).apply(model, optimizer, {})) is AdamW8bit
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    with pytest.raises(errors.BadInput, match=f"a {type(scheduler).__name__} is attached"):
        Hook(plan=plan(optimizer_state={"bits": 8})).apply(model, optimizer, {})


@pytest.mark.parametrize(("setting", "said"), [("clipping", "norm of all gradients"), ("micro_batch", "last part")])
def test_what_the_loop_does_can_exclude_a_method(setting: str, said: str) -> None:
    model = Outer()
    with pytest.raises(errors.BadInput, match=said):
        Hook(plan=plan(optimizer_in_backward={})).apply(model, torch.optim.AdamW(model.parameters()), {setting: {}})


def test_what_must_act_before_the_process_starts_is_told() -> None:
    model = Outer()
    with pytest.warns(errors.DelestWarning, match="allocator: name jemalloc; not yet applied.*delest exec"):
        Hook(plan=plan(allocator={"name": "jemalloc"})).apply(model, torch.optim.AdamW(model.parameters()), {})


def test_a_budget_of_a_model_on_another_device_is_refused() -> None:
    model = nn.Linear(2, 2, device="meta")
    with pytest.raises(errors.BadInput, match="the model is on meta"):
        Hook("2GiB").apply(model, torch.optim.SGD(model.parameters(), lr=0.1), {})


def test_the_state_of_the_optimizer_is_there_before_the_first_step_and_a_loaded_one_is_left_alone() -> None:
    for given, budget in (("1GiB", True), (None, False)):
        hook = Hook(given)
        model = Outer()
        optimizer = hook.apply(model, torch.optim.AdamW(model.parameters()), {})
        hook.allocate()
        assert bool(optimizer.state) is budget
    hook = Hook("1GiB")
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.state[model.head.weight] = loaded = {"step": torch.ones(())}
    hook.apply(model, optimizer, {})
    hook.allocate()
    assert optimizer.state[model.head.weight] is loaded


@pytest.mark.parametrize("settings", [{"dampening": 0.5}, {"nesterov": True}, {}])
def test_state_that_is_there_early_changes_no_update(settings: dict[str, Any]) -> None:
    found = []
    for given in (None, "1GiB"):
        model = Outer()
        model.head.requires_grad_(False)
        hook = Hook(given)
        optimizer = hook.apply(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, **settings), {})
        hook.allocate()
        assert model.head.weight not in optimizer.state
        for _ in range(3):
            optimizer.zero_grad()
            model.net(torch.ones(2, 6)).square().sum().backward()
            optimizer.step()
        found.append([parameter.detach() for parameter in model.parameters()])
    assert all(torch.equal(left, right) for left, right in zip(*found, strict=True))


def test_the_run_folder_is_one_that_delest_reads_and_reports() -> None:
    hook = begun(Hook("80%", patience=2))
    record = hook.record
    assert record is not None
    for step in range(1, 13):
        record.stepped(step, step / 4, torch.tensor(2.0 / step), 0.1, 16)
        if step % 4 == 0:
            assert not hook.evaluated({"val_loss": 1.0 / step, "val_accuracy": 0.5})
    assert runs.read(record.folder).status == "running"
    hook.close()
    hook.close()  # the second time nothing happens
    run = runs.read(record.folder)
    assert (run.name, run.status, run.steps, run.epochs) == ("Outer-001", "done", 12, 3.0)
    assert (run.metric, run.higher_is_better, run.best.step) == ("loss", False, 12)
    assert run.validation == {"loss": 1 / 12, "accuracy": 0.5}
    assert run.job["loop"] == "a loop 1.0"
    assert run.measured.peak_bytes > 0
    rows = storage.read_lines(record.folder / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == [10, 12]
    page = delest.report(record.folder).read_text()
    assert "Trained in the loop of a loop 1.0" in page
    assert "chosen by delest" not in page
    with pytest.raises(errors.BadInput, match="was trained in the loop of a loop 1.0"):
        delest.shrink(record.folder)
    assert begun(Hook()).record.folder.name == "Outer-002"


def test_a_run_that_fails_says_so_and_is_not_taken_for_one_to_resume() -> None:
    hook = begun(Hook())
    folder = hook.record.folder
    hook.close(RuntimeError("shapes"))
    run = runs.read(folder)
    assert (run.status, run.stopped_by) == ("failed", "RuntimeError")
    with pytest.raises(errors.BadInput, match="no unfinished run"):
        runs.unfinished(None, None)


def test_memory_that_runs_out_in_the_update_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    begun(Hook("80%")).close(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert "memory ran out in the update" in capsys.readouterr().err


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    with pytest.raises(errors.BadInput, match="is not empty"):
        begun(Hook(out=tmp_path / "kept"))


def test_training_stops_after_evaluations_without_a_better_value() -> None:
    hook = begun(Hook(monitor="eval_f1", patience=2))
    stops = [hook.evaluated({"eval_loss": 1.0, "eval_f1": value}) for value in (0.5, 0.6, 0.6, float("nan"))]
    assert stops == [False, False, False, True]
    folder = hook.record.folder
    hook.close()
    run = runs.read(folder)
    assert (run.metric, run.higher_is_better, run.stopped_by, run.best.score) == ("f1", True, "plateau", 0.6)
    (line,) = storage.read_lines(folder / "decisions.jsonl")
    assert (line["kind"], line["why"]) == ("stop", "no better f1 in 2 evaluations")
    assert json.loads((folder / "run.json").read_text())["decisions"] == [line]


@pytest.mark.parametrize(
    ("given", "said"),
    [({"monitor": "val_f1"}, "monitor='val_f1' is not"), ({"patience": 1}, "no loss is")],
    ids=["name", "none"],
)
def test_what_is_to_be_watched_must_be_evaluated(given: dict[str, Any], said: str) -> None:
    hook = begun(Hook(**given))
    with pytest.raises(errors.BadInput, match=f"{said}.*val_accuracy"):
        hook.evaluated({"val_accuracy": 0.5})
    hook = begun(Hook())
    assert not hook.evaluated({"val_accuracy": 0.5})


def test_methods_that_were_put_in_place_are_given_back() -> None:
    hook, model = begun(Hook()), nn.Linear(2, 2)
    hook.replace(model, extra_repr=lambda: "ours")
    assert "ours" in repr(model)
    hook.close()
    assert "ours" not in repr(model)
