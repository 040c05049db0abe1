"""TorchSession: whole steps, exact splitting, state that goes round."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from delest import errors
from delest.backends.torch.session import TorchSession
from delest.job import Job, Recipe
from delest.records.batch import Batch
from delest.records.plan import Choice, Plan
from delest.records.source import Column, Schema, Target

SCHEMA = Schema(
    inputs=(Column(name="x", kind="array", shape=(6,)),),
    target=Target(name="y", kind="class", classes=("a", "b", "c")),
)
IMAGES = Schema(inputs=(Column(name="image", kind="image", shape=(8, 8, 3), dtype="uint8"),), target=SCHEMA.target)
PLAN = Plan(batch_size=12, micro_batch=12, threads=1)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 3))


def batch(rows: int = 12, shape: tuple[int, ...] = (6,), seed: int = 0) -> Batch:
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, *shape)).astype(np.float32)
    return Batch(x, random.integers(0, 3, rows), np.arange(rows), 0, rows)


def session(model=mlp, schema=SCHEMA, plan=PLAN, **job) -> TorchSession:
    return TorchSession(Job(model=model, data="unused", batch_size=12, **job), plan, schema)


def split_plan(rows: int) -> Plan:
    choice = Choice(method="micro_batch", config={"rows": rows}, keeps="rounding", why="")
    return replace(PLAN, choices=(choice,), micro_batch=rows)


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def test_a_step_lowers_the_loss_and_leaves_no_gradient():
    trained = session(recipe=Recipe(lr=0.01, label_smoothing=0.0))
    losses = [float(trained.step(batch(), 1.0).loss) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]
    assert all(parameter.grad is None for parameter in trained.model.parameters())


def test_rate_zero_changes_no_weight_and_rate_scales_the_update():
    def moved(rate: float) -> float:
        trained = session(recipe=Recipe(optimizer="sgd", weight_decay=0.0, momentum=0.0))
        before = trained.weights()
        trained.step(batch(), rate)
        return float(sum(np.abs(before[name] - array).sum() for name, array in trained.weights().items()))

    assert moved(0.0) == 0.0
    assert moved(0.5) == pytest.approx(0.5 * moved(1.0), rel=1e-4)


@pytest.mark.parametrize("rows", [1, 5, 6, 11])
def test_parts_give_the_gradient_of_the_whole_batch(rows):
    """In fp64 the same to rounding; also where the parts are of unequal size."""

    def exact() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()

    doubled = replace(batch(), inputs=batch().inputs.astype(np.float64))
    recipe = Recipe(optimizer="sgd", momentum=0.0, label_smoothing=0.0)
    results = []
    for plan in (PLAN, split_plan(rows)):
        trained = session(exact, plan=plan, recipe=recipe)
        loss = float(trained.step(doubled, 1.0).loss)
        results.append((loss, trained.weights()))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-6)
    for name, array in results[0][1].items():
        np.testing.assert_allclose(results[1][1][name], array, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon", "adadelta", "RMSprop", "nadam"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_state_goes_round_bit_for_bit(optimizer, channels_last):
    plan = PLAN
    if channels_last:
        plan = replace(
            PLAN, choices=(Choice(method="memory_format", config={"format": "channels_last"}, keeps="rounding", why=""),)
        )
    images = batch(shape=(3, 8, 8))
    recipe = Recipe(optimizer=optimizer)
    first = session(convolutional, IMAGES, plan, recipe=recipe)
    for _ in range(3):
        first.step(images, 1.0)
    state = first.state()
    kept = {name: np.array(array) for name, array in state.arrays.items()}
    second = session(convolutional, IMAGES, plan, recipe=recipe, seed=5)
    second.load(replace(state, arrays=kept))
    for _ in range(3):
        first.step(images, 1.0)
    expected = first.weights()
    second.load(replace(state, arrays=kept))  # torch's generator is shared by both
    for _ in range(3):
        second.step(images, 1.0)
    assert same(expected, second.weights())


def test_dropout_goes_on_where_it_was():
    trained = session()
    trained.step(batch(), 1.0)
    state = trained.state()
    kept = replace(state, arrays={name: np.array(array) for name, array in state.arrays.items()})
    losses = [float(trained.step(batch(seed=i), 1.0).loss) for i in range(3)]
    trained.load(kept)
    assert losses == [float(trained.step(batch(seed=i), 1.0).loss) for i in range(3)]


def test_evaluation_changes_neither_modes_nor_random_state():
    trained = session()
    trained.model[1].eval()  # as a user freezes a part
    before = torch.get_rng_state()

    class Feed:
        def ordered(self):
            return iter([batch()])

    outputs = list(trained.outputs(Feed()))
    assert outputs[0].outputs.shape == (12, 3)
    assert outputs[0].losses.shape == (12,)
    assert trained.model[2].training
    assert not trained.model[1].training
    assert torch.equal(before, torch.get_rng_state())


class Hungry(nn.Module):
    """Fails to allocate in the forward pass of its second call, after its buffer has changed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 3)
        self.norm = nn.BatchNorm1d(6)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        x = nn.functional.dropout(self.norm(x), 0.5)
        if self.calls == 2:
            torch.empty(1 << 60)
        return self.inner(x)


def test_a_step_that_runs_out_of_memory_leaves_everything_as_it_was():
    trained = session(Hungry, plan=replace(PLAN, memory_bytes=1 << 40))
    trained.step(batch(), 1.0)
    before, random_state = trained.weights(), torch.get_rng_state()
    with pytest.raises(errors.OutOfMemory) as raised:
        trained.step(batch(), 1.0)
    assert raised.value.phase == "forward"
    assert same(before, trained.weights())
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in trained.model.parameters())
    trained.step(batch(), 1.0)  # and it goes on


def test_other_errors_are_not_called_out_of_memory():
    trained = session()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        trained.step(batch(shape=(7,)), 1.0)


def test_frozen_parameters_get_no_gradient_and_no_optimizer_state():
    def frozen() -> nn.Module:
        model = mlp()
        model[0].requires_grad_(False)
        return model

    trained = session(frozen)
    before = trained.weights()
    trained.step(batch(), 1.0)
    after = trained.weights()
    assert np.array_equal(before["0.weight"], after["0.weight"])
    assert not np.array_equal(before["3.weight"], after["3.weight"])
    held = {id(parameter) for optimizer in trained.optimizers for parameter in optimizer.state}
    assert held == {id(trained.model[3].weight), id(trained.model[3].bias)}


def test_weights_loaded_in_the_factory_are_kept():
    def loaded() -> nn.Module:
        model = mlp()
        nn.init.constant_(model[0].weight, 0.25)
        return model

    assert (session(loaded).weights()["0.weight"] == 0.25).all()


def test_weights_that_do_not_fit_are_named():
    weights = session().weights()
    weights["0.weight"] = weights["0.weight"][:, :4]
    weights["other"] = weights.pop("3.bias")
    with pytest.raises(
        errors.BadInput,
        match=r"3\.bias is missing.*other is not in this model.*0\.weight has shape \(16, 4\), the model's has \(16, 6\)",
    ):
        session().load_weights(weights)


def test_clipping_limits_the_update_and_reports_the_norm():
    free = session(recipe=Recipe(optimizer="sgd", momentum=0.0, weight_decay=0.0))
    clipped = session(recipe=Recipe(optimizer="sgd", momentum=0.0, weight_decay=0.0, clip=1e-3))
    assert free.step(batch(), 1.0).gradient_norm is None
    before = clipped.weights()
    assert float(clipped.step(batch(), 1.0).gradient_norm) > 1e-3
    moved = np.sqrt(sum(((before[name] - array) ** 2).sum() for name, array in clipped.weights().items()))
    assert moved == pytest.approx(1e-3 * clipped.optimizers[0].param_groups[0]["lr"], rel=1e-3)


def test_a_job_with_its_own_step_and_several_inputs():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(6, 1), nn.Linear(6, 1)

    def step(model, given):
        return ((model.left(given.inputs["a"]) * model.right(given.inputs["b"])).squeeze(1) - given.targets).square().mean()

    x = batch().inputs
    both = Batch({"a": x, "b": x[::-1].copy()}, np.ones(12, np.float32), np.arange(12), 0, 12)
    trained = session(Two, step=step, recipe=Recipe(lr=0.02))
    losses = [float(trained.step(both, 1.0).loss) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


def test_cross_entropy_of_log_probabilities_equals_that_of_logits():
    """The official digits example ends in log_softmax."""
    plain = session(lambda: nn.Sequential(nn.Linear(6, 3)), recipe=Recipe(label_smoothing=0.0))
    ending = session(lambda: nn.Sequential(nn.Linear(6, 3), nn.LogSoftmax(1)), recipe=Recipe(label_smoothing=0.0))
    assert float(plain.step(batch(), 1.0).loss) == pytest.approx(float(ending.step(batch(), 1.0).loss), rel=1e-6)
    assert float(plain.step(batch(), 1.0).loss) == pytest.approx(float(ending.step(batch(), 1.0).loss), rel=1e-5)


def test_regression_does_not_broadcast_a_column_against_a_row():
    schema = Schema(inputs=SCHEMA.inputs, target=Target(name="y", kind="number"))
    given = Batch(np.ones((4, 6), np.float32), np.array([1, 2, 3, 4], np.float32), np.arange(4), 0, 4)

    def zero() -> nn.Module:
        model = nn.Linear(6, 1)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        return model

    assert float(session(zero, schema).step(given, 1.0).loss) == pytest.approx((1 + 4 + 9 + 16) / 4)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_state_of_bf16_weights_goes_round(optimizer):
    def halved() -> nn.Module:
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        return model.to(torch.bfloat16)

    def step(net, given):
        return nn.functional.cross_entropy(net(given.inputs.to(torch.bfloat16)).float(), given.targets)

    trained = session(halved, step=step, recipe=Recipe(optimizer=optimizer))
    trained.step(batch(), 1.0)
    state = trained.state()
    kept = replace(state, arrays={name: np.array(array) for name, array in state.arrays.items()})
    for _ in range(3):
        trained.step(batch(), 1.0)
    expected = trained.weights()
    again = session(halved, step=step, recipe=Recipe(optimizer=optimizer), seed=3)
    again.load(kept)
    for _ in range(3):
        again.step(batch(), 1.0)
    assert same(expected, again.weights())


@pytest.mark.parametrize("rows", [2, 3, 5, 7, 9])
def test_the_last_smaller_batch_is_never_cut_to_single_rows_of_a_normalised_model(rows):
    trained = session(convolutional, IMAGES, split_plan(2))
    trained.step(batch(rows, (3, 8, 8)), 1.0)  # torch's batch normalisation raises on a single value per channel
    assert all(np.isfinite(array).all() for array in trained.weights().values())


def test_modes_that_the_factory_set_stay():
    def frozen() -> nn.Module:
        model = convolutional()
        model[1].eval()
        return model

    trained = session(frozen, IMAGES)
    trained.step(batch(shape=(3, 8, 8)), 1.0)
    assert trained.weights()["1.num_batches_tracked"] == 0


class Detector(nn.Module):
    """Like torchvision's: a dictionary of losses in training mode, a list of findings in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(6, 3), nn.BatchNorm1d(6)

    def forward(self, x, targets=None):
        scores = self.inner(self.norm(x))
        if self.training:
            return {"classes": nn.functional.cross_entropy(scores, targets), "boxes": scores.square().mean()}
        return [{"scores": row} for row in scores]


def test_a_detector_is_judged_by_its_metric_or_by_its_loss_in_training_mode():
    class Feed:
        def ordered(self):
            return iter([batch()])

    def step(net, given):
        return sum(net(given.inputs, given.targets).values())

    judged = session(Detector, step=step, predict=lambda net, x: net(x))
    (found,) = judged.outputs(Feed())
    assert len(found.outputs) == 12
    assert np.isnan(found.losses).all()
    measured = session(Detector, step=step)
    (found,) = measured.outputs(Feed())
    assert found.outputs is None
    assert np.isfinite(found.losses).all()
    assert measured.weights()["norm.num_batches_tracked"] == 0
    assert measured.model.training
