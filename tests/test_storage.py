from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from delest import errors, storage
from disks import small_disk


@dataclass(frozen=True)
class Note:
    text: str
    score: float
    path: Path


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Whole files


@pytest.mark.parametrize("data", ["größer\n", b"\x00\xff", "", b""])
def test_a_file_is_written_whole(tmp_path, data):
    path = tmp_path / "x"
    path.write_text("before")
    storage.write_atomic(path, data)
    assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert entries(tmp_path) == ["x"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_keeps_the_old_content(tmp_path, monkeypatch, call):
    path = tmp_path / "x"
    path.write_text("before")

    def fail(*arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="Input/output error"):
        storage.write_atomic(path, "after")
    assert path.read_text() == "before"
    assert entries(tmp_path) == ["x"]


def test_content_is_on_disk_before_the_name_and_the_name_before_it_returns(tmp_path, monkeypatch):
    events: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def noted(*arguments, name=name, real=real):
            events.append(name)
            return real(*arguments)

        monkeypatch.setattr(os, name, noted)
    storage.write_atomic(tmp_path / "x", "content")
    assert events == ["fsync", "replace", "fsync"]


LIMITED = """
import resource, sys
from pathlib import Path
from delest import errors, storage
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    {call}
except errors.DiskFull as error:
    print(error)
"""


def say_disk_full(folder: Path, call: str) -> str:
    """What a process says that may not write files of more than 100,000 bytes."""
    code = LIMITED.format(call=call)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_write_beyond_the_room_is_said_and_keeps_the_old_content(tmp_path):
    (tmp_path / "x").write_text("before")
    said = say_disk_full(tmp_path, "storage.write_atomic(Path('x'), b'0' * 200_000)")
    assert "no room on disk to write x (File too large). Free some space or choose another place with --out" in said
    assert (tmp_path / "x").read_text() == "before"
    assert entries(tmp_path) == ["x"]


def test_a_line_beyond_the_room_is_said_and_the_next_takes_its_place(tmp_path):
    path = tmp_path / "x.jsonl"
    storage.append_line(path, {"step": 1})
    assert "no room on disk" in say_disk_full(tmp_path, "storage.append_line(Path('x.jsonl'), {'text': '0' * 200_000})")
    assert storage.read_lines(path) == [{"step": 1}]
    storage.append_line(path, {"step": 2})
    assert storage.read_lines(path) == [{"step": 1}, {"step": 2}]


def test_a_full_disk_keeps_the_old_content(tmp_path):
    with small_disk(tmp_path / "disk", "64k"):
        path = tmp_path / "disk" / "x"
        storage.write_atomic(path, "before")
        assert 0 < storage.free_bytes(path.parent) < 65536
        with pytest.raises(errors.DiskFull, match="No space left on device"):
            storage.write_atomic(path, b"0" * 100_000)
        assert path.read_text() == "before"
        assert entries(path.parent) == ["x"]


@pytest.mark.parametrize("number", [28, 122, 27])  # ENOSPC, EDQUOT, EFBIG
def test_no_room_is_disk_full(number):
    with pytest.raises(errors.DiskFull, match="runs/a"), storage.room_reported(Path("runs/a")):
        raise OSError(number, os.strerror(number))


def test_other_faults_of_the_system_stay_what_they_are():
    with pytest.raises(PermissionError), storage.room_reported(Path("x")):
        raise PermissionError(13, "Permission denied")


# JSON


def strict(text: str) -> object:
    """JSON as every reader understands it: no NaN, no Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_record_and_a_mapping_are_written_alike(tmp_path):
    storage.write_json(tmp_path / "a", Note("x", math.nan, Path("a/b")))
    storage.write_json(tmp_path / "b", {"text": "x", "score": np.float32("inf"), "path": Path("a/b")})
    assert strict((tmp_path / "a").read_text()) == {"format": 1, "text": "x", "score": None, "path": "a/b"}
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()
    assert (tmp_path / "a").read_text().endswith("}\n")


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False)),
        max_size=4,
    )
)
def test_lines_read_back_as_they_were_appended(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    for row in rows:
        storage.append_line(path, row)
    finite = [{k: None if isinstance(v, float) and math.isinf(v) else v for k, v in row.items()} for row in rows]
    assert storage.read_lines(path) == finite


def test_lines_are_json_for_every_reader(tmp_path):
    storage.append_line(tmp_path / "x", {"loss": math.nan, "scores": np.array([1.5, np.inf])})
    assert strict((tmp_path / "x").read_text()) == {"loss": None, "scores": [1.5, None]}


def test_a_file_that_is_not_there_has_no_lines(tmp_path):
    assert storage.read_lines(tmp_path / "x.jsonl") == []


WHOLE = b'{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize(
    "half",
    [b"{", b'{"step": 3', b'{"step": 3}', b'{"a": "\xc3', b"\x00" * 50],
    ids=["brace", "cut", "whole", "letter", "zeros"],
)
def test_a_half_line_is_left_out_and_does_not_spoil_the_next(tmp_path, half):
    path = tmp_path / "x.jsonl"
    path.write_bytes(WHOLE + half)
    assert storage.read_lines(path) == [{"step": 1}, {"step": 2}]
    storage.append_line(path, {"step": 3})
    assert storage.read_lines(path) == [{"step": 1}, {"step": 2}, {"step": 3}]
    assert path.read_bytes() == WHOLE + b'{"step": 3}\n'


def test_a_file_of_half_a_line_begins_anew(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"ste')
    storage.append_line(path, {"step": 1})
    assert path.read_bytes() == b'{"step": 1}\n'


def test_what_follows_a_damaged_line_is_not_trusted(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st\xff\n{"step": 3}\n')
    assert storage.read_lines(path) == [{"step": 1}]


@pytest.mark.parametrize("sync", [False, True])
def test_a_line_is_synchronised_where_that_is_asked(tmp_path, monkeypatch, sync):
    sizes = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: sizes.append(os.fstat(descriptor).st_size))
    storage.append_line(tmp_path / "x", {"a": 1}, sync=sync)
    assert sizes == ([9] if sync else [])


# Checksums and places


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_checksums(tmp_path, size):
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    (tmp_path / "x").write_bytes(data)
    assert storage.checksum(tmp_path / "x") == hashlib.sha256(data).hexdigest()


def test_a_known_checksum(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert storage.checksum(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_free_bytes_of_a_folder_that_is_yet_to_be_made(tmp_path, monkeypatch):
    there = os.statvfs(tmp_path)
    assert storage.free_bytes(tmp_path / "a" / "b") == pytest.approx(there.f_bavail * there.f_frsize, rel=0.05)
    monkeypatch.chdir(tmp_path)
    assert storage.free_bytes(Path("a/b")) > 0


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({"DELEST_CACHE": "own", "XDG_CACHE_HOME": "xdg"}, "own"),
        ({"XDG_CACHE_HOME": "xdg"}, "xdg/delest"),
        ({"DELEST_CACHE": "", "XDG_CACHE_HOME": ""}, ".cache/delest"),
        ({}, ".cache/delest"),
    ],
)
def test_the_cache_folder_is_made_where_the_environment_says(tmp_path, monkeypatch, environment, place):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("DELEST_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value and str(tmp_path / value))
    folder = storage.cache_folder("packed", "images")
    assert folder == tmp_path / place / "packed" / "images"
    assert folder.is_dir()
    assert storage.cache_folder() == tmp_path / place


def test_clearing_the_cache_leaves_what_delest_did_not_make(tmp_path, monkeypatch):
    monkeypatch.setenv("DELEST_CACHE", str(tmp_path / "cache"))
    assert storage.clear_cache() == 0
    assert not (tmp_path / "cache").exists()
    (storage.cache_folder("packed", "images") / "a.bin").write_bytes(b"x" * 100)
    (storage.cache_folder("probes") / "b.json").write_text("{}")
    (tmp_path / "cache" / "photos").mkdir()
    (tmp_path / "cache" / "photos" / "mine.jpg").write_bytes(b"mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine.jpg").write_bytes(b"mine")
    (storage.cache_folder("packed") / "link").symlink_to(tmp_path / "elsewhere")
    assert storage.clear_cache() >= 102
    assert list(storage.cache_folder("packed").iterdir()) == list(storage.cache_folder("probes").iterdir()) == []
    assert (tmp_path / "cache" / "photos" / "mine.jpg").exists()
    assert (tmp_path / "elsewhere" / "mine.jpg").exists()


def test_a_cache_that_cannot_be_emptied_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("DELEST_CACHE", str(tmp_path))
    (storage.cache_folder("probes") / "a.json").write_text("{}")

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(errors.BadInput, match=r"cannot be used \(Permission denied: .*a.json\). Set DELEST_CACHE"):
        storage.clear_cache()


def test_every_folder_of_the_cache_is_one_that_is_cleared(tmp_path, monkeypatch):
    monkeypatch.setenv("DELEST_CACHE", str(tmp_path))
    with pytest.raises(AssertionError, match="clear_cache would leave it"):
        storage.cache_folder("unheard_of")
