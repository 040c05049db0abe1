"""`delest shrink`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from delest.cli import Answer, options

EXAMPLE = "delest shrink runs/digits-001 --max-drop 0.5% --time 5min"


@options.with_options(
    settings={**options.MAX_DROP, **options.THREADS}, wishes=options.SMALLER, learning=options.LEARNING, given=options.GIVEN
)
def shrink(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="folder of a finished run; with --weights a JOB", show_default=False)
    ],
    *,
    quiet: options.QuietOption = False,
    settings: dict[str, Any],
    wishes: dict[str, Any],
    learning: dict[str, Any],
    given: dict[str, Any],
) -> Answer:
    """Make a trained model smaller and faster, with proof.

    Narrower networks are cut from it and learn from it, and are quantised. Only what keeps within --max-drop and gains as measured on this machine
    ships. Called again, it goes on where it was interrupted. What was trained elsewhere comes as a job with --weights."""
    from delest import verbs
    from delest.reporting import text

    shrunk = verbs.shrink(
        run, say=verbs.progress(quiet=quiet), **options.read_training(settings), **wishes, **learning, **given
    )
    return Answer(shrunk, lambda: text.shrunk_text(shrunk))
