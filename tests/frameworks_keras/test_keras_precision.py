"""Training steps in bf16: of layers that were built in fp32, whose answers, weights and export stay as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="`make test-keras` runs this test where Keras is installed")

from keras import layers  # noqa: E402

from delest import errors  # noqa: E402
from delest.frameworks.keras import KerasBackend, precision  # noqa: E402
from delest.frameworks.keras.optimizers import layers_of  # noqa: E402
from delest.frameworks.keras.session import KerasSession  # noqa: E402
from delest.job import Job, Recipe  # noqa: E402
from delest.records.batch import Batch  # noqa: E402
from delest.records.plan import Choice, Plan  # noqa: E402
from delest.records.source import Column, Schema, Target  # noqa: E402

TARGET = Target(name="y", kind="class", classes=("a", "b", "c"))
SCHEMA = Schema(inputs=(Column(name="x", kind="array", shape=(8, 6)),), target=TARGET)
LOWERED = Choice(method="precision", config={"dtype": "bf16"}, keeps="changed", why="")
PLAN, PLAN_BF16 = (Plan(batch_size=12, micro_batch=12, choices=choices) for choices in ((), (LOWERED,)))
SEEN: list[str] = []


@keras.saving.register_keras_serializable()
class Telling(layers.Layer):
    def call(self, inputs: Any, training: bool | None = None) -> Any:
        SEEN.append(f"{'training' if training else 'answering'} in {keras.backend.standardize_dtype(inputs.dtype)}")
        return inputs


def plain() -> Any:
    body = [layers.Dense(16, activation="relu"), layers.BatchNormalization(), Telling(), layers.Flatten(), layers.Dense(3)]
    return keras.Sequential([keras.Input((8, 6)), *body])


def nested() -> Any:
    inputs = x = keras.Input((8, 6))
    x = layers.Add()([layers.Dense(8)(x), layers.MultiHeadAttention(2, 4, output_shape=8)(x, x)])
    x = keras.Sequential([keras.Input((8, 8)), layers.LayerNormalization(), layers.Conv1D(8, 3, padding="same")])(x)
    x = layers.Bidirectional(layers.LSTM(4))(x) + layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, layers.Dense(3)(x))


def session(model: Any = plain, plan: Plan = PLAN, precision: str = "auto") -> KerasSession:
    recipe = Recipe(precision=precision, label_smoothing=0.0)
    return KerasSession(Job(model=model, data="unused", batch_size=12, recipe=recipe), plan, SCHEMA)


def batch() -> Batch:
    random = np.random.default_rng(0)
    return Batch(random.normal(size=(12, 8, 6)).astype(np.float32), random.integers(0, 3, 12), np.arange(12), 0, 12)


@pytest.mark.parametrize("wish", [{"plan": PLAN_BF16}, {"precision": "bf16"}])
def test_training_is_in_bf16_and_nothing_else_is(wish: dict[str, Any]):
    SEEN.clear()
    lowered, own = session(**wish), session()
    before = lowered.predict(batch().inputs)
    np.testing.assert_array_equal(before, own.predict(batch().inputs))
    loss = float(lowered.step(batch(), 1.0).loss)
    assert "training in bfloat16" in SEEN
    assert "answering in bfloat16" not in SEEN
    assert loss == pytest.approx(float(own.step(batch(), 1.0).loss), rel=0.02)
    assert loss != float(own.step(batch(), 1.0).loss)
    assert {layer.dtype_policy.name for layer in layers_of(lowered.model)} == {"float32"}
    assert {array.dtype for array in lowered.weights().values()} == {np.dtype(np.float32)}


class Own(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.last = layers.Dense(6), layers.Dense(3)

    def call(self, inputs: Any) -> Any:
        rows = keras.ops.reshape(inputs, (-1, 48))[:, :6]
        return self.last(rows + self.dense(rows))


def test_a_call_of_one_s_own_takes_part_and_a_loss_of_one_s_own_is_taken_in_fp32():
    seen = []

    def loss(outputs: Any, targets: Any) -> Any:
        seen.append(keras.backend.standardize_dtype(outputs.dtype))
        scores = keras.ops.log_softmax(outputs)
        return -keras.ops.mean(keras.ops.take_along_axis(scores, keras.ops.cast(targets, "int32")[:, None], axis=1))

    job = Job(model=Own, data="unused", batch_size=12, recipe=Recipe(label_smoothing=0.0), loss=loss)
    lowered = KerasSession(job, PLAN_BF16, SCHEMA)
    assert np.isfinite(float(lowered.step(batch(), 1.0).loss))
    assert set(seen) == {"float32"}
    assert {layer.dtype_policy.name for layer in layers_of(lowered.model)} == {"float32"}


def test_a_model_that_cannot_is_told_in_words():
    class Stubborn(layers.Layer):
        def call(self, inputs: Any) -> Any:
            if keras.backend.standardize_dtype(inputs.dtype) != "float32":
                raise TypeError("only fp32 here")
            return inputs

    made = lambda: keras.Sequential([keras.Input((8, 6)), layers.Flatten(), layers.Dense(3), Stubborn()])  # noqa: E731
    with pytest.raises(errors.BadInput, match=r"a step in bf16 fails: .*only fp32 here"):
        session(made, plan=PLAN_BF16).step(batch(), 1.0)


@pytest.mark.parametrize("model", [plain, nested])
def test_it_learns_and_is_exported(model: Any, tmp_path: Path):
    import onnxruntime

    lowered = session(model, plan=PLAN_BF16)
    losses = [float(lowered.step(batch(), 1.0).loss) for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]
    if model is plain and keras.backend.backend() != "jax":  # which exports from files alone
        KerasBackend().export(lowered, batch().inputs[:2], tmp_path / "model.onnx")
        found = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        (answers,) = found.run(None, {found.get_inputs()[0].name: batch().inputs})
        np.testing.assert_allclose(answers, lowered.predict(batch().inputs), rtol=1e-3, atol=1e-4)


def test_layers_of_another_precision_keep_it():
    inputs = keras.Input((8, 6))
    x = layers.Flatten()(
        layers.Dense(4, dtype="mixed_bfloat16", name="half")(layers.Dense(4, dtype="float64", name="double")(inputs))
    )
    model = keras.Model(inputs, layers.Dense(3, name="single")(x))
    names = {layer.name for layer in precision.in_fp32(model)}
    assert "single" in names
    assert not names & {"half", "double", model.name}


def test_policies_come_back_where_a_step_fails():
    model = session().model

    def fail() -> None:
        with precision.in_bf16(precision.in_fp32(model)):
            assert {layer.dtype_policy.name for layer in model.layers} == {"mixed_bfloat16"}
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert {layer.dtype_policy.name for layer in model.layers} == {"float32"}


def test_whether_bf16_gains_is_timed_here():
    assert precision.gains() in (True, False)
    assert precision._product_seconds("float32") > 0
