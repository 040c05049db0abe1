"""Synthetic data: a function of (seed, row), and learnable."""

import tracemalloc

import numpy as np
import pytest

from delest import errors
from delest.data import synthetic


def test_rows_do_not_depend_on_how_they_are_read():
    for source in (synthetic(9, 7, 3, rows=50), synthetic(5, rows=50, classes=None)):
        whole = source.read(np.arange(50))
        some = source.read(np.array([40, 3, 3]))
        for name, values in some.items():
            np.testing.assert_array_equal(values, whole[name][[40, 3, 3]])
        np.testing.assert_array_equal(source.values("target"), whole["target"])


def test_seeds_differ():
    one, again, other = (synthetic(9, 7, 3, seed=seed) for seed in (0, 0, 1))
    index = np.arange(20)
    np.testing.assert_array_equal(one.read(index)["image"], again.read(index)["image"])
    assert not np.array_equal(one.read(index)["image"], other.read(index)["image"])
    assert one.fingerprint == again.fingerprint != other.fingerprint


def test_what_it_is():
    image, features, number = synthetic(28, 28, 1), synthetic(12), synthetic(3, 4, 5, classes=None)
    assert (image.schema.is_image, image.schema.outputs, len(image)) == (True, 10, 1000)
    assert image.read(np.arange(4))["image"].dtype == np.uint8
    assert features.schema.input_shape == (12,)
    assert number.schema.target.kind == "number"
    assert number.schema.inputs[0].kind == "array"
    assert synthetic(4, 4, 3, kind="array").schema.inputs[0].kind == "array"


@pytest.mark.parametrize("shape", [(28, 28, 1), (20,)])
def test_the_nearest_mean_learns_it(shape):
    source = synthetic(*shape, classes=5, rows=600)
    rows = source.read(np.arange(600))
    x = rows[source.schema.inputs[0].name].reshape(600, -1).astype(float)
    means = np.stack([x[:400][rows["target"][:400] == k].mean(0) for k in range(5)])
    chosen = ((x[400:, None] - means) ** 2).sum(-1).argmin(1)
    assert (chosen == rows["target"][400:]).mean() > 0.9


def test_least_squares_learns_the_number():
    source = synthetic(20, classes=None, rows=600)
    rows = source.read(np.arange(600))
    x = np.c_[rows["x"], np.ones(600)]
    weights = np.linalg.lstsq(x[:400], rows["target"][:400], rcond=None)[0]
    assert ((x[400:] @ weights - rows["target"][400:]) ** 2).mean() < 0.5 * rows["target"][400:].var()


def test_a_million_rows_take_no_memory():
    tracemalloc.start()
    source = synthetic(28, 28, 1, rows=1_000_000)
    source.read(np.array([5, 999_999]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


@pytest.mark.parametrize(
    ("shape", "options", "text"),
    [
        ((), {}, "shape"),
        ((0,), {}, "shape"),
        ((4,), {"kind": "image"}, "is no image"),
        ((4,), {"kind": "sound"}, "'image' or 'array'"),
        ((4,), {"rows": 0, "classes": 1}, "2 faults"),
    ],
)
def test_wrong_sizes(shape, options, text):
    with pytest.raises(errors.BadInput, match=text):
        synthetic(*shape, **options)
