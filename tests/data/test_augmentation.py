"""Augmentation: what each does to a batch, how often, and that it depends on nothing but seed, epoch and row."""

import numpy as np
import pytest

from delest import errors
from delest.data import open_source, synthetic
from delest.data.augmentation import Draws, augment_inputs, check_augmentations

INDEX = np.arange(2000)
IMAGE = synthetic(16, 16, 2, kind="image").schema
FEATURES = synthetic(6).schema
TABLE = open_source(
    {"a": np.arange(40.0), "gap": np.array([1.0, np.nan] * 20), "town": np.array(["x", "y"] * 20), "target": np.arange(40) % 2},
    target="target",
).schema


def images(rows=2000):
    return np.random.default_rng(0).standard_normal((rows, 2, 16, 16)).astype(np.float32)


def augmented(inputs, names, schema=IMAGE, index=INDEX, epoch=0, seed=0):
    return augment_inputs(inputs, names, schema, seed=seed, epoch=epoch, index=index)


def test_draws_are_uniform_normal_and_independent():
    draws = Draws.of(3, 1, INDEX)
    uniform = draws.uniform_grid(0, 50)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.005
    assert np.abs(np.corrcoef(uniform.T) - np.eye(50)).max() < 0.1
    normal = draws.normal_grid(7, 50)
    assert abs(normal.mean()) < 0.015
    assert abs(normal.std() - 1) < 0.01
    whole = draws.whole(0, -2, 2)
    assert set(whole.tolist()) == {-2, -1, 0, 1, 2}
    assert np.bincount(whole + 2).min() > 300


def test_draws_depend_on_seed_epoch_and_row():
    keys = [Draws.of(seed, epoch, INDEX).keys for seed in (0, 1, -1) for epoch in (0, 1)]
    assert len(np.unique(np.concatenate(keys))) == 6 * len(INDEX)


def test_flip_turns_half_of_the_rows():
    before = images()
    after = augmented(before.copy(), ("flip",))
    same = (after == before).all((1, 2, 3))
    turned = (after == before[..., ::-1]).all((1, 2, 3))
    assert (same ^ turned).all()
    assert 0.45 < turned.mean() < 0.55


def test_crop_shifts_by_at_most_an_eighth_and_reflects():
    before = images()
    after = augmented(before.copy(), ("crop",))
    padded = np.pad(before, ((0, 0), (0, 0), (2, 2), (2, 2)), mode="reflect")
    windows = np.stack([padded[:, :, dy : dy + 16, dx : dx + 16] for dy in range(5) for dx in range(5)], 1)
    matches = (after[:, None] == windows).all((2, 3, 4))
    assert (matches.sum(1) == 1).all()
    assert matches.sum(0).min() > 40  # each of the 25 shifts occurs


def test_erase_puts_one_rectangle_to_the_mean_in_half_of_the_rows():
    after = augmented(np.ones((2000, 2, 16, 16), np.float32), ("erase",))
    holes = after[:, 0] == 0
    assert (after[:, 0] == after[:, 1]).all()
    erased = holes.any((1, 2))
    assert 0.45 < erased.mean() < 0.55
    heights, widths = holes.any(2).sum(1), holes.any(1).sum(1)
    assert (holes.sum((1, 2)) == heights * widths).all()
    assert set(heights[erased].tolist()) == set(range(2, 9)) == set(widths[erased].tolist())


def test_images_do_not_depend_on_batching():
    names = ("flip", "crop", "erase")
    before = images(300)
    whole = augmented(before.copy(), names, index=INDEX[:300])
    order = np.random.default_rng(1).permutation(300)
    pieces = np.concatenate([augmented(before[part], names, index=part) for part in np.split(order, [7, 100, 201])])
    np.testing.assert_array_equal(pieces, whole[order])
    assert not np.array_equal(augmented(before.copy(), names, index=INDEX[:300], epoch=1), whole)
    np.testing.assert_array_equal(augmented(before.copy(), names[::-1], index=INDEX[:300]), whole)


def test_noise_and_dropout_of_features():
    after = augmented(np.ones((2000, 6), np.float32), ("noise",), FEATURES)
    assert abs(after.mean() - 1) < 0.01
    assert abs(after.std() - 0.1) < 0.005
    after = augmented(np.ones((2000, 6), np.float32), ("dropout",), FEATURES)
    assert 0.08 < (after == 0).mean() < 0.12
    assert set(np.unique(after)) == {0.0, 1.0}


def test_tables_leave_indicators_alone_and_drop_codes_to_unknown():
    inputs = {"numbers": np.ones((2000, 3), np.float32), "categories": np.full((2000, 1), 2)}
    after = augmented(inputs, ("noise", "dropout"), TABLE)
    assert (after["numbers"][:, 2] == 1).all()
    assert 0.08 < (after["numbers"][:, :2] == 0).mean() < 0.12
    assert after["numbers"][:, 0].std() > 0.05
    assert 0.08 < (after["categories"] == 0).mean() < 0.12
    assert (after["numbers"].dtype, after["categories"].dtype) == (np.float32, np.int64)


def test_nothing_asked_for_changes_nothing():
    before = images(3)
    assert augmented(before, (), index=INDEX[:3]) is before


@pytest.mark.parametrize(
    ("names", "schema", "text"),
    [
        (("flpi",), IMAGE, "Did you mean 'flip'"),
        (("flip",), TABLE, "is for images"),
        (("noise",), IMAGE, "is for tables"),
        (("crop", "erase"), FEATURES, "2 faults"),
        (
            ("noise",),
            open_source({"town": np.array(["x", "y"] * 20), "target": np.arange(40) % 2}, target="target").schema,
            "no",
        ),
    ],
)
def test_unsuitable(names, schema, text):
    with pytest.raises(errors.BadInput, match=text):
        check_augmentations(names, schema)


def test_suitable():
    check_augmentations(("flip", "crop", "erase"), IMAGE)
    check_augmentations(("noise", "dropout"), TABLE)
    check_augmentations(("noise", "dropout"), FEATURES)
