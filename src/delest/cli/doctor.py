"""`delest doctor`."""

from __future__ import annotations

from delest import errors
from delest.cli import Answer, options

EXAMPLE = "delest doctor --json"


@options.with_options()
def doctor() -> Answer:
    """Check this machine, and say what to change.

    Ends with status 6 where something is missing without which delest cannot work.
    """
    from delest import verbs
    from delest.reporting import text

    diagnosis = verbs.doctor()
    status = 0 if diagnosis.usable else errors.CheckFailed.exit_status
    return Answer(diagnosis, lambda: text.diagnosis_text(diagnosis), status)
