"""KerasSession: the torch jobs' own mathematics, whole steps, exact splitting, state that goes round."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="`make test-keras` runs this test where Keras is installed")
import torch  # noqa: E402
from torch import nn  # noqa: E402

from delest import errors  # noqa: E402
from delest.backends.torch import losses as torch_losses  # noqa: E402
from delest.backends.torch.session import TorchSession  # noqa: E402
from delest.frameworks.keras import KerasBackend, engines, losses  # noqa: E402
from delest.frameworks.keras.layers import changing  # noqa: E402
from delest.frameworks.keras.session import KerasSession  # noqa: E402
from delest.hardware import machine  # noqa: E402
from delest.job import Job, Recipe  # noqa: E402
from delest.records.batch import Batch, State  # noqa: E402
from delest.records.plan import Choice, Plan  # noqa: E402
from delest.records.source import Column, Schema, Target  # noqa: E402
from delest.training import limit  # noqa: E402

ON = keras.backend.backend()
SCHEMA = Schema(
    inputs=(Column(name="x", kind="array", shape=(6,)),),
    target=Target(name="y", kind="class", classes=("a", "b", "c")),
)
IMAGES = Schema(inputs=(Column(name="image", kind="image", shape=(8, 6, 3), dtype="uint8"),), target=SCHEMA.target)
PLAN = Plan(batch_size=12, micro_batch=12)
PLAIN = Recipe(label_smoothing=0.0)


def plain() -> Any:
    return keras.Sequential([keras.Input((6,)), keras.layers.Dense(16, activation="relu"), keras.layers.Dense(3)])


def torch_plain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def restless() -> Any:
    """Statistics, random numbers, a penalty: all that a step changes besides weights."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(16, kernel_regularizer=keras.regularizers.L2(1e-3)),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Dropout(0.3),
            layers.Dropout(0.1, seed=3),
            layers.Dense(3),
        ]
    )


def batch(rows: int = 12, shape: tuple[int, ...] = (6,), seed: int = 0) -> Batch:
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, *shape)).astype(np.float32)
    return Batch(x, random.integers(0, 3, rows), np.arange(rows), 0, rows)


def session(model: Any = plain, schema: Schema = SCHEMA, plan: Plan = PLAN, **job: Any) -> KerasSession:
    return KerasSession(Job(model=model, data="unused", **{"batch_size": 12, **job}), plan, schema)


def arrays(trained: KerasSession) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in trained.state().arrays.items()}


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


# The mathematics


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(weight_decay=0.3, clip=0.05),
        Recipe(optimizer="adam", lr=0.01),
        Recipe(optimizer="sgd", weight_decay=0.0, clip=1.0),
        Recipe(optimizer="sgd", weight_decay=0.0, momentum=0.0),
        Recipe(optimizer="adadelta"),
    ],
    ids=["adamw", "adamw-decayed-clipped", "adam", "sgd-nesterov", "sgd-plain", "adadelta"],
)
def test_steps_are_those_of_a_torch_job_with_the_same_recipe(recipe: Recipe):
    ours = session(recipe=recipe)
    theirs = TorchSession(Job(model=torch_plain, data="unused", batch_size=12, recipe=recipe), replace(PLAN, threads=1), SCHEMA)
    values = list(ours.weights().values())
    theirs.load_weights({name: value.T.copy() for name, value in zip(theirs.weights(), values, strict=True)})
    constant = recipe.optimizer == "sgd" and recipe.momentum is None  # Keras keeps the rate in the momentum
    for number, rate in enumerate((0.5,) * 6 if constant else (0.1, 1.0, 1.0, 0.5, 0.25, 1.0)):
        step, reference = (one.step(batch(seed=number), rate) for one in (ours, theirs))
        assert float(step.loss) == pytest.approx(float(reference.loss), rel=1e-5)
        if recipe.clip is None:
            assert step.gradient_norm is None
        else:
            assert float(step.gradient_norm) == pytest.approx(float(reference.gradient_norm), rel=1e-4)
    for got, expected in zip(ours.weights().values(), theirs.weights().values(), strict=True):
        # Keras adds Adam's epsilon before the second moment is corrected: gradients near 1e-6 move by another hundredth of a step.
        np.testing.assert_allclose(got.T, expected, rtol=2e-4, atol=3e-5)


def test_rate_zero_moves_nothing_and_decay_spares_biases():
    trained = session(recipe=Recipe(weight_decay=10.0, lr=0.01))
    before = trained.weights()
    trained.step(batch(), 0.0)
    assert same(before, trained.weights())
    trained = session(recipe=Recipe(weight_decay=10.0, lr=0.01))
    trained.step(batch(), 1.0)
    shrunk = {
        name: np.linalg.norm(array) / max(np.linalg.norm(before[name]), 1e-9) for name, array in trained.weights().items()
    }
    assert shrunk["sequential/dense/kernel"] < 0.97
    assert abs(trained.weights()["sequential/dense/bias"]).max() == pytest.approx(0.01, rel=0.05)  # Adam's first step, no decay


CLASSES = (np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32), np.array([0, 2, 1, 1, 0]))
NUMBERS = (np.random.default_rng(2).normal(size=(5, 1)).astype(np.float32), np.array([0.3, -2, 1, 5, 0], np.float32))


@pytest.mark.parametrize(
    ("name", "kind", "data"),
    [
        ("auto", "class", CLASSES),
        ("auto", "number", NUMBERS),
        ("l1", "number", NUMBERS),
        ("huber", "number", NUMBERS),
        ("bce", "class", (NUMBERS[0], np.array([0, 1, 1, 0, 1]))),
        ("auto", "class", (NUMBERS[0], np.array([0, 1, 1, 0, 1]))),
        (
            "auto",
            "tokens",
            (np.random.default_rng(3).normal(size=(4, 5, 7)).astype(np.float32), np.arange(20).reshape(4, 5) % 7),
        ),
    ],
)
def test_losses_are_those_of_torch_jobs(name: str, kind: str, data: tuple[np.ndarray, np.ndarray]):
    ours, theirs = losses.choose(name, kind, 0.1), torch_losses.choose(name, kind, 0.1)
    given = [keras.ops.convert_to_tensor(array) for array in data]
    reference = [torch.from_numpy(array) for array in data]
    assert float(ours.mean(*given)) == pytest.approx(float(theirs.mean(*reference)), rel=1e-5)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(ours.rows(*given)), theirs.rows(*reference).numpy(), rtol=1e-4)


@pytest.mark.parametrize("rows", [12, 7])  # a whole batch, and the last of an epoch
@pytest.mark.parametrize("parts", [3, 5])
def test_parts_give_the_same_step(parts: int, rows: int):
    def penalised() -> Any:
        return keras.Sequential([keras.Input((6,)), keras.layers.Dense(3, kernel_regularizer=keras.regularizers.L2(0.1))])

    whole, split = session(penalised, recipe=Recipe(clip=0.5)), session(penalised, recipe=Recipe(clip=0.5))
    split.parts = parts
    for number in range(3):
        one, other = (trained.step(batch(rows, seed=number), 1.0) for trained in (whole, split))
        assert float(one.loss) == pytest.approx(float(other.loss), rel=1e-5)
    for left, right in zip(whole.weights().values(), split.weights().values(), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-6)


def test_a_plan_of_parts_is_followed_and_statistics_need_two_rows():
    choice = Choice(method="micro_batch", config={"rows": 4}, keeps="rounding", why="")
    assert session(plan=replace(PLAN, choices=(choice,), micro_batch=4)).parts == 3
    assert (session().most_parts, session(restless).most_parts) == (12, 6)


def test_penalties_of_layers_are_learnt_from():
    trained = session(restless, recipe=PLAIN)
    kernel = trained.weights()["sequential/dense/kernel"]
    unpenalised = float(trained.loss.mean(*(keras.ops.convert_to_tensor(one) for one in (np.zeros((1, 3)), np.zeros(1, int)))))
    judged = Batch(np.zeros((12, 6), np.float32), batch().targets, np.arange(12), 0, 12)
    assert unpenalised == pytest.approx(np.log(3), rel=1e-5)
    assert float(trained.step(judged, 0.0).loss) == pytest.approx(np.log(3) + 1e-3 * float((kernel**2).sum()), rel=1e-4)


def test_weights_that_were_frozen_are_not_copied_before_a_step():
    def partly() -> Any:
        made = restless()
        next(layer for layer in made.layers if isinstance(layer, keras.layers.Dense)).trainable = False
        return made

    frozen = session(partly).model.non_trainable_variables
    trained = session(partly).model
    kept = {id(variable) for variable in changing(trained)}
    assert frozen
    for layer in trained.layers:
        if isinstance(layer, keras.layers.Dense) and not layer.trainable:
            assert not kept & {id(variable) for variable in layer.weights}
        if isinstance(layer, keras.layers.BatchNormalization):
            assert {id(layer.moving_mean), id(layer.moving_variance)} <= kept


def test_an_array_that_somebody_else_holds_is_left_to_him():
    table = keras.ops.convert_to_tensor(np.ones((6, 3), np.float32))

    def shared() -> Any:
        inputs = keras.Input((6,))
        one, other = (keras.layers.Dense(3, name=name) for name in ("one", "other"))
        made = keras.Model(inputs, one(inputs) + other(inputs))
        one.kernel.assign(table)
        other.kernel.assign(table)
        return made

    for _ in range(2):
        session(shared).step(batch(), 1.0)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(table), np.ones((6, 3)))


@pytest.mark.skipif(
    ON == "jax", reason="JAX gives zeros for what the loss does not reach, as Keras's own steps have them there"
)
def test_weights_that_the_loss_does_not_reach_do_not_decay():
    class Spare(keras.layers.Layer):
        def build(self, shape: Any) -> None:
            self.spare = self.add_weight(shape=(3, 3), initializer="ones", name="spare")

        def call(self, inputs: Any) -> Any:
            return inputs

    trained = session(lambda: keras.Sequential([keras.Input((6,)), keras.layers.Dense(3), Spare()]))
    trained.step(batch(), 1.0)
    (spare,) = [array for name, array in trained.weights().items() if name.endswith("spare")]
    np.testing.assert_array_equal(spare, np.ones((3, 3)))


# All or nothing


@pytest.mark.parametrize(
    ("raised", "seen"), [(MemoryError("can't allocate memory"), errors.OutOfMemory), (ValueError("x"), errors.BadInput)]
)
def test_a_step_that_fails_changes_nothing(raised: Exception, seen: type[Exception]):
    calls: list[int] = []

    def loss(outputs: Any, targets: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:  # a second part of another shape, which compiled steps are compiled for anew
            raise raised
        return keras.ops.mean(keras.losses.sparse_categorical_crossentropy(targets, outputs, from_logits=True))

    trained, other = session(restless, loss=loss), session(restless, loss=loss)
    trained.parts = 2
    before = arrays(trained)
    with pytest.raises(seen):
        trained.step(batch(7), 1.0)
    assert len(calls) == 2
    assert same(before, arrays(trained))
    trained.step(batch(7), 1.0)
    other.parts = 2
    other.load(State(before, other.state().scalars))  # on torch both draw from one random state
    other.step(batch(7), 1.0)
    assert same(arrays(trained), arrays(other))
    assert not same(before, arrays(trained))


@pytest.mark.skipif(ON != "torch", reason="oneDNN's words, as torch hands them on")
def test_a_primitive_that_cannot_be_made_is_want_of_memory_where_a_budget_is_held():
    error = RuntimeError("could not create a primitive")
    assert not engines.is_out_of_memory(error)
    with limit.held(machine.resident_bytes() + (4096 << 20)):
        assert engines.is_out_of_memory(error)


def test_a_run_goes_on_from_a_state_where_memory_ran_out_in_the_update(monkeypatch: pytest.MonkeyPatch):
    trained, other = session(restless), session(restless)
    before = State(arrays(trained), trained.state().scalars)
    update = trained.engine.update

    def fail(gradients: Any) -> Any:
        update(gradients)
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4096 bytes.")

    with monkeypatch.context() as patch:
        patch.setattr(trained.engine, "update", fail)
        with pytest.raises(errors.OutOfMemory) as caught:
            trained.step(batch(), 1.0)
    assert (caught.value.phase, caught.value.begun) == ("optimizer", True)
    for one in (trained, other):
        one.load(before)  # on torch both draw from one random state
        one.step(batch(), 1.0)
    assert same(arrays(trained), arrays(other))


@pytest.mark.skipif(ON != "jax", reason="only there do new weights take the old ones' places by being handed over")
def test_values_that_an_update_took_with_it_are_no_hindrance_to_a_state(monkeypatch: pytest.MonkeyPatch):
    trained = session(restless)
    before = State(arrays(trained), trained.state().scalars)

    def fail(gradients: Any) -> Any:
        for variable in (*trained.model.trainable_variables, *trained.optimizer.variables):
            variable.value.delete()
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4096 bytes.")

    with monkeypatch.context() as patch:
        patch.setattr(trained.engine, "update", fail)
        with pytest.raises(errors.OutOfMemory):
            trained.step(batch(), 1.0)
    trained.load(before)
    assert same(arrays(trained), before.arrays)
    trained.step(batch(), 1.0)


# State


def test_a_state_in_another_session_goes_on_bit_for_bit():
    first, second = session(restless), session(restless, seed=5)
    for number in range(3):
        first.step(batch(seed=number), 1.0)
    state = State(arrays(first), first.state().scalars)
    ends = []
    for trained in (first, second):
        trained.load(state)
        for number in range(3, 7):
            trained.step(batch(seed=number), 0.5)
        ends.append(arrays(trained))
    assert same(*ends)
    assert not same(state.arrays, ends[0])
    assert any(name.startswith("random.") for name in state.arrays)


def test_weights_in_bf16_go_round_as_16_bits():
    keras.config.set_dtype_policy("bfloat16")
    try:
        first, second = session(plain), session(plain, seed=5)
    finally:
        keras.config.set_dtype_policy("float32")
    first.step(batch(), 1.0)
    given = arrays(first)
    assert given["model.sequential/dense/kernel"].dtype == np.uint16
    assert not same(given, arrays(second))
    second.load(State(given, first.state().scalars))
    assert same(given, arrays(second))


def test_a_state_of_another_framework_or_optimizer_is_refused():
    trained = session(restless)
    with pytest.raises(errors.BadInput, match="KERAS_BACKEND=another"):
        trained.load(State(arrays(trained), {"keras": "another"}))
    with pytest.raises(errors.BadInput, match="optimizer.3 is missing"):
        trained.load(State(arrays(session(restless, recipe=Recipe(optimizer="sgd", momentum=0.0))), {"keras": ON}))


def test_names_of_weights_do_not_depend_on_what_was_built_before():
    first, second = session(restless), session(restless)
    assert list(first.weights()) == list(second.weights())
    assert "sequential/batch_normalization/moving_mean" in first.weights()
    second.load_weights(first.weights())
    assert same(first.weights(), second.weights())
    assert first.parameters() == first.model.count_params() == sum(array.size for array in first.weights().values())


def test_weights_that_do_not_fit_are_named():
    given = session().weights()
    given["sequential/dense/kernel"] = np.zeros((2, 2), np.float32)
    given["stray"] = given.pop("sequential/dense_1/bias")
    with pytest.raises(errors.BadInput) as caught:
        session().load_weights(given)
    for words in ("dense_1/bias is missing", "stray is not in", "shape (2, 2), the model's has (6, 16)"):
        assert words in str(caught.value)


# Inputs and evaluation


class Rows:
    """A feed of given batches."""

    def __init__(self, *batches: Batch):
        self.batches = batches

    def ordered(self) -> Any:
        return iter(self.batches)


def test_outputs_judge_each_row_in_evaluation_mode():
    trained = session(restless, recipe=Recipe(label_smoothing=0.1))
    trained.step(batch(), 1.0)
    before, given = arrays(trained), batch(11, seed=4)
    trained.parts = 3
    found = list(trained.outputs(Rows(given)))
    assert [len(one.losses) for one in found] == [4, 4, 3]
    outputs, rows = (np.concatenate([getattr(one, name) for one in found]) for name in ("outputs", "losses"))
    np.testing.assert_allclose(outputs, trained.predict(given.inputs), rtol=1e-5, atol=1e-6)
    scores = outputs - np.log(np.exp(outputs).sum(1, keepdims=True))
    np.testing.assert_allclose(rows, -scores[np.arange(11), given.targets], rtol=1e-4)
    assert np.array_equal(np.concatenate([one.index for one in found]), given.index)
    assert same(before, arrays(trained))


def test_images_reach_the_model_with_channels_last():
    seen: list[tuple[int, ...]] = []

    def network(schema: Schema) -> Any:
        seen.append(schema.input_shape)
        return keras.Sequential([keras.Input(schema.input_shape), keras.layers.Flatten(), keras.layers.Dense(schema.outputs)])

    trained = session(network, IMAGES)
    assert seen == [(8, 6, 3)]
    images = batch(5, (3, 8, 6)).inputs
    weights = trained.weights()
    expected = images.transpose(0, 2, 3, 1).reshape(5, -1) @ weights["sequential/dense/kernel"]
    np.testing.assert_allclose(trained.predict(images), expected, rtol=1e-4, atol=1e-5)
    trained.step(Batch(images, np.arange(5) % 3, np.arange(5), 0, 5), 1.0)


def test_columns_of_a_table_reach_the_model_by_name_and_a_subclass_is_built():
    columns = (
        Column(name="age", kind="number", missing=2),
        Column(name="town", kind="category", categories=("a", "b")),
        Column(name="trade", kind="category", categories=("x",)),
    )
    schema = Schema(inputs=columns, target=Target(name="pay", kind="number"))

    class Net(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.dense = keras.layers.Embedding(3, 2), keras.layers.Dense(1)

        def call(self, inputs: Any) -> Any:
            towns = keras.layers.Flatten()(self.embedding(inputs["categories"]))
            return self.dense(keras.ops.concatenate([inputs["numbers"], towns], axis=1))

    random = np.random.default_rng(0)
    numbers, categories = random.normal(size=(12, 2)).astype(np.float32), random.integers(0, 2, (12, 2))
    given = Batch({"numbers": numbers, "categories": categories}, numbers.sum(1), np.arange(12), 0, 12)
    trained = session(Net, schema, recipe=Recipe(lr=0.05))
    trained.parts = 2
    made = [float(trained.step(given, 1.0).loss) for _ in range(40)]
    assert made[-1] < 0.2 * made[0]


@pytest.mark.parametrize("by_name", [True, False])
def test_several_arrays_reach_the_model_by_name_or_in_order(by_name: bool):
    columns = (Column(name="left", kind="array", shape=(2,)), Column(name="right", kind="array", shape=(3,)))
    schema = Schema(inputs=columns, target=Target(name="y", kind="number"))

    def network() -> Any:
        given = {column.name: keras.Input(column.shape, name=column.name) for column in columns}
        outputs = keras.layers.Dense(1)(keras.layers.Concatenate()(list(given.values())))
        return keras.Model(given if by_name else list(given.values()), outputs)

    random = np.random.default_rng(0)
    arrays = {column.name: random.normal(size=(12, *column.shape)).astype(np.float32) for column in columns}
    inputs = arrays if by_name else tuple(arrays.values())
    trained = session(network, schema, recipe=Recipe(lr=0.05))
    trained.parts = 3
    given = Batch(inputs, arrays["left"][:, 0], np.arange(12), 0, 12)
    made = [float(trained.step(given, 1.0).loss) for _ in range(30)]
    assert made[-1] < 0.2 * made[0]
    expected = np.concatenate(list(arrays.values()), axis=1) @ trained.weights()["dense/kernel"]
    np.testing.assert_allclose(trained.predict(inputs), expected + trained.weights()["dense/bias"], rtol=1e-4, atol=1e-5)


def test_a_network_in_half_precision_is_trained_and_not_exported(tmp_path: Path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        trained = session(restless, recipe=Recipe(lr=0.02))
        made = [float(trained.step(batch(), 1.0).loss) for _ in range(30)]
    finally:
        keras.config.set_dtype_policy("float32")
    assert made[-1] < made[0]
    assert {array.dtype for array in trained.weights().values()} == {np.dtype(np.float32)}
    assert trained.predict(batch().inputs).dtype == np.float32
    with pytest.raises(errors.BadInput, match="computes in bfloat16"):
        KerasBackend().export(trained, batch(2).inputs, tmp_path / "model.onnx")


# What is refused


def ending_in(activation: str | None = None, units: int = 3) -> Any:
    return lambda: keras.Sequential([keras.Input((6,)), keras.layers.Dense(units, activation=activation)])


def by_operation() -> keras.Model:
    inputs = keras.Input((6,))
    return keras.Model(inputs, keras.ops.softmax(keras.layers.Dense(3)(inputs)))


@pytest.mark.parametrize(
    ("model", "changes", "words"),
    [
        (ending_in("softmax"), {}, "ends in a softmax"),
        (lambda: keras.Sequential([keras.Input((6,)), ending_in("softmax")()]), {}, "ends in a softmax"),
        (by_operation, {}, "ends in a softmax"),
        (
            lambda: keras.Sequential([keras.Input((6,)), keras.layers.Reshape((2, 3)), keras.layers.Dense(3)]),
            {},
            "gives \\(2, 3\\) values",
        ),
        (lambda: keras.Sequential([keras.Input((6,)), keras.layers.Dense(3, trainable=False)]), {}, "no trainable weights"),
        (ending_in(units=4), {}, r"gives \(4,\) values a row; there are 3 classes"),
        (lambda: keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)]), {}, r"does not take its inputs \(\[2, 6\]\)"),
        (lambda: 1 / 0, {}, "building the model failed: ZeroDivisionError"),
        (lambda: 3, {}, "gave a int, not a keras.Model"),
        (plain, {"recipe": Recipe(optimizer="muon")}, "muon of Keras scales its updates otherwise"),
        (plain, {"recipe": Recipe(optimizer="adadelt")}, "Did you mean 'adadelta'"),
        (plain, {"recipe": Recipe(momentum=0.5)}, "momentum is 0.5, which adamw does not take"),
        (plain, {"step": lambda model, batch: 0}, "takes no `step` yet"),
        (
            plain,
            {"plan": replace(PLAN, choices=(Choice(method="chunked_loss", config={}, keeps="rounding", why=""),))},
            "chunked_loss cannot",
        ),
    ],
)
def test_what_cannot_work_is_said_in_words(model: Any, changes: dict[str, Any], words: str):
    with pytest.raises(errors.BadInput, match=words):
        session(model, **changes)


def test_a_loss_that_is_not_one_number_is_said_in_words():
    with pytest.raises(errors.BadInput, match=r"the loss gives \(12,\) values, not one number"):
        session(loss=lambda outputs, targets: keras.ops.sum(outputs, axis=-1)).step(batch(), 1.0)


def test_parts_add_up_to_the_gradient_of_the_whole_batch():
    keras.utils.set_random_seed(0)
    tokens = keras.Input((3,), dtype="int32")
    x = keras.layers.GlobalAveragePooling1D()(keras.layers.Embedding(7, 4)(tokens))
    model = keras.Model(tokens, keras.layers.Dense(2)(keras.layers.Dense(5, activation="tanh")(x)))
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.build(model.trainable_variables)
    engine = engines.choose(model, optimizer, lambda outputs, targets: keras.ops.mean((outputs - targets) ** 2), None)
    random = np.random.default_rng(0)
    inputs, targets = random.integers(0, 7, (10, 3)), random.normal(size=(10, 2)).astype("float32")

    def found(*ends: int) -> tuple[float, list[np.ndarray]]:
        places = [slice(begin, end) for begin, end in pairwise((0, *ends))]
        tensor = keras.ops.convert_to_tensor
        parts = ((tensor(inputs[one]), tensor(targets[one]), (one.stop - one.start) / 10) for one in places)
        loss, gradients = engine.gradient(parts, len(ends))
        return float(loss), [keras.ops.convert_to_numpy(one) for one in gradients]

    whole = found(10)
    for ends in ((4, 7, 10), (4, 7, 10), (9, 10), (10,)):  # nothing is left of an earlier batch
        loss, gradients = found(*ends)
        assert loss == pytest.approx(whole[0], rel=1e-5)
        for one, other in zip(gradients, whole[1], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    if (
        keras.backend.backend() == "tensorflow"
    ):  # after one batch in one part there may be parts again, after two there are none
        assert engine._adding is not None
        found(10)
        assert engine._adding is None
