"""Data: sources of rows, their statistics and preprocessing, the feed of batches. NumPy, polars, pyarrow and Pillow only."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "open_job": "opening",
    "open_source": "opening",
    "split": "splitting",
    "sample": "splitting",
    "Preprocessing": "preprocessing",
    "fit_preprocessing": "preprocessing",
    "unscaled": "preprocessing",
    "summarise": "statistics",
    "Feed": "feed",
    "raw_rows": "feed",
    "synthetic": "generated",
}
__all__ = [
    "Feed",
    "Preprocessing",
    "fit_preprocessing",
    "open_job",
    "open_source",
    "raw_rows",
    "sample",
    "split",
    "summarise",
    "synthetic",
    "unscaled",
]

if TYPE_CHECKING:
    from delest.data.feed import Feed, raw_rows
    from delest.data.generated import synthetic
    from delest.data.opening import open_job, open_source
    from delest.data.preprocessing import Preprocessing, fit_preprocessing, unscaled
    from delest.data.splitting import sample, split
    from delest.data.statistics import summarise


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"delest.data.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'delest.data' has no attribute {name!r}")
