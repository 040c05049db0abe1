"""Each training method against the plain step: the same weights where it promises that, and the memory that it saves."""

from __future__ import annotations

import copy
import functools
import random
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from delest import errors, methods
from delest.backends.torch.loops import JobLoop
from delest.backends.torch.methods.activation_checkpointing import Recomputed
from delest.backends.torch.session import TorchSession
from delest.backends.torch.trace import trace_loop
from delest.footprint.replay import replay
from delest.job import Job, Recipe
from delest.records.batch import Batch
from delest.records.plan import Choice, Plan
from delest.records.source import Column, Schema, Target
from delest.records.trace import Trace

TARGET = Target(name="y", kind="class", classes=("a", "b", "c"))
ROWS = Schema(inputs=(Column(name="x", kind="array", shape=(6,)),), target=TARGET)
IMAGES = Schema(inputs=(Column(name="x", kind="array", shape=(3, 8, 8)),), target=TARGET)


class Residual(nn.Module):
    """Two layers around dropout, and one that is there twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.shared = nn.Linear(width, width), nn.Linear(width, width)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.shared(torch.tanh(self.shared(self.drop(torch.relu(self.first(x))))))


def dropping() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 16), Residual(16), Residual(16), nn.Linear(16, 3))
    model[2].first.weight = model[1].first.weight  # tied
    return model


def normalising() -> nn.Module:
    def block(given: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(given, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())

    return nn.Sequential(block(3), block(8), nn.Flatten(), nn.Linear(8 * 64, 3))


MODELS = {"dropout": (dropping, ROWS, (6,), ["1", "2"]), "batch-norm": (normalising, IMAGES, (3, 8, 8), ["0", "1"])}


def batch(shape: tuple[int, ...], seed: int, dtype: Any, rows: int = 12) -> Batch:
    drawn = np.random.default_rng(seed)
    x = drawn.normal(size=(rows, *shape)).astype(dtype)
    return Batch(x, drawn.integers(0, 3, rows), np.arange(rows), 0, rows)


def plan(**configs: dict[str, Any]) -> Plan:
    choices = tuple(Choice(method=name, config=config, keeps="bitwise", why="") for name, config in configs.items())
    return Plan(choices=choices, batch_size=12, micro_batch=12, threads=1)


def session(name: str, chosen: Plan, *, double: bool = False, recipe: Recipe | None = None, **job: Any) -> TorchSession:
    build, schema, _, _ = MODELS[name]
    model = (lambda: build().double()) if double else build
    settings = {"model": model, "data": "unused", "batch_size": 12, "recipe": recipe or Recipe(lr=1e-3), **job}
    return TorchSession(Job(**settings), chosen, schema)


def trained(name: str, chosen: Plan, steps: int, *, double: bool = False, **more: Any) -> tuple[TorchSession, list[float]]:
    made = session(name, chosen, double=double, **more)
    shape, dtype = MODELS[name][2], np.float64 if double else np.float32
    losses = [float(made.step(batch(shape, seed, dtype), 1.0 - 0.01 * seed).loss) for seed in range(steps)]
    return made, losses


def bitwise(name: str) -> dict[str, Plan]:
    checkpointed = {"activation_checkpointing": {"modules": MODELS[name][3]}}
    return {
        "checkpointing": plan(**checkpointed),
        "in backward": plan(optimizer_in_backward={}),
        "both": plan(**checkpointed, optimizer_in_backward={}),
    }


@pytest.mark.parametrize("chosen", ["checkpointing", "in backward", "both"])
@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "rmsprop"])
@pytest.mark.parametrize("name", ["dropout", "batch-norm"])
def test_bitwise_methods_give_the_plain_weights(name: str, optimizer: str, chosen: str) -> None:
    recipe = Recipe(optimizer=optimizer, lr=1e-3)
    plain, losses = trained(name, plan(), 10, recipe=recipe)
    other, same = trained(name, bitwise(name)[chosen], 10, recipe=recipe)
    assert same == losses
    expected, got = plain.state().arrays, other.state().arrays
    assert expected.keys() == got.keys()
    for key, array in expected.items():  # weights, buffers, optimizer and random state
        np.testing.assert_array_equal(array, got[key], err_msg=key)


@pytest.mark.parametrize("chosen", ["checkpointing", "in backward", "both", "channels last"])
@pytest.mark.parametrize("name", ["dropout", "batch-norm"])
def test_fifty_steps_in_double_precision_agree(name: str, chosen: str) -> None:
    taken = {**bitwise(name), "channels last": plan(memory_format={"format": "channels_last"})}[chosen]
    plain, _ = trained(name, plan(), 50, double=True)
    other, _ = trained(name, taken, 50, double=True)
    for key, array in plain.weights().items():
        np.testing.assert_allclose(other.weights()[key], array, rtol=1e-9, atol=1e-9, err_msg=key)


@pytest.mark.parametrize("name", ["dropout", "batch-norm"])
def test_bitwise_methods_are_so_under_autocast(name: str) -> None:
    half = {"precision": {"dtype": "bf16"}}
    modules = {"activation_checkpointing": {"modules": MODELS[name][3]}}
    plain, losses = trained(name, plan(**half), 10)
    other, same = trained(name, plan(**half, **modules, optimizer_in_backward={}), 10)
    assert same == losses
    for key, array in plain.weights().items():
        np.testing.assert_array_equal(array, other.weights()[key], err_msg=key)


# Checkpointing


class Moody(nn.Module):
    """Draws from Python and NumPy, and reads a buffer that it changes: a second run would see other values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)  # another tensor under the same name
        scale = random.random() + float(np.random.random()) + self.calls
        return torch.relu(self.layer(x - self.mean)) * torch.tanh(scale * self.layer(x))


@pytest.mark.parametrize("modules", [["0"], ["1", "0"], [""]])
def test_a_repeated_forward_sees_what_the_first_saw(modules: list[str]) -> None:
    def build() -> nn.Module:
        return nn.Sequential(Moody(), Moody(), nn.Linear(6, 3))

    job = Job(model=build, data="unused", batch_size=12, recipe=Recipe(lr=0.01))
    plain = TorchSession(job, plan(), ROWS)
    losses = [float(plain.step(batch((6,), seed, np.float32), 1.0).loss) for seed in range(5)]
    other = TorchSession(job, plan(activation_checkpointing={"modules": modules}), ROWS)
    assert [float(other.step(batch((6,), seed, np.float32), 1.0).loss) for seed in range(5)] == losses
    for key, array in plain.weights().items():
        np.testing.assert_array_equal(array, other.weights()[key], err_msg=key)
    assert other.weights()["0.calls"] == 5


def test_checkpointing_runs_in_training_with_gradients_alone() -> None:
    made = session("dropout", plan(activation_checkpointing={"modules": ["1"]}))
    calls = []
    made.model[1].first.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    made.step(batch((6,), 0, np.float32), 1.0)
    assert calls == [True, True]
    made.predict(batch((6,), 0, np.float32).inputs)
    assert len(calls) == 3
    with torch.no_grad():
        made.model(torch.zeros(12, 6))
    assert len(calls) == 4


def test_checkpointing_leaves_names_copies_and_export_as_they_were(tmp_path) -> None:
    made = session("batch-norm", plan(activation_checkpointing={"modules": ["0", "1"]}))
    plain = session("batch-norm", plan())
    assert list(made.model.state_dict()) == list(plain.model.state_dict())
    copied = copy.deepcopy(made.model)
    assert isinstance(copied[0].forward, Recomputed)
    assert copied[0].forward.module is copied[0]
    made.step(batch((3, 8, 8), 0, np.float32), 1.0)
    assert not torch.equal(copied[0][0].weight, made.model[0][0].weight)
    copied(torch.ones(2, 3, 8, 8)).sum().backward()
    assert copied[0][0].weight.grad is not None
    assert made.model[0][0].weight.grad is None
    from delest.backends.torch import TorchBackend

    inputs = batch((3, 8, 8), 1, np.float32, rows=2).inputs
    TorchBackend().export(made, inputs, tmp_path / "model.onnx")
    import onnxruntime

    (answer,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"x": inputs})
    np.testing.assert_allclose(answer, made.predict(inputs), rtol=1e-4, atol=1e-5)


def test_modules_that_cannot_be_checkpointed_are_named_together() -> None:
    with pytest.raises(errors.BadInput) as raised:
        session("dropout", plan(activation_checkpointing={"modules": ["1", "1.first", "nine"]}))
    assert len(raised.value.faults) == 2
    assert "no module 'nine'" in str(raised.value)
    assert "'1.first' is inside '1'" in str(raised.value)
    with pytest.raises(errors.BadInput, match="without a module"):
        session("dropout", plan(activation_checkpointing={"modules": []}))

    def listed() -> nn.Module:
        model = dropping()
        model.add_module("parts", nn.ModuleList([nn.Linear(2, 2)]))
        return model

    with pytest.raises(errors.BadInput, match="ModuleList, has no forward of its own"):
        session("dropout", plan(activation_checkpointing={"modules": ["parts"]}), model=listed)

    def twice() -> nn.Module:
        layer = nn.Linear(6, 6)
        return nn.Sequential(layer, layer, nn.Linear(6, 3))

    with pytest.raises(errors.BadInput, match="the same module is named twice"):
        session("dropout", plan(activation_checkpointing={"modules": ["0", "1"]}), model=twice)


def test_checkpointing_does_not_load_the_compiler() -> None:
    import subprocess
    import sys

    code = """
import sys, torch
from types import SimpleNamespace
from delest.backends.torch import methods
from delest.backends.torch.methods.activation_checkpointing import apply
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
apply(SimpleNamespace(model=model), {"modules": ["0", "2"]})
model(torch.ones(2, 4)).sum().backward()
assert model[0].weight.grad is not None
assert "torch._dynamo" not in sys.modules
assert torch._dynamo.config.cache_size_limit > 0  # who wants it gets it
assert type(torch._dynamo).__name__ == "module"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Updates in the backward pass


def test_no_two_gradients_are_there_at_once() -> None:
    made = session("dropout", plan(optimizer_in_backward={}))
    most = []
    for parameter in made.model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: most.append(sum(one.grad is not None for one in made.model.parameters()))
        )
    made.step(batch((6,), 0, np.float32), 1.0)
    assert most == [0] * len(list(made.model.parameters()))  # ours ran before: each was used and freed, tied ones once


def test_what_the_last_part_does_not_reach_is_updated_too() -> None:
    """The guard may split a step whatever the plan says."""

    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.left(x) if x[0, 0] > 0 else self.right(x)

    results = []
    for chosen in (plan(), plan(optimizer_in_backward={})):
        made = session("dropout", chosen, model=Choosing)
        made.parts = 2
        given = batch((6,), 0, np.float32)
        given.inputs[:, 0] = np.repeat([1.0, -1.0], 6)
        made.step(given, 1.0)
        results.append(made.weights())
    for key, array in results[0].items():
        np.testing.assert_array_equal(array, results[1][key], err_msg=key)


def test_running_out_of_memory_says_whether_the_update_had_begun() -> None:
    class Greedy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            torch.empty(1 << 60)
            return gradient

    class Failing(nn.Module):
        def __init__(self, early: bool) -> None:
            super().__init__()
            self.first, self.last, self.early = nn.Linear(6, 6), nn.Linear(6, 3), early

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.first(x)
            return Greedy.apply(self.last(hidden)) if self.early else self.last(Greedy.apply(hidden))

    for early, begun in ((True, False), (False, True)):
        made = session("dropout", plan(optimizer_in_backward={}), model=functools.partial(Failing, early))
        before = made.weights()
        with pytest.raises(errors.OutOfMemory) as raised:
            made.step(batch((6,), 0, np.float32), 1.0)
        assert raised.value.begun is begun
        assert ("go on from a checkpoint" in str(raised.value)) is begun
        assert np.array_equal(made.weights()["last.weight"], before["last.weight"]) is not begun
        assert all(parameter.grad is None for parameter in made.model.parameters())


def test_a_gradient_that_is_completed_twice_is_refused() -> None:
    from torch.utils.checkpoint import checkpoint

    class Reentrant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.requires_grad_()
            for _ in range(2):
                x = checkpoint(self.layer, x, use_reentrant=True)
            return self.last(x)

    made = session("dropout", plan(optimizer_in_backward={}), model=Reentrant)
    with pytest.raises(errors.BadInput, match="completed twice"):
        made.step(batch((6,), 0, np.float32), 1.0)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "rmsprop"])
def test_a_weight_that_is_overwritten_before_its_last_use_raises(optimizer: str) -> None:
    """Silently, its new values would enter the gradients of what lies before."""

    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.twice, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.twice(torch.tanh(nn.functional.linear(self.first(x), self.twice.weight.detach()))))

    recipe = Recipe(optimizer=optimizer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        session("dropout", plan(optimizer_in_backward={}), model=Detached, recipe=recipe).step(batch((6,), 0, np.float32), 1.0)


@pytest.mark.parametrize(
    ("method", "config", "words"),
    [
        ("micro_batch", {}, "the choice micro_batch lacks config.rows: it should be a whole number, 1 or more"),
        ("micro_batch", {"rows": 0}, "the choice micro_batch has 0 as config.rows"),
        ("micro_batch", {"rows": True}, "the choice micro_batch has True as config.rows"),
        ("activation_checkpointing", {}, "lacks config.modules: it should be a list of module names"),
        ("activation_checkpointing", {"modules": "0"}, "has '0' as config.modules"),
        ("memory_format", {"format": "upside_down"}, 'config.format: it should be "channels_last"'),
        ("precision", {}, 'lacks config.dtype: it should be "bf16"'),
        ("optimizer_state", {"bits": 5}, "has 5 as config.bits: it should be 8 or 4"),
    ],
)
def test_settings_that_are_missing_or_wrong_in_a_plan_are_named(method, config, words) -> None:
    plan = Plan(batch_size=4, micro_batch=4, choices=(Choice(method=method, config=config, keeps="changed", why=""),))
    with pytest.raises(errors.BadInput, match=re.escape(words)):
        methods.configs(plan)


def test_methods_exclude_each_other_in_words() -> None:
    both = {"optimizer_in_backward": {}, "micro_batch": {"rows": 2}}
    assert methods.conflicts(both)[0].startswith("optimizer_in_backward excludes micro_batch: ")
    assert "last part" in methods.conflicts(both)[0]
    assert methods.conflicts({"activation_checkpointing": {"modules": ["1"]}, "micro_batch": {"rows": 2}}) == []
    for recipe, words in (
        (Recipe(clip=1.0), "norm of all gradients"),
        (Recipe(optimizer="muon"), "muon does not update element by element"),
    ):
        with pytest.raises(errors.BadInput, match=words):
            session("dropout", plan(optimizer_in_backward={}), recipe=recipe)
    assert "fp16" in methods.conflicts({"optimizer_in_backward": {}, "precision": {"dtype": "fp16"}})[0]
    with pytest.raises(errors.BadInput, match="AdamW's, and the optimizer is sgd"):
        session("dropout", plan(optimizer_state={"bits": 8}), recipe=Recipe(optimizer="sgd"))
    with pytest.raises(errors.BadInput, match="second moment is what is factored, and the optimizer is sgd"):
        session("dropout", plan(factored_state={}), recipe=Recipe(optimizer="sgd"))
    both = {"optimizer_state": {"bits": 4}, "factored_state": {}}
    assert methods.conflicts(both) == [
        "factored_state excludes optimizer_state: a second moment of rows and columns leaves no moments to keep in fewer bits."
    ]
    with pytest.raises(errors.BadInput, match="unknown method 'magic'"):
        session("dropout", plan(magic={}))


# Traces


def traced(chosen: Plan, build: Any, recipe: Recipe | None = None, rows: int = 64) -> Trace:
    job = Job(model=build, data="unused", batch_size=rows, recipe=recipe or Recipe())
    example = batch((256,), 0, np.float32, rows=2)
    schema = replace(ROWS, inputs=(Column(name="x", kind="array", shape=(256,)),))
    return trace_loop(lambda mode: JobLoop(job, chosen, schema, example), rows, scratch=no_scratch)


def no_scratch(signatures: Any) -> dict[str, dict[str, Any]]:
    return {text: {"scratch": 0, "outputs": []} for text in signatures if text}


def peak(chosen: Plan, build: Any, recipe: Recipe | None = None, rows: int = 64) -> int:
    found = replay(traced(chosen, build, recipe, rows), rows=rows, allocator="exact", phases=("first_step", "steady_step"))
    return found.peak_bytes


def wide() -> nn.Module:
    return nn.Sequential(*(nn.Linear(256, 256) for _ in range(16)), nn.Linear(256, 3))


def test_the_traced_peak_falls_with_checkpointing() -> None:
    def narrow() -> nn.Module:
        def block() -> nn.Module:
            return nn.Sequential(*(layer for _ in range(16) for layer in (nn.BatchNorm1d(256), nn.Dropout(0.1), nn.GELU())))

        return nn.Sequential(block(), block(), block(), block(), nn.Linear(256, 3))

    plain = peak(plan(), narrow)
    modules = ["0", "1", "2", "3"]
    kept = peak(plan(activation_checkpointing={"modules": modules}), narrow)
    assert kept < 0.5 * plain


def test_the_traced_peak_falls_by_the_gradients_with_updates_in_the_backward_pass() -> None:
    weights = 4 * (16 * (256 * 256 + 256) + 3 * 256 + 3)
    plain, freed = peak(plan(), wide, rows=8), peak(plan(optimizer_in_backward={}), wide, rows=8)
    assert plain - freed == pytest.approx(weights, rel=0.15)
    recipe = Recipe(optimizer="rmsprop")
    assert peak(plan(optimizer_in_backward={}), wide, recipe) < peak(plan(), wide, recipe)


@pytest.mark.parametrize(
    ("method", "config", "kind", "held"),
    [
        ("optimizer_state", {"bits": 8}, "AdamW8bit", 2 + 2 * 4 / 256),
        ("optimizer_state", {"bits": 4}, "AdamW4bit", 1 + 2 * 4 / 128),
        ("factored_state", {}, "FactoredAdamW", 2 * 4 / 256),
    ],
)
def test_the_traced_peak_falls_with_small_state(method: str, config: dict[str, Any], kind: str, held: float) -> None:
    def square() -> nn.Module:
        return nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(16)))

    plain, small = (traced(chosen, square) for chosen in (plan(), plan(**{method: config})))
    assert small.optimizer == kind
    count = 16 * 256 * 256
    assert plain.state_bytes == pytest.approx(12 * count, rel=0.01)
    assert small.state_bytes == pytest.approx((4 + held) * count, rel=0.01)
