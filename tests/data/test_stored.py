"""Columns at rest: gathering from files, joining, subsets."""

import os

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from delest import errors, storage
from delest.data import fingerprints, open_source, packing
from delest.data.stored import Joined, Memory, PackedFile, Subset, Viewed, blocks

VALUES = np.arange(60, dtype=np.float32).reshape(20, 3)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "values"
    path.write_bytes(b"head" + VALUES.tobytes())
    return PackedFile(path, (3,), np.float32, 20, offset=4)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 19), max_size=40))
def test_rows_of_a_file_in_any_order(packed, index):
    np.testing.assert_array_equal(packed.take(np.array(index, np.int64)), VALUES[np.array(index, np.int64)])


def test_neighbours_are_one_system_call(packed, monkeypatch):
    calls = []
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *arguments: calls.append(1) or real(*arguments))
    packed.take(np.arange(20))
    assert len(calls) == 1
    packed.take(np.array([3, 4, 5, 9, 8]))
    assert len(calls) == 4


def test_a_file_that_was_cut(tmp_path):
    (tmp_path / "values").write_bytes(VALUES.tobytes())
    packed = PackedFile(tmp_path / "values", (3,), np.float32, 20)
    os.truncate(tmp_path / "values", 100)
    with pytest.raises(OSError, match="was cut after it was opened"):
        packed.take(np.arange(20))


def test_descriptors_are_given_back(tmp_path):
    (tmp_path / "values").write_bytes(VALUES.tobytes())
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        PackedFile(tmp_path / "values", (3,), np.float32, 20).take(np.arange(3))
    assert len(os.listdir("/proc/self/fd")) == before


def test_joined_stores():
    joined = Joined([Memory(VALUES[:7]), Memory(VALUES[7:9]), Memory(VALUES[9:])])
    index = np.array([19, 0, 7, 8, 9, 7, 6])
    np.testing.assert_array_equal(joined.take(index), VALUES[index])
    assert len(joined) == 20


def test_views_and_blocks():
    view = Viewed(Memory(VALUES), lambda rows: (rows[:, :2] * 2).astype(np.int64))
    assert (view.shape, view.dtype) == ((2,), np.int64)
    pieces = list(blocks(view, block_bytes=50))
    assert [start for start, _ in pieces] == [0, 3, 6, 9, 12, 15, 18]
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in pieces]), VALUES[:, :2] * 2)


def test_a_subset_renumbers(tmp_path):
    np.savez(tmp_path / "d.npz", x_train=VALUES[:12], y_train=np.arange(12) % 2, x_test=VALUES[12:], y_test=np.arange(8) % 2)
    source = open_source(tmp_path / "d.npz")
    subset = Subset(source, np.array([2, 15]))
    assert len(subset) == 2
    assert subset.roles().tolist() == ["train", "test"]
    np.testing.assert_array_equal(subset.read(np.array([1, 0]))["x"], VALUES[[15, 2]])
    assert subset.values("y").tolist() == [0, 1]
    assert subset.description.startswith("2 of 20 rows")


def test_writing_is_whole_or_not_at_all(tmp_path):
    with storage.written_atomically(tmp_path / "whole") as file:
        file.write(b"abc")
        assert not (tmp_path / "whole").exists()
    assert (tmp_path / "whole").read_bytes() == b"abc"
    with pytest.raises(errors.DiskFull):
        write_until_full(tmp_path / "half")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def write_until_full(path):
    with storage.written_atomically(path) as file:
        file.write(b"abc")
        raise OSError(28, "No space left on device")


def test_room_for_a_pack(monkeypatch, tmp_path):
    assert packing.has_room(1000)
    assert not packing.has_room(packing.LARGEST_PACK_BYTES + 1)
    monkeypatch.setattr(storage, "free_bytes", lambda _: 3999)
    assert not packing.has_room(1000)
    monkeypatch.setenv("DELEST_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").write_text("in the way")
    assert not packing.has_room(1)


def test_fingerprints_follow_content(tmp_path):
    assert fingerprints.of_arrays({"a": VALUES}) == fingerprints.of_arrays({"a": VALUES.copy()})
    others = [{"b": VALUES}, {"a": VALUES[::-1]}, {"a": VALUES.astype(np.float64)}, {"a": VALUES.reshape(10, 6)}]
    assert len({fingerprints.of_arrays(other) for other in others} | {fingerprints.of_arrays({"a": VALUES})}) == 5
    (tmp_path / "a").write_text("1")
    first = fingerprints.of_files([tmp_path / "a"], tmp_path)
    os.utime(tmp_path / "a", (0, 0))
    assert fingerprints.of_files([tmp_path / "a"], tmp_path) == first
    (tmp_path / "a").write_text("2")
    assert fingerprints.of_files([tmp_path / "a"], tmp_path) != first
