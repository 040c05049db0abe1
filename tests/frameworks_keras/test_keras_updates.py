"""Adam's update in one pass moves weights as Keras's own does, and steps aside where it cannot."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="`make test-keras` runs this test where Keras is installed")

from delest.frameworks.keras import updates  # noqa: E402
from delest.frameworks.keras.engines import compiled  # noqa: E402

ON = keras.backend.backend()
SHAPES = ((7, 5), (5,), (3, 3, 2, 4), ())
MAKERS = {
    "adam": lambda: keras.optimizers.Adam(0.01, epsilon=1e-8),
    "adam with other rates": lambda: keras.optimizers.Adam(0.003, beta_1=0.8, beta_2=0.9, epsilon=1e-4),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "adam that clips and averages": lambda: keras.optimizers.Adam(0.01, clipnorm=0.5, use_ema=True),
}


class OwnAdam(keras.optimizers.Adam):
    pass


LEFT = {
    "amsgrad": lambda: keras.optimizers.Adam(0.01, amsgrad=True),
    "a subclass": lambda: OwnAdam(0.01),
    "another": lambda: keras.optimizers.RMSprop(0.01),
}
NAME = "update_step" if ON == "tensorflow" else "_parallel_update_step"


def moved(optimizer: Any, *, fused: bool, dtype: str = "float32", steps: int = 5) -> list[np.ndarray]:
    """Weights and the optimizer's variables after some steps."""
    random = np.random.default_rng(0)
    variables = [keras.Variable(random.normal(size=shape).astype("float32"), dtype=dtype) for shape in SHAPES]
    optimizer.build(variables)
    given = [keras.Variable(np.zeros(shape, "float32"), dtype=dtype) for shape in SHAPES]

    def step() -> None:
        gradients = [one.value for one in given]
        if len(SHAPES[0]) == 2 and ON == "torch":  # as backward gives some
            gradients[0] = gradients[0].t().contiguous().t()
        if fused:
            with updates.fused(optimizer):
                optimizer.apply(gradients, variables)
        else:
            optimizer.apply(gradients, variables)

    function = compiled(step)
    for number in range(steps):
        for one, shape in zip(given, SHAPES, strict=True):
            one.assign(random.normal(size=shape).astype("float32") * 10.0 ** (-2 * number))
        optimizer.learning_rate.assign(0.01 / (number + 1))
        function()
    found = [*variables, *optimizer.variables]
    return [np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(one.value, "float32"))) for one in found]


@pytest.mark.parametrize("name", MAKERS)
def test_weights_and_moments_are_those_of_keras(name: str):
    found, own = (moved(MAKERS[name](), fused=fused) for fused in (True, False))
    for a, b in zip(found, own, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("name", LEFT)
def test_other_optimizers_are_left_as_they_are(name: str):
    optimizer = LEFT[name]()
    with updates.fused(optimizer):
        assert NAME not in vars(optimizer)


@pytest.mark.skipif(ON == "jax", reason="XLA fuses by itself")
def test_what_is_fused_is_keras_s_own_again_afterwards():
    optimizer = keras.optimizers.AdamW(0.01)
    with updates.fused(optimizer):
        assert NAME in vars(optimizer)
    assert NAME not in vars(optimizer)


def test_weights_in_bf16_are_moved_by_keras():
    found, own = (moved(keras.optimizers.Adam(0.01), fused=fused, dtype="bfloat16") for fused in (True, False))
    for a, b in zip(found, own, strict=True):
        np.testing.assert_array_equal(a, b)
