"""Tests marked `own_process` run in a fresh process each: what they see of memory must not depend on the tests before them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_ALONE = "DELEST_TEST_ALONE"


def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if pyfuncitem.get_closest_marker("own_process") is None or os.environ.get(_ALONE):
        return None
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "--tb=short", pyfuncitem.nodeid]
    here = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | {_ALONE: "1"}
    done = subprocess.run(command, cwd=pyfuncitem.config.rootpath, env=here, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"in a process of its own:\n{done.stdout[-8000:]}{done.stderr[-4000:]}", pytrace=False)
    return True
