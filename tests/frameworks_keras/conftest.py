"""Tests with Keras on the framework that KERAS_BACKEND names; `make test-keras` runs them on each, in an environment that has all."""

from __future__ import annotations

import os

import pytest

if os.environ.get("DELEST_KERAS") == "1":
    import keras  # noqa: F401  # a skip would be a failure here
else:
    pytest.importorskip("keras", reason="`make test-keras` runs this test where Keras is installed")
