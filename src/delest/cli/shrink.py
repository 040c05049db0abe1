"""`delest shrink`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from delest.cli import Answer, options

EXAMPLE = "delest shrink runs/digits-001 --max-drop 0.5%"


@options.with_options(settings={**options.MAX_DROP, **options.THREADS})
def shrink(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="folder of a finished run", show_default=False)],
    *,
    quiet: options.QuietOption = False,
    settings: dict[str, Any],
) -> Answer:
    """Make a trained model smaller and faster, with proof.

    Only what keeps within --max-drop and gains as measured on this machine ships."""
    from delest import verbs
    from delest.reporting import text

    shrunk = verbs.shrink(run, say=verbs.progress(quiet=quiet), **options.read_training(settings))
    return Answer(shrunk, lambda: text.shrunk_text(shrunk))
