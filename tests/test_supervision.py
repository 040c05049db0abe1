"""Why a signal ended a run: memory, or somebody."""

from __future__ import annotations

import signal

import pytest

from delest.supervision import NEAR_BYTES, oom_kills, was_memory

BUDGET = 500 << 20


@pytest.mark.parametrize(
    ("number", "peak", "counted", "memory"),
    [
        (signal.SIGKILL, BUDGET // 2, False, False),  # by hand
        (signal.SIGKILL, BUDGET - NEAR_BYTES - (8 << 20), False, False),  # where the guard keeps a tight run
        (signal.SIGKILL, BUDGET - NEAR_BYTES + 1, False, True),
        (signal.SIGKILL, BUDGET // 2, True, True),  # the system counted a kill for memory
        (signal.SIGSEGV, BUDGET // 2, False, True),  # libraries that got no memory
        (signal.SIGABRT, BUDGET // 2, False, True),
    ],
)
def test_what_tells_memory_from_somebody(number, peak, counted, memory):
    assert was_memory(number, peak, BUDGET, counted) is memory


def test_the_systems_count_is_read(tmp_path):
    (tmp_path / "proc").mkdir()
    assert oom_kills(tmp_path) == 0
    (tmp_path / "proc/vmstat").write_text("pgfault 12\noom_kill 3\nnr_dirty 1\n")
    assert oom_kills(tmp_path) == 3
