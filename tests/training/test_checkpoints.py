"""Checkpoints: whole or not there, checked before they are believed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from delest import errors, storage
from delest.records.batch import State
from delest.training import checkpoints


def save(folder, step, value=None):
    best = folder.parent / "best.safetensors"
    storage.write_atomic(best, b"best of %d" % step)
    state = State(
        {"model.w": np.full(100, step if value is None else value, np.float32), "step": np.array(3.0)}, {"numbers": {}}
    )
    return checkpoints.save(folder, step, state, {"step": step}, best)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


def test_the_newest_comes_back_and_two_are_kept(folder):
    for step in (5, 10, 15):
        save(folder, step)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000010", "step-00000015"]
    state, position, path = checkpoints.newest(folder)
    assert position == {"step": 15}
    assert (state.arrays["model.w"] == 15).all()
    assert (path / "best.safetensors").read_bytes() == b"best of 15"


def test_the_same_step_again_replaces(folder):
    save(folder, 5, 1.0)
    save(folder, 5, 2.0)
    state, _, _ = checkpoints.newest(folder)
    assert (state.arrays["model.w"] == 2.0).all()
    assert [path.name for path in folder.iterdir()] == ["step-00000005"]


def corrupt(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 0xFF
    path.write_bytes(bytes(data))


DAMAGES = {
    "corrupted": (lambda path: corrupt(path / "state.safetensors"), "state.safetensors does not match its checksum"),
    "truncated": (
        lambda path: (path / "state.safetensors").write_bytes((path / "state.safetensors").read_bytes()[:50]),
        "state.safetensors has 50 bytes",
    ),
    "missing": (lambda path: (path / "state.safetensors").unlink(), "state.safetensors is missing"),
    "unmarked": (lambda path: (path / "complete.json").unlink(), "completion mark is missing"),
    "mark damaged": (lambda path: (path / "complete.json").write_text("{"), "completion mark cannot be read"),
    "json": (lambda path: (path / "state.json").write_text("{}"), "state.json has 2 bytes"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_one_is_named_and_skipped(folder, name):
    damage, words = DAMAGES[name]
    save(folder, 5)
    damage(save(folder, 10))
    notes = []
    _, position, _ = checkpoints.newest(folder, notes.append)
    assert position == {"step": 5}
    assert len(notes) == 1
    assert "step-00000010" in notes[0]
    assert words in notes[0]


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(folder):
    save(folder, 5)
    (folder / "step-00000005").rename(folder / ".step-00000005.old")
    assert checkpoints.newest(folder)[1] == {"step": 5}


def test_unfinished_writing_is_not_seen(folder):
    save(folder, 5)
    (folder / ".step-00000010.tmp").mkdir()
    (folder / ".step-00000010.tmp" / "state.json").write_text(json.dumps({"position": {"step": 10}}))
    assert checkpoints.newest(folder)[1] == {"step": 5}


def test_nothing_intact_gives_none(folder):
    assert checkpoints.newest(folder) is None


def test_too_little_room_is_said_before_training(tmp_path):
    with pytest.raises(errors.DiskFull, match=r"needs about .* MiB on disk for its checkpoints"):
        checkpoints.check_room(tmp_path, 1 << 50, 1 << 50)
