"""`delest report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from delest.cli import Answer, options

EXAMPLE = "delest report runs/digits-001"


@options.with_options()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="folder of a run", show_default=False)]) -> Answer:
    """Write a run's page, which opens without a network."""
    from delest import verbs

    path = verbs.report(run)
    return Answer({"path": path}, lambda: f"report: {path}")
