"""Lightning's and transformers' scripts under a limit that is set from outside: they die alone, and finish with delest's callback."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import hooks

    yield hooks
    for name in ("hooks", "results_file"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("installed", ["lightning", "transformers"], indirect=True)
def test_a_script_that_dies_finishes_with_the_callback(installed: str, hooks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "REPEATS", 1)
    row = hooks.under_limit(installed)
    assert (row["whole"]["status"], row["small"]["status"]) == (0, 0), row
    assert (row["died_alone"], row["finished"]) == (1, 1), row
    assert "can't allocate memory" in row["alone"][0]["last"]
    assert row["least_splits"] >= 1, row
    assert row["loss_away"] < 0.1  # dropout draws other numbers for parts
