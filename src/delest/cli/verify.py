"""`delest verify`."""

from __future__ import annotations

from typing import Any

from delest import errors
from delest.cli import Answer, options

EXAMPLE = "delest verify examples/digits.py --memory 400MiB"
PLANNED: options.Group = {name: options.TRAINING[name] for name in ("plan", "memory", "device", "threads")}


@options.with_options(changes=options.JOB, planned=PLANNED)
def verify(
    job: options.JobArgument = None, *, quiet: options.QuietOption = False, changes: dict[str, Any], planned: dict[str, Any]
) -> Answer:
    """Check here that a plan keeps what it states.

    Each of its methods is compared with the plain step over 20 steps, and a short run is killed and resumed.
    Ends with status 6 where a check fails.
    """
    from delest import verbs
    from delest.reporting import verification

    found = options.read_job(job, changes)
    verified = verbs.verify(found, say=verbs.progress(quiet=quiet), **options.read_training(planned))
    status = 0 if verified.ok else errors.CheckFailed.exit_status
    return Answer(verified, lambda: verification.verification_text(verified), status)
