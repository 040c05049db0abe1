"""DelestCallback in model.fit: the same training, in parts where memory is short, with a run folder and early stopping."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="`make test-keras` runs this test where Keras is installed")

from delest import errors, malloc  # noqa: E402
from delest.frameworks.keras.callback import DelestCallback  # noqa: E402
from delest.hardware import machine  # noqa: E402
from delest.records.plan import Choice, Plan  # noqa: E402
from delest.training import limit  # noqa: E402

ON = keras.backend.backend()
needs_parts = pytest.mark.skipif(ON == "jax", reason="steps of JAX's fit cannot be made in parts")
PARTS = Plan(
    batch_size=32,
    micro_batch=10,
    choices=(Choice(method="micro_batch", config={"rows": 10}, keeps="rounding", why="asked for"),),
)


def data(rows: int = 96) -> tuple[Any, Any]:
    random = np.random.default_rng(0)
    classes = random.integers(0, 3, rows)
    return (random.normal(size=(rows, 6)) + classes[:, None]).astype("float32"), classes


def model(**how: Any) -> keras.Model:
    keras.utils.set_random_seed(3)
    layers = keras.layers
    made = keras.Sequential([keras.Input((6,)), layers.Dense(16, activation="relu", kernel_regularizer="l2"), layers.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    made.compile(**{"optimizer": keras.optimizers.Adam(0.01), "loss": loss, "metrics": ["accuracy"], **how})
    return made


def fit(made: keras.Model, *callbacks: Any, epochs: int = 3, **more: Any) -> dict[str, list[float]]:
    inputs, targets = data()
    validation = data(40)
    history = made.fit(
        inputs,
        targets,
        batch_size=32,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=list(callbacks),
        validation_data=validation,
        **more,
    )
    return history.history


def run_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def test_it_writes_a_run_folder_and_changes_nothing(tmp_path: Path):
    plain, ours = fit(model()), fit(model(), DelestCallback(out=tmp_path / "run"))
    for name, values in plain.items():
        np.testing.assert_allclose(ours[name], values, rtol=1e-5)
    run = run_of(tmp_path / "run")
    assert (run["status"], run["steps"], run["plan"]["batch_size"]) == ("done", 9, 32)
    assert run["versions"].keys() >= {"keras", ON}
    assert "loss" in run["validation"]
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


def test_what_steps_free_is_kept_until_the_fit_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []
    monkeypatch.setattr(malloc, "is_tuned", lambda: False)
    monkeypatch.setattr(machine, "peak_resident_bytes", machine.resident_bytes)
    for name in ("keep_freed", "move_threshold"):
        monkeypatch.setattr(malloc, name, lambda name=name: asked.append(name) or True)
    fit(model(), DelestCallback(out=tmp_path / "run"))
    assert asked == ["keep_freed", "move_threshold"]


def test_a_second_fit_wants_a_folder_of_its_own(tmp_path: Path):
    callback, made = DelestCallback(out=tmp_path / "run"), model()
    fit(made, callback, epochs=1)
    with pytest.raises(errors.BadInput, match=r"holds another run: choose another out=\.$"):
        fit(made, callback, epochs=1)


@needs_parts
def test_parts_give_the_same_training(tmp_path: Path):
    plain, made = fit(model()), model()
    before = made.train_function
    ours = fit(made, DelestCallback(plan=PARTS, out=tmp_path / "run"))
    assert ours.keys() == plain.keys()
    for name, values in plain.items():
        np.testing.assert_allclose(ours[name], values, rtol=2e-4, atol=1e-5)
    run = run_of(tmp_path / "run")
    assert run["plan"]["micro_batch"] == 8  # 32 rows in 4 parts
    assert before is None
    assert fit(made, epochs=1)["loss"][0] < plain["loss"][0]  # the model's own steps are back


@needs_parts
def test_sample_weights_and_several_outputs_in_parts(tmp_path: Path):
    weights = np.random.default_rng(1).random(96).astype("float32")
    plain = fit(model(), sample_weight=weights)
    ours = fit(model(), DelestCallback(plan=PARTS, out=tmp_path / "run"), sample_weight=weights)
    np.testing.assert_allclose(ours["loss"], plain["loss"], rtol=2e-4)


def test_it_stops_early(tmp_path: Path):
    made = model()
    made.optimizer.learning_rate = 0.0
    assert len(fit(made, DelestCallback(out=tmp_path / "run", patience=2), epochs=20)["loss"]) == 3
    run = run_of(tmp_path / "run")
    assert run["stopped_by"] == "plateau"


def test_an_error_in_a_step_ends_the_run(tmp_path: Path):
    class Breaks(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            raise ZeroDivisionError("here")

    made = model()
    with pytest.raises(ZeroDivisionError):
        fit(made, DelestCallback(out=tmp_path / "run"), Breaks())
    gc.collect()
    assert run_of(tmp_path / "run")["status"] == "failed"


@needs_parts
@pytest.mark.parametrize("kept", [False, True])
def test_an_error_elsewhere_gives_the_model_its_own_steps_back(tmp_path: Path, kept: bool):
    class Breaks(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            raise ZeroDivisionError("here")

    made = model()
    with pytest.raises(ZeroDivisionError) as held:
        fit(made, DelestCallback("6GiB", out=tmp_path / "run"), Breaks())
    if not kept:  # as notebooks keep the last error
        del held
        gc.collect()
        assert "make_train_function" not in vars(made)
    fit(made)
    assert "make_train_function" not in vars(made)
    assert made.train_function.__module__ != "delest.frameworks.keras.callback"
    assert run_of(tmp_path / "run")["status"] == "failed"
    assert not limit.is_held()


@needs_parts
def test_weights_that_the_loss_does_not_reach_stay_as_keras_leaves_them(tmp_path: Path):
    class Spare(keras.layers.Layer):
        def build(self, shape):
            self.spare = self.add_weight(shape=(3,), initializer="ones", name="spare")

        def call(self, inputs):
            return inputs

    def made() -> keras.Model:
        keras.utils.set_random_seed(3)
        found = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3), Spare()])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        found.compile(optimizer=keras.optimizers.AdamW(0.1, weight_decay=0.5), loss=loss)
        return found

    plain, ours = made(), made()
    fit(plain)
    fit(ours, DelestCallback(plan=PARTS, out=tmp_path / "run"))
    for one, other in zip(ours.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@needs_parts
def test_losses_in_doubles_stay_doubles(tmp_path: Path):
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    try:
        plain, ours = fit(model()), fit(model(), DelestCallback(plan=PARTS, out=tmp_path / "run"))
    finally:
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy("float32")
    np.testing.assert_allclose(ours["loss"], plain["loss"], rtol=1e-7)


@needs_parts
def test_no_fewer_parts_than_planned_where_parts_are_found_by_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("delest.frameworks.keras.engines.survives_failed_allocation", lambda: False)
    callback = DelestCallback("8GiB", PARTS, out=tmp_path / "run")
    fit(model(), callback)
    assert callback.steps.parts == 4


class Own(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.dense = keras.layers.Dense(3)

    def call(self, inputs: Any) -> Any:
        return self.dense(inputs)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        return super().compute_loss(x, y, y_pred, sample_weight, training)


def test_what_it_cannot_act_in_is_refused(tmp_path: Path):
    own = Own()
    own.compile(optimizer="adam", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    cases = [(own, "compute_loss of its own")]
    summed = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")
    cases += [(model(loss=summed), "reduction='sum'")]
    cases += [(model(optimizer=keras.optimizers.SGD(0.1, loss_scale_factor=8.0)), "loss_scale_factor")]
    if ON == "jax":
        cases = [(model(), "on JAX its steps cannot be made in parts")]
    for number, (made, words) in enumerate(cases):
        with pytest.raises(errors.BadInput, match=words):
            fit(made, DelestCallback(plan=PARTS, out=tmp_path / f"run-{number}"))
        assert not (tmp_path / f"run-{number}").exists()
    other = Plan(
        batch_size=32, micro_batch=32, choices=(Choice(method="allocator", config={"name": "mmap"}, keeps="bitwise", why=""),)
    )
    if ON != "jax":
        with pytest.raises(errors.BadInput, match="takes precision and micro_batch alone"):
            fit(model(), DelestCallback(plan=other, out=tmp_path / "other"))
    with pytest.raises(errors.BadInput, match=r"patience is 0"):
        DelestCallback(patience=0)
    inputs, targets = data()
    with pytest.raises(errors.BadInput, match="give fit validation_data="):
        model().fit(inputs, targets, verbose=0, callbacks=[DelestCallback(patience=1, out=tmp_path / "unjudged")])
    with pytest.raises(errors.BadInput, match="not a"):
        DelestCallback("plenty")


@needs_parts
def test_a_budget_below_what_the_libraries_take_is_refused(tmp_path: Path):
    with pytest.raises(errors.NothingFits, match="memory="):
        fit(model(), DelestCallback("1MiB", out=tmp_path / "run"))


LIMITED = """
import resource
import sys

import keras
import numpy as np

from delest.frameworks.keras.callback import DelestCallback
from delest.hardware import machine

keras.utils.set_random_seed(0)
images = np.random.default_rng(0).random((512, 64, 64, 3), dtype="float32")
classes = np.arange(512) % 4
net = keras.Sequential([keras.Input((64, 64, 3))] + [keras.layers.Conv2D(32, 3, padding="same", activation="relu") for _ in range(3)]
    + [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(4)])
net.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
net.fit(images[:4], classes[:4], batch_size=4, epochs=1, verbose=0)
memory = machine.resident_bytes() + (220 << 20)
callbacks = [DelestCallback(memory, out="run")] if sys.argv[1] == "with" else []
data, resident = machine.data_and_resident_bytes()
room = (500 if keras.backend.backend() == "tensorflow" else 300) << 20  # of address space, of which TensorFlow takes more than it touches
resource.setrlimit(resource.RLIMIT_DATA, (data + room, data + room))
net.fit(images, classes, batch_size=256, epochs=2, verbose=0, callbacks=callbacks)
print("finished")
"""


@needs_parts
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_under_a_limit_it_finishes_where_it_dies_without(tmp_path: Path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(how: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", LIMITED, how], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    assert "finished" not in run("without").stdout
    done = run("with")
    assert "finished" in done.stdout, done.stderr
    found = run_of(tmp_path / "run")
    assert found["status"] == "done"
    assert any(line["kind"] == "split" for line in found["decisions"])
    assert found["measured"]["peak_bytes"] <= found["plan"]["memory_bytes"]


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="strings are tensors on TensorFlow alone")
def test_strings_are_inputs_like_others(tmp_path: Path):
    import tensorflow as tf

    texts = ["a b", "b c d", "a", "d d"] * 8
    words = keras.layers.TextVectorization(max_tokens=10, output_sequence_length=4)
    words.adapt(texts)
    layers = [words, keras.layers.Embedding(10, 4), keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(2)]
    net = keras.Sequential([keras.Input((), dtype="string"), *layers])
    net.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    data = tf.data.Dataset.from_tensor_slices((texts, np.arange(32) % 2)).batch(8)
    net.fit(data, verbose=0, callbacks=[DelestCallback("8GiB", out=tmp_path / "run")])
    assert run_of(tmp_path / "run")["status"] == "done"
