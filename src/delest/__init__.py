"""delest: train deep-learning models in less memory and less time, make them smaller, and prove each saving."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    **dict.fromkeys(
        (
            "run",
            "inspect",
            "estimate",
            "measure",
            "plan",
            "apply",
            "compare",
            "verify",
            "train",
            "shrink",
            "load",
            "report",
            "predict",
            "doctor",
            "sweep",
        ),
        "delest.verbs",
    ),
    **dict.fromkeys(("Job", "Recipe", "Split"), "delest.job"),
    **dict.fromkeys(("BadInput", "NothingFits"), "delest.errors"),
    "synthetic": "delest.data",
}
__all__ = sorted(_HOMES)

if TYPE_CHECKING:
    from delest.data import synthetic as synthetic
    from delest.errors import BadInput as BadInput, NothingFits as NothingFits
    from delest.job import Job as Job, Recipe as Recipe, Split as Split
    from delest.verbs import (
        apply as apply,
        compare as compare,
        doctor as doctor,
        estimate as estimate,
        inspect as inspect,
        load as load,
        measure as measure,
        plan as plan,
        predict as predict,
        report as report,
        run as run,
        shrink as shrink,
        sweep as sweep,
        train as train,
        verify as verify,
    )


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'delest' has no attribute {name!r}")
