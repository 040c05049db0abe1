"""The public functions, one a command. The only room that wires the others together; they are imported inside."""

from __future__ import annotations

from typing import TYPE_CHECKING

from delest.verbs.comparing import compare
from delest.verbs.devices import read_prices
from delest.verbs.everything import run
from delest.verbs.look import doctor, inspect
from delest.verbs.memory import estimate, measure, measure_script, read_budget, sweep
from delest.verbs.own_loop import apply
from delest.verbs.planning import explain, plan
from delest.verbs.ship import load, predict, report, shrink
from delest.verbs.starting import environment_for, execute
from delest.verbs.training import train
from delest.verbs.verification import verify

if TYPE_CHECKING:
    from delest.training.progress import Progress

__all__ = [
    "apply",
    "compare",
    "doctor",
    "environment_for",
    "estimate",
    "execute",
    "explain",
    "inspect",
    "load",
    "measure",
    "measure_script",
    "plan",
    "predict",
    "progress",
    "read_budget",
    "read_prices",
    "report",
    "run",
    "shrink",
    "sweep",
    "train",
    "verify",
]


def progress(*, quiet: bool = False) -> Progress:
    """What shows progress on standard error: live in a terminal, plain lines elsewhere, nothing if `quiet`."""
    from delest.training.progress import for_terminal

    return for_terminal(quiet=quiet)
