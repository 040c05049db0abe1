"""`delest doctor`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from delest import errors
from delest.cli import Answer, options

EXAMPLE = "delest doctor --json"
WISHES: options.Group = {
    "measure": options.option(bool, "--measure", "measure what this machine reaches, about 6 s the first time", undo=False),
    "deep": options.option(
        bool, "--deep", "prove by a tiny training step that torch, TensorFlow and JAX work on each device they see", undo=False
    ),
    "clear_cache": options.option(bool, "--clear-cache", "empty the cache, and say how much that frees", undo=False),
}


@options.with_options(wishes=WISHES)
def doctor(wishes: Mapping[str, Any]) -> Answer:
    """Check this machine, and say what to change.

    Ends with status 6 where something is missing without which delest cannot work.
    """
    from delest import verbs
    from delest.reporting import text

    diagnosis = verbs.doctor(**wishes)
    status = 0 if diagnosis.usable else errors.CheckFailed.exit_status
    return Answer(diagnosis, lambda: text.diagnosis_text(diagnosis), status)
