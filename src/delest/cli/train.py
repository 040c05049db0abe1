"""`delest train`."""

from __future__ import annotations

from typing import Any

from delest import errors
from delest.cli import Answer, options

EXAMPLE = "delest train examples/digits.py --memory 1GiB --time 5min"


@options.with_options(changes=options.JOB, training=options.TRAINING)
def train(
    job: options.JobArgument = None, *, quiet: options.QuietOption = False, changes: dict[str, Any], training: dict[str, Any]
) -> Answer:
    """Train within a budget of memory and time.

    It can be stopped at any moment. With --resume and --out FOLDER the run there goes on, and JOB may be left out.
    """
    from delest import verbs
    from delest.reporting import text

    found = None
    if job is None and training.get("resume") and "out" in training:
        if changes:
            names = ", ".join("--" + name.rpartition(".")[2].replace("_", "-") for name in changes)
            raise errors.BadInput(f"{names}: a run goes on with the settings it began with. Leave them out, or name JOB.")
    else:
        found = options.read_job(job, changes)
    run = verbs.train(found, say=verbs.progress(quiet=quiet), **options.read_training(training))
    return Answer(run, lambda: text.run_text(run))
