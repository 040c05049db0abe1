"""Tests beside other people's training loops, in an environment that has them."""

from __future__ import annotations

import importlib.util
import os

import pytest

COMMAND = "make .venv-bench/.ready && .venv-bench/bin/python -m pytest tests/hooks"


@pytest.fixture
def installed(request: pytest.FixtureRequest) -> str:
    """The package that the test is parametrised with; without it the test is skipped, or with DELEST_HOOKS=1 fails."""
    package = str(request.param)
    if importlib.util.find_spec(package) is None:
        message = f"{package} is not installed; `{COMMAND}` runs this test where it is"
        if os.environ.get("DELEST_HOOKS") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return package
