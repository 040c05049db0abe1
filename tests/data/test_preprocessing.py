"""Statistics against NumPy's, model inputs against the formula, and the way through JSON."""

import json

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from delest.data import Preprocessing, fit_preprocessing, open_source, preprocessing, unscaled
from delest.records.form import from_json, to_json

RNG = np.random.default_rng(1)
LABELS = np.arange(40) % 2
EVEN = np.arange(0, 40, 2)


def fitted(data, index=EVEN, **wishes):
    source = open_source(data, **wishes)
    return source, fit_preprocessing(source, index), source.read(np.arange(len(source)))


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_standardised_by_channel(channels):
    images = RNG.integers(0, 256, (40, 6, 5, channels), dtype=np.uint8)
    _, fit, rows = fitted((images, LABELS))
    training = images[EVEN].reshape(-1, channels).astype(np.float64)
    np.testing.assert_allclose(fit.mean["image"], training.mean(0), rtol=1e-12)
    np.testing.assert_allclose(fit.std["image"], training.std(0), rtol=1e-12)
    got = fit.inputs(rows)
    assert got.shape == (40, channels, 6, 5)
    assert got.dtype == np.float32
    assert got.flags.c_contiguous
    expected = (images.transpose(0, 3, 1, 2) - training.mean(0)[:, None, None]) / training.std(0)[:, None, None]
    np.testing.assert_allclose(got, expected, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 50), st.integers(1, 4), st.floats(-1e6, 1e6), st.floats(1e-2, 1e3))
def test_moments_do_not_depend_on_blocks(rows, block, mean, std):
    values = mean + std * np.random.default_rng(rows).standard_normal((rows, 2))
    moments = preprocessing._Moments()
    for start in range(0, rows, block):
        moments.add(values[start : start + block])
    got_mean, got_std = moments.result()
    np.testing.assert_allclose(got_mean, values.mean(0), rtol=1e-9, atol=1e-9)
    if rows > 1 and std > 1e-6 * abs(mean):
        np.testing.assert_allclose(got_std, values.std(0), rtol=1e-5)


def test_blocks_of_a_source_add_up(monkeypatch):
    values = RNG.standard_normal((40, 3))
    _, whole, _ = fitted((values, LABELS))
    monkeypatch.setattr(preprocessing, "_BLOCK_BYTES", 100)
    _, pieces, _ = fitted((values, LABELS))
    np.testing.assert_allclose(whole.std["x"], pieces.std["x"], rtol=1e-12)


def test_sequences_are_standardised_by_their_first_dimension():
    values = RNG.standard_normal((40, 2, 7)) * [[[1.0], [50.0]]] + 3
    _, fit, rows = fitted((values, LABELS), np.arange(40))
    got = fit.inputs(rows)
    assert len(fit.mean["x"]) == 2
    np.testing.assert_allclose(got.mean((0, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(got.std((0, 2)), 1, atol=1e-5)


def test_ids_are_left_alone_and_several_arrays_are_keywords():
    _, fit, rows = fitted(({"ids": LABELS[:, None] + 7, "x": RNG.standard_normal((40, 2))}, LABELS))
    got = fit.inputs(rows)
    assert list(fit.mean) == ["x"]
    assert got["ids"].dtype == np.int64
    np.testing.assert_array_equal(got["ids"], LABELS[:, None] + 7)
    assert got["x"].dtype == np.float32


def test_constant_features_stay_finite():
    values = np.full((40, 2), [0.1, 0.0])
    _, fit, rows = fitted((values, LABELS))
    assert fit.std["x"] == (1.0, 1.0)
    np.testing.assert_allclose(fit.inputs(rows), 0, atol=1e-7)


def table():
    amount = np.arange(40.0)
    amount[[0, 6, 7]] = np.nan
    town = np.array(["b", "a", "", "c"] * 10)
    return {"size": np.arange(40.0) * 2, "amount": amount, "town": town, "target": LABELS}


def test_tables_with_gaps_and_categories():
    source, fit, rows = fitted(table())
    got = fit.inputs(rows)
    known = np.array([row for row in EVEN if row not in (0, 6)], float)
    np.testing.assert_allclose(fit.mean["amount"], known.mean())
    np.testing.assert_allclose(fit.std["amount"], known.std())
    assert fit.indicators == ("amount",)
    assert got["numbers"].shape == (40, 3)
    assert source.schema.number_width == 3
    assert got["numbers"][[0, 6, 7], 1].tolist() == [0, 0, 0]
    assert np.flatnonzero(got["numbers"][:, 2]).tolist() == [0, 6, 7]
    assert got["categories"][:4, 0].tolist() == [2, 1, 0, 3]
    assert got["categories"].dtype == np.int64


def test_tables_of_one_kind():
    data = table()
    numbers = fitted({name: data[name] for name in ("size", "target")})
    assert numbers[1].inputs(numbers[2]).shape == (40, 1)
    categories = fitted({name: data[name] for name in ("town", "target")})
    assert list(categories[1].inputs(categories[2])) == ["categories"]


def test_number_targets_there_and_back():
    targets = RNG.standard_normal(40) * 30 + 500
    _, fit, rows = fitted((np.ones((40, 2)), targets))
    got = fit.targets(rows)
    assert got.dtype == np.float32
    assert abs(got[EVEN].mean()) < 1e-5
    np.testing.assert_allclose(fit.restore(got[:, None]), targets, rtol=1e-5)
    assert fit.restore(got[:, None]).shape == (40,)


def test_class_targets_and_foreign_outputs_are_unchanged():
    _, fit, rows = fitted((np.ones((40, 2)), LABELS))
    assert fit.targets(rows).dtype == np.int64
    logits = RNG.standard_normal((40, 1))
    assert fit.restore(logits) is logits
    boxes = [object()]
    assert fitted((np.ones((40, 2)), LABELS / 2))[1].restore(boxes) is boxes


def test_no_target():
    _, fit, rows = fitted(np.ones((40, 2)))
    assert fit.targets(rows) is None


def test_json_there_and_back():
    _, fit, rows = fitted(table())
    again = from_json(Preprocessing, json.loads(json.dumps(to_json(fit))))
    assert again == fit
    np.testing.assert_array_equal(again.inputs(rows)["numbers"], fit.inputs(rows)["numbers"])


def test_a_tuple_of_inputs_stays_one():
    first, second = RNG.standard_normal((40, 2)), LABELS[:, None]
    _, fit, rows = fitted(((first, second), LABELS))
    got = fit.inputs(rows)
    assert isinstance(got, tuple)
    assert [part.dtype for part in got] == [np.float32, np.int64]
    np.testing.assert_array_equal(got[1], second)
    assert from_json(Preprocessing, to_json(fit)).positional
    _, fit, rows = fitted(((first, second), LABELS), np.arange(10), rows=20)
    assert isinstance(fit.inputs(rows), tuple)
    _, fit, rows = fitted(((first,), LABELS))
    assert fit.inputs(rows).shape == (40, 2)


def test_whole_numbers_are_standardised_where_nobody_looks_them_up():
    values = RNG.integers(0, 9, (40, 3)) + (1 << 40)
    source = open_source((values, LABELS))
    fit = fit_preprocessing(source, np.arange(40), ids=False)
    got = fit.inputs(source.read(np.arange(40)))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, (values - values.mean(0)) / values.std(0), atol=1e-3)


def test_large_offsets_keep_their_resolution():
    seconds = 1.7e9 + np.arange(40.0)
    _, fit, rows = fitted({"seconds": seconds, "other": np.ones(40), "target": LABELS}, np.arange(40))
    np.testing.assert_allclose(fit.inputs(rows)[:, 0], (seconds - seconds.mean()) / seconds.std(), atol=1e-5)
    assert fit.std["other"] == (1.0,)


def test_unscaled_pixels_lie_between_0_and_1_and_numbers_stay_as_they_are():
    pixels = RNG.integers(0, 256, (8, 4, 4, 3), dtype=np.uint8)
    source = open_source((pixels, np.arange(8) % 2))
    plain = unscaled(fit_preprocessing(source, np.arange(8)))
    name = source.schema.inputs[0].name
    np.testing.assert_allclose(plain.inputs(source.read(np.arange(8))), np.moveaxis(pixels, 3, 1) / 255, rtol=1e-6)
    assert plain.std[name] == (255.0,) * 3
    values, numbers = RNG.normal(5, 3, (8, 6)).astype(np.float32), RNG.normal(100, 9, 8).astype(np.float32)
    source = open_source((values, numbers))
    plain = unscaled(fit_preprocessing(source, np.arange(8)))
    np.testing.assert_array_equal(plain.inputs(source.read(np.arange(8))), values)
    np.testing.assert_array_equal(plain.targets(source.read(np.arange(8))), numbers)


def test_array_targets_stay_as_they_are():
    boxes = RNG.normal(50, 20, (40, 3, 5)).astype(np.float32)
    _, fit, rows = fitted((RNG.normal(size=(40, 4)), boxes))
    assert (fit.target_mean, fit.target_std) == (0.0, 1.0)
    np.testing.assert_array_equal(fit.targets(rows), boxes)
    assert fit.restore(boxes) is boxes
    assert from_json(Preprocessing, json.loads(json.dumps(to_json(fit))), "here") == fit
