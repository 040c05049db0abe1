"""The run folder of a training in somebody else's loop."""

from __future__ import annotations

from pathlib import Path

import pytest

from delest import runs, verbs
from delest.frameworks import record
from delest.records.plan import Plan


def test_a_run_ends_where_no_memory_is_left_for_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    def fails(*args: object, **kwargs: object) -> Path:
        raise MemoryError

    job = {"name": "own", "loop": "a loop", "optimizer": "sgd", "origin": None}
    kept = record.Record(tmp_path / "run", job, Plan(batch_size=8, micro_batch=8), 1, {})
    with monkeypatch.context() as patched:
        patched.setattr(record, "write_report", fails)
        run = kept.finish(8, 8, 10, None)
    assert run.status == runs.read(tmp_path / "run").status == "done"
    assert f"delest report {tmp_path / 'run'}" in capsys.readouterr().err
    assert verbs.report(tmp_path / "run").stat().st_size > 10_000
