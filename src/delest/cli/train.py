"""`delest train`."""

from __future__ import annotations

from typing import Any

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

    found = options.read_job(job, changes, training)
    run = verbs.train(found, say=verbs.progress(quiet=quiet), **options.read_training(training))
    return Answer(run, lambda: text.run_text(run))
