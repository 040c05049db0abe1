"""The summary against NumPy, its notes, and the score to beat."""

import numpy as np
import pytest

from delest.data import open_source, split, summarise, synthetic
from delest.job import Split


def test_a_table():
    data = {
        "size": np.arange(100.0),
        "gap": np.where(np.arange(100) % 3 == 0, np.nan, 2.0),
        "town": np.array(["a"] * 100),
        "target": np.array(["p"] * 95 + ["q"] * 5),
    }
    source = open_source(data, target="target")
    splits = split(source, Split(), 0)
    summary = summarise(source, splits)
    assert (summary.kind, summary.rows, summary.target) == ("table", 100, "target")
    assert summary.classes == {"p": 95, "q": 5}
    assert summary.splits == {"train": 70, "validation": 10, "selection": 10, "test": 10}
    size = summary.columns[0]
    assert (size["mean"], size["low"], size["high"]) == (49.5, 0, 99)
    assert size["std"] == pytest.approx(np.arange(100).std())
    assert summary.columns[1]["mean"] == 2
    assert summary.row_bytes == 4 * 3 + 8
    notes = "\n".join(summary.notes)
    for text in (
        "unbalanced: 95 rows of 'p', 5 of 'q'",
        "'gap' has no value in 34%",
        "'gap' is constant",
        "'town' is constant",
    ):
        assert text in notes
    test = source.values("target")[splits["test"]]
    assert summary.baseline == {"accuracy": pytest.approx((test == 0).mean())}


def test_images_with_duplicates():
    images = np.random.default_rng(0).integers(0, 256, (40, 4, 4), dtype=np.uint8)
    images[30:] = images[:10]
    source = open_source((images, np.arange(40) % 2))
    summary = summarise(source, {"train": np.arange(28), "test": np.arange(28, 40)})
    assert summary.kind == "images"
    assert summary.row_bytes == 64
    assert any("10 rows of test are also in train" in note for note in summary.notes)
    assert not summarise(source, {"train": np.arange(20), "test": np.arange(20, 30)}).notes


def test_numbers_have_the_mean_to_beat():
    source = open_source((np.random.default_rng(0).standard_normal((40, 3)), np.arange(40.0)))
    summary = summarise(source, {"train": np.arange(20), "test": np.arange(20, 40)})
    expected = np.sqrt(((np.arange(20.0, 40) - 9.5) ** 2).mean())
    assert summary.baseline == {"rmse": pytest.approx(expected)}
    assert summary.classes is None


def test_no_target():
    source = open_source(np.ones((4, 2), np.int64))
    summary = summarise(source, {"train": np.arange(4)})
    assert summary.target is None
    assert summary.baseline == {}
    assert summary.row_bytes == 16


def test_large_sources_are_sampled():
    summary = summarise(synthetic(28, 28, 1, rows=1_000_000), {"train": np.arange(10)})
    assert 100 < summary.columns[0]["mean"] < 156
    assert sum(summary.classes.values()) == 1_000_000


@pytest.mark.parametrize(
    ("kind", "how"), [("time", "test is the latest"), ("group", "rows of each of its 20 values stay together")]
)
def test_what_the_column_to_split_by_was_taken_for(kind, how):
    data = {"x": np.ones((100, 2)), "part": np.arange(100) // 5, "target": np.arange(100) % 2}
    source = open_source(data, target="target", split_by="part")
    summary = summarise(source, split(source, Split(by="part", kind=kind), 0))
    assert f"split by {kind} of 'part': {how}" in summary.notes
