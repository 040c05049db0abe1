"""`delest shrink`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from delest.cli import Answer, options

EXAMPLE = "delest shrink runs/digits-001 --max-drop 0.5% --time 5min"


@options.with_options(settings={**options.MAX_DROP, **options.THREADS}, wishes=options.SMALLER)
def shrink(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="folder of a finished run", show_default=False)],
    *,
    quiet: options.QuietOption = False,
    settings: dict[str, Any],
    wishes: dict[str, Any],
) -> Answer:
    """Make a trained model smaller and faster, with proof.

    Narrower networks are cut from it and learn from it, and are quantised. Only what keeps within --max-drop and gains as measured on this machine
    ships. Called again, it goes on where it was interrupted."""
    from delest import verbs
    from delest.reporting import text

    shrunk = verbs.shrink(run, say=verbs.progress(quiet=quiet), **options.read_training(settings), **wishes)
    return Answer(shrunk, lambda: text.shrunk_text(shrunk))
