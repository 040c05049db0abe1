"""Tests with Keras on the framework that KERAS_BACKEND names; `make test-keras` runs them on each, in an environment that has all."""

from __future__ import annotations

import os

if os.environ.get("DELEST_KERAS") == "1":
    import keras  # noqa: F401  # its absence, for which the tests are skipped elsewhere, is a failure here
