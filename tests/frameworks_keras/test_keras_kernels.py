"""Layers by faster kernels train as Keras's own do: the same loss, gradients and statistics."""

from __future__ import annotations

import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="`make test-keras` runs this test where Keras is installed")

from keras import layers  # noqa: E402

from delest.frameworks.keras import engines, kernels  # noqa: E402

IMAGE = (9, 10, 6)
CHANGED = {
    "normalised images": (IMAGE, lambda: layers.BatchNormalization()),
    "normalised rows": ((7,), lambda: layers.BatchNormalization(momentum=0.7, epsilon=1e-5)),
    "normalised sequences": ((5, 7), lambda: layers.BatchNormalization(axis=2)),
    "normalised without scale": (IMAGE, lambda: layers.BatchNormalization(scale=False)),
    "normalised without offset": (IMAGE, lambda: layers.BatchNormalization(center=False)),
    "pooled": (IMAGE, lambda: layers.MaxPooling2D()),
    "pooled unevenly": (IMAGE, lambda: layers.MaxPooling2D((3, 2))),
    "pointwise": (IMAGE, lambda: layers.Conv2D(5, 1, activation="relu")),
    "pointwise with steps": (IMAGE, lambda: layers.Conv2D(5, 1, strides=2, use_bias=False)),
    "depthwise": (IMAGE, lambda: layers.DepthwiseConv2D(3, padding="same", activation="relu")),
    "depthwise with steps": (IMAGE, lambda: layers.DepthwiseConv2D((3, 2), strides=2, padding="same", use_bias=False)),
    "depthwise inside": (IMAGE, lambda: layers.DepthwiseConv2D(3)),
}
LEFT = {
    "renormalised": (IMAGE, lambda: layers.BatchNormalization(renorm=True)),
    "normalised over rows": (IMAGE, lambda: layers.BatchNormalization(axis=1)),
    "pooled by overlapping windows": (IMAGE, lambda: layers.MaxPooling2D(3, strides=2)),
    "pooled over the edge": (IMAGE, lambda: layers.MaxPooling2D(2, padding="same")),
    "a convolution": (IMAGE, lambda: layers.Conv2D(5, 3)),
    "a convolution in groups": (IMAGE, lambda: layers.Conv2D(6, 1, groups=2)),
    "a dilated depthwise one": (IMAGE, lambda: layers.DepthwiseConv2D(3, dilation_rate=2)),
    "two of each channel": (IMAGE, lambda: layers.DepthwiseConv2D(3, depth_multiplier=2)),
}
BY_FRAMEWORK = {"jax": ("pooled", "pointwise", "depthwise"), "torch": ("normalised",), "tensorflow": ("normalised",)}


class OwnNormalisation(layers.BatchNormalization):
    def call(self, inputs, training=None, mask=None):
        return inputs


def model_of(shape: tuple[int, ...], make) -> keras.Model:
    keras.utils.set_random_seed(0)
    random = np.random.default_rng(0)
    inputs = keras.Input(shape)
    x = layers.ReLU()(layers.Dense(shape[-1])(inputs))  # a zero is the highest of many windows more than once
    model = keras.Model(inputs, layers.Dense(1)(layers.Flatten()(make()(x))))
    for variable in model.trainable_variables:
        variable.assign(random.normal(size=variable.shape))
    return model


def step(model: keras.Model, inputs):
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.build(model.trainable_variables)
    engine = engines.choose(model, optimizer, lambda outputs, targets: keras.ops.mean((outputs - targets) ** 2), None)
    rows = keras.ops.convert_to_tensor(inputs)
    loss, gradients = engine.gradient([(rows, keras.ops.ones((len(inputs), 1)), 0.7)])
    statistics = [keras.ops.convert_to_numpy(one.value) for one in model.non_trainable_variables]
    return float(loss), [keras.ops.convert_to_numpy(one) for one in gradients], statistics


def changes(name: str) -> bool:
    return name.startswith(BY_FRAMEWORK[keras.backend.backend()])


@pytest.mark.parametrize("name", CHANGED)
def test_a_step_is_the_same_to_rounding(name: str, monkeypatch: pytest.MonkeyPatch):
    shape, make = CHANGED[name]
    inputs = np.random.default_rng(1).normal(size=(12, *shape)).astype("float32")
    model = model_of(shape, make)
    assert bool(kernels.Kernels(model)._calls) == changes(name)
    weights = model.get_weights()
    loss, gradients, statistics = step(model, inputs)
    model.set_weights(weights)
    monkeypatch.setattr(kernels, "_makers", dict)
    own_loss, own_gradients, own_statistics = step(model, inputs)
    assert loss == pytest.approx(own_loss, rel=1e-5)
    largest = max(float(np.abs(one).max()) for one in own_gradients)
    for found, own in zip(gradients, own_gradients, strict=True):
        np.testing.assert_allclose(found, own, rtol=1e-4, atol=1e-4 * largest)
    for found, own in zip(statistics, own_statistics, strict=True):
        np.testing.assert_allclose(found, own, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", LEFT)
def test_layers_that_do_more_are_left_as_they_are(name: str):
    assert not kernels.Kernels(model_of(*LEFT[name]))._calls


def test_a_subclass_is_left_as_it_is():
    assert not kernels.Kernels(model_of(IMAGE, OwnNormalisation))._calls


def test_doubles_are_keras_s_own():
    inputs = keras.Input((7,), dtype="float64")
    model = keras.Model(inputs, layers.BatchNormalization(dtype="float64")(inputs))
    with kernels.Kernels(model).used():
        found = model(np.random.default_rng(1).normal(size=(5, 7)), training=True)
    assert abs(float(keras.ops.mean(found))) < 1e-6


@pytest.mark.parametrize("make", [lambda: layers.Conv2D(5, 1), lambda: layers.DepthwiseConv2D(3)])
def test_half_precision_is_keras_s_own(make):
    keras.utils.set_random_seed(0)
    inputs = keras.Input(IMAGE)
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = keras.Model(inputs, make()(inputs))
    finally:
        keras.config.set_dtype_policy("float32")
    rows = np.random.default_rng(1).normal(size=(3, *IMAGE)).astype("float32")
    own = keras.ops.convert_to_numpy(keras.ops.cast(model(rows, training=True), "float32"))
    with kernels.Kernels(model).used():
        found = keras.ops.convert_to_numpy(keras.ops.cast(model(rows, training=True), "float32"))
    np.testing.assert_array_equal(found, own)


def test_a_model_that_is_not_built_is_left_as_it_is():
    assert not kernels.Kernels(keras.Sequential([layers.BatchNormalization()]))._calls


def test_layers_are_their_own_again_afterwards():
    make = layers.MaxPooling2D if keras.backend.backend() == "jax" else layers.BatchNormalization
    model = model_of(IMAGE, make)
    found = kernels.Kernels(model)
    with found.used():
        assert any("call" in vars(layer) for layer in model.layers)
    assert not any("call" in vars(layer) for layer in model.layers)


@pytest.mark.parametrize("trainable", [True, False])
def test_normalisation_that_is_frozen_or_masked_is_keras_s_own(trainable: bool):
    inputs = keras.Input((5, 7))
    x = layers.Masking(-1.0)(inputs) if trainable else inputs
    norm = layers.BatchNormalization()
    norm.trainable = trainable
    model = keras.Model(inputs, layers.Dense(1)(layers.Flatten()(norm(x))))
    rows = np.random.default_rng(1).normal(size=(6, 5, 7)).astype("float32")
    rows[:, 3:] = -1.0
    before = keras.ops.convert_to_numpy(model(rows, training=True))
    first = [keras.ops.convert_to_numpy(one.value) for one in norm.non_trainable_variables]
    norm.moving_mean.assign(keras.ops.zeros((7,)))
    norm.moving_variance.assign(keras.ops.ones((7,)))
    with kernels.Kernels(model).used():
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(model(rows, training=True)), before)
    for one, other in zip(norm.non_trainable_variables, first, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(one.value), other)
