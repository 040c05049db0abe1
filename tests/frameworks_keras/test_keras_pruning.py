"""Keras networks made narrower: families of networks, exact cuts, built again from their factory, saved, exported; and a whole shrink."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

keras = pytest.importorskip("keras", reason="`make test-keras` runs this test where Keras is installed")

import delest  # noqa: E402
from delest import errors  # noqa: E402
from delest.frameworks.keras import KerasBackend  # noqa: E402
from delest.frameworks.keras.layers import named_weights  # noqa: E402
from delest.frameworks.keras.pruning.pruner import Pruner  # noqa: E402
from delest.frameworks.keras.session import KerasSession  # noqa: E402
from delest.job import Job, Recipe  # noqa: E402
from delest.records.batch import Batch  # noqa: E402
from delest.records.plan import Plan  # noqa: E402
from delest.records.source import Column, Schema, Target  # noqa: E402
from delest.shrinking.prune import Costs, Wish, choose_units  # noqa: E402

ON = keras.backend.backend()
K = keras.layers
TARGET = Target(name="y", kind="class", classes=("a", "b", "c"))
IMAGES = Schema(inputs=(Column(name="image", kind="image", shape=(32, 32, 3), dtype="uint8"),), target=TARGET)
TABLE = Schema(inputs=(Column(name="x", kind="array", shape=(20,)),), target=TARGET)


def block(x: Any, width: int, stride: int = 1) -> Any:
    x = K.Conv2D(width, 3, strides=stride, padding="same", use_bias=False)(x)
    return K.ReLU()(K.BatchNormalization()(x))


def vgg() -> Any:
    layers = []
    for width in (16, 32, 64):
        layers += [K.Conv2D(width, 3, padding="same"), K.BatchNormalization(), K.ReLU(), K.MaxPooling2D()]
    return keras.Sequential(
        [keras.Input((32, 32, 3)), *layers, K.Flatten(), K.Dense(64, activation="relu"), K.Dropout(0.2), K.Dense(3)]
    )


def resnet() -> Any:
    inputs = x = keras.Input((32, 32, 3))
    x = block(x, 16)
    for width, stride in ((16, 1), (32, 2), (64, 2)):
        y = block(x, width, stride)
        y = K.BatchNormalization()(K.Conv2D(width, 3, padding="same", use_bias=False)(y))
        if stride > 1:
            x = K.Conv2D(width, 1, strides=stride)(x)
        x = keras.ops.relu(x + y)  # operations, as well as layers
    return keras.Model(inputs, K.Dense(3)(K.GlobalAveragePooling2D()(x)))


def mobilenet() -> Any:
    base = keras.applications.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, include_top=False, pooling="avg")
    return keras.Sequential([keras.Input((32, 32, 3)), base, K.Dense(3)])


def dense_and_excited() -> Any:
    """Concatenations, a squeeze-and-excitation gate, transposed and separable convolutions, one layer called twice."""
    inputs = x = keras.Input((32, 32, 3))
    x = block(x, 16, 2)
    x = K.Concatenate()([x, block(x, 16), K.SeparableConv2D(8, 3, padding="same")(x)])
    gate = K.Dense(40, activation="sigmoid")(K.Dense(16, activation="relu")(K.GlobalAveragePooling2D()(x)))
    x = K.Multiply()([x, K.Reshape((1, 1, 40))(gate)])
    x = K.Conv2DTranspose(16, 3, strides=2, padding="same", activation="relu")(x)
    shared = K.Conv2D(16, 3, padding="same", activation="relu")
    return keras.Model(inputs, K.Dense(3)(K.GlobalMaxPooling2D()(shared(shared(x)))))


def mlp() -> Any:
    return keras.Sequential([keras.Input((20,)), K.Dense(64, activation="relu"), K.Dense(64, activation="relu"), K.Dense(3)])


NETWORKS = {
    "vgg": (vgg, IMAGES),
    "resnet": (resnet, IMAGES),
    "mobilenet": (mobilenet, IMAGES),
    "mixed": (dense_and_excited, IMAGES),
    "mlp": (mlp, TABLE),
}


def inputs_of(schema: Schema, rows: int = 8) -> Any:
    shape = (20,) if schema is TABLE else (3, 32, 32)
    return np.random.default_rng(0).normal(size=(rows, *shape)).astype(np.float32)


class Feed:
    def __init__(self, schema: Schema):
        self.batch = Batch(inputs_of(schema), np.arange(8) % 3, np.arange(8), 0, 8)

    def ordered(self) -> Any:
        return iter([self.batch] * 2)


def session_of(factory: Any, schema: Schema) -> KerasSession:
    job = Job(model=factory, data="", batch_size=8, recipe=Recipe(label_smoothing=0.0))
    session = KerasSession(job, Plan(batch_size=8, micro_batch=8), schema)
    for _ in range(2):  # statistics of normalisation are not those of the start
        session.step(Feed(schema).batch, 1.0)
    return session


def pruner_of(session: KerasSession, schema: Schema) -> Pruner:
    return KerasBackend().pruner(session, session.job, None, inputs_of(schema, 2))


@pytest.mark.parametrize("name", NETWORKS)
def test_three_tenths_are_cut_learn_are_saved_built_again_and_exported(name: str, tmp_path: Path):
    factory, schema = NETWORKS[name]
    session = session_of(factory, schema)
    pruner = pruner_of(session, schema)
    assert pruner.widths, pruner.found.whole
    before = pruner.parameters()
    while pruner.parameters() > 0.7 * before:  # a cut of one part of a concatenation takes less than is expected
        costs = Costs(parameters={layer: one.parameters for layer, one in pruner.layers.items()}, seconds={})
        wish = Wish(parameters=1 - 0.69 * before / pruner.parameters())
        choice = choose_units(pruner.widths, pruner.score(Feed(schema), 2), costs, wish, step=4)
        assert choice.cuts
        pruner.cut(choice.cuts)
    architecture = json.loads(json.dumps(pruner.architecture()))
    narrow = KerasBackend().narrower(session.job, schema, architecture)
    student = KerasBackend().student(narrow, Plan(batch_size=8, micro_batch=8), schema, session)
    student.load_weights(pruner.weights())
    assert np.isfinite(float(student.step(Feed(schema).batch, 1.0).loss))
    student.model.save(tmp_path / "narrow.keras")
    again = keras.models.load_model(tmp_path / "narrow.keras", safe_mode=True)
    for variable, other in zip(again.weights, student.model.weights, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), keras.ops.convert_to_numpy(other))
    if ON != "jax":  # which exports by a job's file: the whole shrink below does
        KerasBackend().export(student, inputs_of(schema, 2), tmp_path / "narrow.onnx")
        run = onnxruntime.InferenceSession(tmp_path / "narrow.onnx")
        (answers,) = run.run(None, {run.get_inputs()[0].name: inputs_of(schema)})
        np.testing.assert_allclose(answers, student.predict(inputs_of(schema)), atol=1e-3)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_cut_network_answers_like_the_one_with_those_units_silenced(name: str):
    factory, schema = NETWORKS[name]
    session = session_of(factory, schema)
    pruner = pruner_of(session, schema)
    cuts = {width.name: [0, width.size - 1] for width in pruner.widths if width.size > 2}
    silenced = {name: np.array(array) for name, array in session.weights().items()}
    for path, place in _taken(pruner).items():
        gone = [
            root in {pruner.found.units[name][unit] for name, units in cuts.items() for unit in units} for root in place.roots
        ]
        silenced[path][(slice(None),) * (place.axis % silenced[path].ndim) + (gone,)] = 0
    pruner.cut(cuts)
    narrow = KerasSession(
        KerasBackend().narrower(session.job, schema, pruner.architecture()), Plan(batch_size=8, micro_batch=8), schema
    )
    narrow.load_weights(pruner.weights())
    session.load_weights(silenced)
    inputs = inputs_of(schema)
    expected = session.predict(inputs)
    np.testing.assert_allclose(narrow.predict(inputs), expected, atol=2e-4 * max(1.0, float(np.abs(expected).max())))


def _taken(pruner: Pruner) -> Any:
    from delest.frameworks.keras.pruning.pruner import _taken as taken

    assert pruner.widths
    return taken(pruner._channels)


class Called(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = K.Dense(16), K.Dense(3)

    def call(self, inputs: Any) -> Any:
        return self.two(self.one(inputs))


def odd() -> Any:
    inputs = keras.Input((20,))
    x = K.Dense(24, activation="relu")(inputs)
    x = K.LayerNormalization()(x)  # over all channels: kept
    x = K.Dense(12, activation="relu")(x) * np.arange(12, dtype="float32")  # values of single channels: kept
    x = K.Activation("sparsemax")(K.Dense(8)(x))  # over all channels: kept
    return keras.Model(inputs, K.Dense(3)(K.Dense(16, activation="relu")(x)))


def test_what_is_kept_whole_says_why():
    pruner = pruner_of(session_of(Called, TABLE), TABLE)
    assert pruner.widths == ()
    assert "only functional and sequential models" in next(iter(pruner.found.whole.values()))
    found = pruner_of(session_of(odd, TABLE), TABLE).found
    assert [width.size for width in found.widths] == [16]
    assert any("LayerNormalization takes its channels as they are" in why for why in found.whole.values())


def test_another_network_is_told_from_the_one_that_was_made_narrower():
    session = session_of(mlp, TABLE)
    pruner = pruner_of(session, TABLE)
    pruner.cut({pruner.widths[0].name: [1, 2, 3]})
    other = Job(
        model=lambda: keras.Sequential([keras.Input((20,)), K.Dense(32, activation="relu"), K.Dense(64), K.Dense(3)]), data=""
    )
    with pytest.raises(errors.BadInput, match="another network"):
        KerasBackend().narrower(other, TABLE, pruner.architecture()).model()


def test_teaching_comes_nearer_to_the_teacher():
    teacher = session_of(mlp, TABLE)
    for _ in range(30):
        teacher.step(Feed(TABLE).batch, 1.0)
    student = KerasBackend().student(teacher.job, Plan(batch_size=8, micro_batch=8), TABLE, teacher)
    inputs = inputs_of(TABLE, 64)

    def apart() -> float:
        return float(np.abs(student.predict(inputs).argmax(1) != teacher.predict(inputs).argmax(1)).mean())

    before = apart()
    for _ in range(60):
        student.step(Feed(TABLE).batch, 1.0)
    assert apart() < before


JOB = """
import keras
import numpy as np

import delest

K = keras.layers


def net():
    return keras.Sequential([
        keras.Input((8, 8, 1)), K.Conv2D(32, 3, padding="same", use_bias=False), K.BatchNormalization(), K.ReLU(),
        K.Conv2D(32, 3, activation="relu"), K.Flatten(), K.Dense(64, activation="relu"), K.Dropout(0.2), K.Dense(4)])


random, labels = np.random.default_rng(0), np.arange(1500) % 4
prototypes = random.integers(0, 200, (4, 8, 8))
images = np.clip(prototypes[labels] + random.integers(-30, 30, (1500, 8, 8)), 0, 255).astype(np.uint8)
job = delest.Job(model=net, data=(images, labels), batch_size=32, recipe=delest.Recipe(epochs=3), name="small")
"""


def test_a_whole_shrink_ships_a_narrower_network_that_is_loaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.py").write_text(JOB)
    run = delest.train("small.py", out="run")
    shrunk = delest.shrink(run, max_drop=0.1, time="40s")
    assert any(stage.accepted for stage in shrunk.stages), shrunk.stages
    assert shrunk.shipped.startswith(("pruned", "fresh"))
    changed = json.loads((tmp_path / "run" / "shrunk" / "architecture.json").read_text())
    assert changed["layers"]
    loaded = delest.load("run")
    assert isinstance(loaded, keras.Model)
    assert loaded.count_params() == next(one.parameters for one in shrunk.candidates if one.name == shrunk.shipped)
    assert {name: list(variable.shape) for name, variable in named_weights(loaded).items()}.items() >= {
        name: change["now"] for name, change in changed["tensors"].items()
    }.items()
