"""The memory guard: splits instead of failures, the same losses, decisions that a resumed run follows, growth with its owner."""

from __future__ import annotations

import gc
import re
import resource
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from delest import errors, malloc, storage
from delest.backends.torch.session import TorchSession
from delest.data import Feed, fit_preprocessing, open_source
from delest.hardware import machine
from delest.job import Job, Recipe
from delest.metrics import named
from delest.records.plan import Plan
from delest.training.guard import MARGIN_BYTES, MOST_STARTED, _started
from delest.training.loop import Limits, Trainer

MIB = 1 << 20
PLENTY = 8192 * MIB
ROWS, BATCH, WIDTH = 320, 64, 16384  # a layer of a batch is 4 MiB


class Wide(nn.Module):
    """Few weights and many activations: one number becomes WIDTH, eight times over."""

    def __init__(self, layers: int = 8):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))
        self.register_buffer("rows", torch.tensor(0))  # trained on
        self.last = nn.Linear(4, 3)
        self.layers = layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.rows += len(x) if self.training else 0
        wide = x.sum(1, keepdim=True) * self.scale
        for _ in range(self.layers):
            wide = torch.sin(wide)
        return self.last(x) + wide.mean(1, keepdim=True)


def data() -> tuple[np.ndarray, np.ndarray]:
    random, labels = np.random.default_rng(0), np.arange(ROWS) % 3
    return (random.normal(size=(ROWS, 4)) + 2 * np.eye(4)[labels]).astype(np.float32), labels


def trainer(
    folder: Path, *, memory: int | None = None, epochs: int = 3, model: Callable = Wide, step=None, saves=60.0
) -> Trainer:
    torch.set_num_threads(1)
    folder.mkdir(exist_ok=True)
    recipe = Recipe(epochs=epochs, lr=0.01, patience=1000)
    predict = (lambda net, x: net(x)) if step else None
    job = Job(model=model, data=data(), batch_size=BATCH, recipe=recipe, step=step, predict=predict)
    source = open_source(job.data)
    prepared = fit_preprocessing(source, np.arange(256))
    feeds = [Feed(source, index, prepared, batch_size=BATCH) for index in (np.arange(256), np.arange(256, ROWS))]
    plan = Plan(batch_size=BATCH, micro_batch=BATCH, threads=1, memory_bytes=memory)
    made = Trainer(
        session=TorchSession(job, plan, source.schema),
        train_feed=feeds[0],
        validation_feed=feeds[1],
        recipe=recipe,
        metric=named("accuracy"),
        folder=folder,
        limits=Limits(memory_bytes=memory, checkpoint_seconds=saves),
    )
    return made


def above_idle(size: int) -> int:
    """A budget that leaves so many bytes, beside what is resident and the guard's own margin."""
    gc.collect()
    machine.give_back_unused()
    return machine.resident_bytes() + size + MARGIN_BYTES


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in storage.read_lines(folder / "metrics.jsonl")]


def decisions(folder: Path, kind: str = "split") -> list[dict]:
    return [line for line in storage.read_lines(folder / "decisions.jsonl") if line["kind"] == kind]


def final(made: Trainer) -> dict[str, np.ndarray]:
    return {name: array for name, array in made.session.state().arrays.items() if name.startswith(("model.", "optimizer."))}


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


@pytest.mark.own_process
def test_half_the_memory_is_answered_by_smaller_parts_with_the_same_losses(tmp_path):
    trainer(tmp_path / "free").train()
    made = trainer(tmp_path / "tight", memory=above_idle(20 * MIB))  # a step takes about 40 MiB
    made.train()
    assert made.position.step == 12
    split = decisions(tmp_path / "tight")
    assert split[0]["at"] <= 1
    assert int(made.session.model.rows) == 12 * BATCH, "a step was counted twice, or a half-made one left its mark"
    assert made.session.parts == split[-1]["parts"] > 1
    assert "instead of" in split[0]["why"]
    assert losses(tmp_path / "tight") == pytest.approx(losses(tmp_path / "free"), rel=1e-4)


@pytest.mark.own_process
def test_without_a_budget_no_limit_is_set_and_after_training_it_is_lifted(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_DATA)
    seen = []
    for memory in (None, above_idle(400 * MIB)):
        made = trainer(tmp_path / str(memory), memory=memory, epochs=1)
        step = made.session.step
        made.session.step = lambda *a, step=step: (seen.append(resource.getrlimit(resource.RLIMIT_DATA)), step(*a))[1]
        made.train()
        assert resource.getrlimit(resource.RLIMIT_DATA) == before
        assert decisions(tmp_path / str(memory)) == []
    assert seen[0] == before
    assert seen[-1] != before


def test_without_a_budget_what_steps_free_is_kept_until_training_ends(tmp_path, monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr(malloc, "is_tuned", lambda: False)
    for name in ("keep_freed", "move_threshold"):
        monkeypatch.setattr(malloc, name, lambda name=name: asked.append(name) or True)
    trainer(tmp_path, model=small).train()
    assert asked == ["keep_freed", "move_threshold"]


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


def failing(made: Trainer, phases: dict[int, list[str]], *, name: str = "step") -> Trainer:
    """Memory runs out at these steps, in one try after the other: after the forward pass of the first part."""
    original = getattr(made.session, name)

    def call(*arguments):
        left = phases.get(made.position.step)
        if left:
            np.random.random(3)
            raise errors.OutOfMemory(left.pop(0), "DefaultCPUAllocator: you tried to allocate 99999999999 bytes.")
        return original(*arguments)

    setattr(made.session, name, call)
    return made


class Stopped(Exception):
    pass


@pytest.mark.parametrize("at", [2, 4, 6, 8, 11])
def test_a_resumed_run_splits_before_the_same_steps_and_ends_bit_for_bit_the_same(tmp_path, at):
    def failures():
        return {3: ["forward"], 6: ["backward", "forward"]}

    whole = failing(trainer(tmp_path / "whole", memory=PLENTY, model=small), failures())
    whole.train()
    assert [(line["at"], line["parts"]) for line in decisions(tmp_path / "whole")] == [(3, 2), (6, 4), (6, 8)]
    folder = tmp_path / "parts"
    first = failing(trainer(folder, memory=PLENTY, model=small, saves=60.0 if at == 8 else 0.0), failures())
    step = first.session.step

    def stopping(batch, rate):
        if first.position.step == at and first.session.parts >= (8 if at >= 6 else 1):
            raise Stopped
        return step(batch, rate)

    first.session.step = stopping
    with pytest.raises(Stopped):
        first.train()
    second = trainer(folder, memory=PLENTY, model=small)  # which does not fail at all
    assert second.resume()
    second.train() if at >= 6 else failing(second, {k: v for k, v in failures().items() if k >= at}).train()
    assert same(final(whole), final(second))
    assert decisions(folder) == decisions(tmp_path / "whole")


def test_an_evaluation_that_does_not_fit_is_made_again_in_smaller_parts(tmp_path):
    made = failing(trainer(tmp_path, memory=PLENTY, model=small), {4: ["evaluation"]}, name="outputs")
    made.train()
    (line,) = decisions(tmp_path)
    assert (line["phase"], line["at"], line["parts"]) == ("evaluation", 4, 2)
    rows = [row["step"] for row in storage.read_lines(tmp_path / "metrics.jsonl") if row["kind"] == "validation"]
    assert rows == [4, 8, 12]
    again = trainer(tmp_path / "again", memory=PLENTY, model=small)
    (tmp_path / "again" / "decisions.jsonl").write_text((tmp_path / "decisions.jsonl").read_text())
    again.decisions = type(again.decisions)(tmp_path / "again" / "decisions.jsonl")
    again.train()
    assert same(final(made), final(again))


def test_an_update_that_failed_goes_back_to_the_checkpoint_before_it(tmp_path):
    made = failing(trainer(tmp_path, memory=PLENTY, model=small), {6: ["optimizer"]})
    made.train()
    (line,) = decisions(tmp_path)
    assert (line["at"], line["failed_at"], line["parts"]) == (4, 6, 2)
    assert made.position.step == 12
    again = trainer(tmp_path / "again", memory=PLENTY, model=small)
    (tmp_path / "again" / "decisions.jsonl").write_text((tmp_path / "decisions.jsonl").read_text())
    again.decisions = type(again.decisions)(tmp_path / "again" / "decisions.jsonl")
    again.train()
    assert same(final(made), final(again))


def test_a_crashed_run_goes_on_from_its_checkpoint_in_more_parts_and_does_so_again(tmp_path):
    first = failing(trainer(tmp_path, memory=PLENTY, model=small), {5: ["forward"]})
    step = first.session.step
    first.session.step = lambda *a: step(*a) if first.position.step < 7 else (_ for _ in ()).throw(Stopped())
    with pytest.raises(Stopped):
        first.train()
    ends = []
    for crash in ("killed by signal 9", None):
        second = trainer(tmp_path, memory=PLENTY, model=small)
        assert second.resume(crash)
        assert second.position.step == 4
        second._save = lambda: True
        second.train()
        ends.append(final(second))
    assert same(*ends)
    lines = decisions(tmp_path)
    assert [(line["at"], line["parts"]) for line in lines] == [(5, 2), (4, 4)]
    assert "killed by signal 9" in lines[1]["why"]


@pytest.mark.own_process
def test_where_one_row_does_not_fit_the_smallest_budget_is_named(tmp_path):
    trainer(tmp_path / "first", memory=PLENTY, epochs=1).train()  # what training loads once is idle from here on
    made = trainer(tmp_path / "tight", memory=above_idle(3 * MIB), model=lambda: Wide(layers=1500))
    with pytest.raises(errors.NothingFits, match=r"are not enough: memory ran out.*1 row at a time.*--memory \d+MiB") as raised:
        made.train()
    assert raised.value.smallest_bytes > made.limits.memory_bytes
    assert decisions(tmp_path / "tight")[-1]["parts"] == BATCH
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY


history: list[torch.Tensor] = []


def leaking(net: nn.Module, batch) -> torch.Tensor:
    outputs = net(batch.inputs)
    if net.training:
        history.append(torch.ones(128 << 10))  # 512 KiB
    return nn.functional.cross_entropy(outputs, batch.targets)


def graph_keeper() -> Callable:
    total = []

    def step(net: nn.Module, batch) -> torch.Tensor:
        loss = nn.functional.cross_entropy(net(batch.inputs), batch.targets)
        if net.training:
            wide = torch.ones(128 << 10, requires_grad=True)
            total.append(loss + torch.sin(torch.sin(wide)).sum() * 0)
        return loss

    return step


@pytest.mark.parametrize(
    ("step", "owner"),
    [
        (leaking, r"a list of \d+ tensors \(\d+ MiB\) held by `history` in test_guard.py"),
        (
            graph_keeper(),
            r"a list of \d+ tensors .* held by `total` of graph_keeper.*\(\) in test_guard.py, which keep the graphs",
        ),
    ],
    ids=["module", "closure"],
)
@pytest.mark.own_process
def test_a_leak_is_named_once_and_the_run_goes_on(tmp_path, step, owner):
    history.clear()
    made = trainer(tmp_path, memory=PLENTY, model=small, step=step, epochs=60)
    made.train()
    history.clear()
    (line,) = decisions(tmp_path, "growth")
    assert 256 << 10 < line["bytes_per_step"] < 4 * MIB  # the closure's keeps its graph too
    assert re.search(owner, line["why"]), line["why"]
    assert made.position.step == 240


@pytest.mark.own_process
def test_a_run_that_does_not_leak_is_not_accused(tmp_path):
    trainer(tmp_path, memory=PLENTY, model=small, epochs=80).train()
    assert decisions(tmp_path, "growth") == []


@pytest.mark.parametrize(("most", "found"), [(0, 0), (2, 2), (99, MOST_STARTED)])
def test_where_no_thread_has_the_main_heap_the_last_that_starts_is_taken(
    most: int, found: int, monkeypatch: pytest.MonkeyPatch
):
    started: list[int] = []
    monkeypatch.setattr(malloc, "has_main_heap", lambda: started.append(threading.get_native_id()))
    start = threading.Thread.start

    def start_few(thread: threading.Thread) -> None:
        if len(started) == most:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_few)
    thread = _started()
    assert len(started) == found
    assert (thread is None) == (found == 0)
    if thread is not None:
        assert thread.submit(threading.get_native_id).result() == started[-1]
        thread.shutdown()
