"""The results file that all benchmarks write."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SOURCE = Path(__file__).parents[1] / "benchmarks" / "results_file.py"


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module at work in a repository of its own with one commit of code."""
    spec = importlib.util.spec_from_file_location("results_file", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "HERE", tmp_path / "benchmarks")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "benchmarks" / "results")
    for folder in ("benchmarks", "src"):
        (tmp_path / folder).mkdir()
    (tmp_path / "src" / "code.py").write_text("1\n")
    git(tmp_path, "init", "-q")
    commit(tmp_path)
    return module


def git(folder: Path, *words: str) -> None:
    who = ("-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)


def commit(folder: Path) -> None:
    git(folder, "add", ".")
    git(folder, "commit", "-q", "--no-verify", "-m", "m")


ROW: dict[str, Any] = {"row": "a", "seconds": 1.5}


def test_a_file_says_what_machine_versions_and_commit_it_is_of(results: ModuleType) -> None:
    bounds = [results.bound_at_most("a, seconds", 1.5, 2.0), results.bound_at_most("b, seconds", 3.0, 2.0)]
    written = json.loads(results.write_results("name", [ROW], bounds).read_text())
    assert {"processor", "instruction_sets", "cores", "memory_bytes"} <= written["machine"].keys()
    assert {"python", "torch", "delest"} <= written["versions"].keys()
    assert written["rows"][0].items() >= ROW.items()
    assert written["rows"][0].keys() >= {"commit", "date"}
    assert written["bounds"][0] == {"name": "a, seconds", "value": 1.5, "bound": 2.0, "ok": True}
    assert [bound["ok"] for bound in written["bounds"]] == [True, False]


def test_rows_are_kept_until_code_changes(results: ModuleType) -> None:
    assert results.kept_rows("name") == []
    results.write_results("name", [ROW], [])
    (results.HERE.parent / "README").write_text("no code\n")
    commit(results.HERE.parent)
    (row,) = results.kept_rows("name")
    assert row["seconds"] == 1.5
    results.write_results("name", [row, {"row": "b"}], [])
    assert results.kept_rows("name")[0] == row  # an old row keeps the commit that it was measured at
    (results.HERE.parent / "src" / "code.py").write_text("2\n")
    assert results.kept_rows("name") == []


def test_rows_of_uncommitted_code_are_not_kept(results: ModuleType) -> None:
    (results.HERE.parent / "src" / "new.py").write_text("3\n")
    written = json.loads(results.write_results("name", [ROW], []).read_text())
    assert written["rows"][0]["commit"].endswith("+")
    assert results.kept_rows("name") == []


def test_rows_of_another_machine_are_not_kept(results: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    results.write_results("name", [ROW], [])
    monkeypatch.setattr(results, "describe_machine", lambda: {"processor": "another"})
    assert results.kept_rows("name") == []
