"""Batches: each row once an epoch, resumable at any sample, the same for any number of readers."""

import numpy as np
import pytest

from delest import errors
from delest.data import Feed, fit_preprocessing, open_source, raw_rows, synthetic
from delest.data.preprocessing import Preprocessing

INDEX = np.arange(3, 40)


def feed_of(source=None, **options):
    source = source or synthetic(6, 5, 3, classes=4, rows=40)
    return Feed(source, INDEX, fit_preprocessing(source, INDEX), **{"batch_size": 8, "seed": 5, **options})


def test_an_epoch_gives_each_row_once():
    batches = list(feed_of().epoch(2))
    assert [batch.count for batch in batches] == [8, 8, 8, 8, 5]
    assert feed_of().steps == 5
    assert len(feed_of()) == 37
    assert sorted(np.concatenate([batch.index for batch in batches]).tolist()) == INDEX.tolist()
    assert all(batch.epoch == 2 for batch in batches)
    source = synthetic(6, 5, 3, classes=4, rows=40)
    for batch in batches:
        np.testing.assert_array_equal(batch.targets, source.read(batch.index)["target"])
        assert batch.inputs.shape == (batch.count, 3, 6, 5)


def test_epochs_differ_and_repeat():
    def order(number, seed=5):
        return np.concatenate([batch.index for batch in feed_of(seed=seed).epoch(number)]).tolist()

    assert order(0) == order(0)
    assert len({tuple(order(0)), tuple(order(1)), tuple(order(0, seed=6))}) == 3


def test_an_epoch_goes_on_from_any_batch():
    whole = list(feed_of(augment=("flip", "crop", "erase")).epoch(1))
    rest = list(feed_of(augment=("flip", "crop", "erase")).epoch(1, start=16))
    assert len(rest) == len(whole) - 2
    for got, expected in zip(rest, whole[2:], strict=True):
        np.testing.assert_array_equal(got.index, expected.index)
        np.testing.assert_array_equal(got.inputs, expected.inputs)


def test_readers_share_a_batch():
    whole = list(feed_of().epoch(0))
    parts = [list(feed_of(rank=rank, world=3).epoch(0)) for rank in range(3)]
    for place, batch in enumerate(whole):
        together = np.concatenate([part[place].index for part in parts])
        assert sorted(together.tolist()) == sorted(batch.index.tolist())
    assert [feed_of(rank=rank, world=6).steps for rank in range(6)] == [4] * 6
    assert [len(list(feed_of(rank=rank, world=6).epoch(0))) for rank in range(6)] == [4] * 6
    ordered = [batch.index for rank in range(3) for batch in feed_of(rank=rank, world=3).ordered()]
    assert sorted(np.concatenate(ordered).tolist()) == INDEX.tolist()


def test_ordered_is_neither_shuffled_nor_augmented():
    plain = list(feed_of().ordered())
    augmented = list(feed_of(augment=("flip", "crop")).ordered())
    assert np.concatenate([batch.index for batch in plain]).tolist() == INDEX.tolist()
    for got, expected in zip(augmented, plain, strict=True):
        np.testing.assert_array_equal(got.inputs, expected.inputs)


def test_one_read_a_batch():
    source = synthetic(4, rows=40)
    reads = []
    whole = source.read
    source.read = lambda index: reads.append(len(index)) or whole(index)
    built = Feed(source, INDEX, fit_preprocessing(source, INDEX), batch_size=8)
    reads.clear()
    list(built.epoch(0))
    list(built.raw())
    assert reads == [8, 8, 8, 8, 5] * 2


def test_sources_that_decode_are_read_ahead_with_the_same_result():
    source = synthetic(6, 5, 3, classes=4, rows=40)
    source.decodes = True
    for got, expected in zip(feed_of(source).epoch(0), feed_of().epoch(0), strict=True):
        np.testing.assert_array_equal(got.inputs, expected.inputs)
    broken = feed_of(source).epoch(0)
    next(broken)
    broken.close()
    assert list(Feed(source, INDEX[:0], Preprocessing(schema=source.schema), batch_size=8).epoch(0)) == []


def test_faults_of_a_read_ahead_arrive():
    source = synthetic(4, rows=40)
    source.decodes = True
    built = feed_of(source)
    source.read = lambda index: (_ for _ in ()).throw(errors.BadInput("cut"))
    with pytest.raises(errors.BadInput, match="cut"):
        list(built.ordered())


def test_raw_images_and_arrays():
    source = synthetic(6, 5, 3, rows=40)
    raw = raw_rows(source, INDEX[:4])
    assert list(raw) == ["image"]
    assert (raw["image"].dtype, raw["image"].shape) == (np.uint8, (4, 6, 5, 3))
    assert list(raw_rows(synthetic(7, rows=40), INDEX[:4])) == ["x"]


def test_raw_tables():
    data = {
        "size": np.array([1.5, np.nan] * 20),
        "town": np.array(["b", ""] * 20),
        "userId": np.arange(40) % 3,
        "target": np.arange(40) % 2,
    }
    source = open_source(data, target="target")
    raw = raw_rows(source, np.array([0, 1]))
    np.testing.assert_array_equal(raw["size"], np.array([1.5, np.nan]))
    assert raw["size"].dtype == np.float64
    assert raw["town"].tolist() == ["b", ""]
    assert raw["userId"].tolist() == ["0", "1"]
    batches = list(feed_of(source).raw())
    assert batches[0].targets.tolist() == [1, 0] * 4
    assert set(batches[0].inputs) == {"size", "town", "userId"}


def test_unsuitable_augmentation():
    with pytest.raises(errors.BadInput, match="for images"):
        feed_of(synthetic(4, rows=40), augment=("flip",))


def test_feeds_need_no_random_state_of_numpy():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    list(feed_of(augment=("erase",)).epoch(0))
    np.testing.assert_array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize(
    ("rows", "sizes"), [(33, [16, 17]), (32, [16, 16]), (34, [16, 16, 2]), (1, [1]), (17, [17]), (16, [16])]
)
def test_a_single_row_that_is_left_joins_the_batch_before_it(rows, sizes):
    """Batch normalisation cannot train on one row; no row is lost, and resuming inside the epoch cuts alike."""
    source = synthetic(4, rows=64, classes=2)
    feed = Feed(source, np.arange(rows), fit_preprocessing(source, np.arange(64)), batch_size=16)
    whole = list(feed.epoch(0))
    assert [batch.count for batch in whole] == sizes
    assert feed.steps == len(sizes)
    assert [batch.count for batch in feed.epoch(0, sizes[0])] == sizes[1:]
