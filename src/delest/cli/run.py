"""`delest run`."""

from __future__ import annotations

from typing import Any

from delest.cli import Answer, options

EXAMPLE = "delest run examples/digits.py --memory 1GiB --max-drop 0.5%"


@options.with_options(changes=options.JOB, training={**options.TRAINING, **options.MAX_DROP})
def run(
    job: options.JobArgument = None, *, quiet: options.QuietOption = False, changes: dict[str, Any], training: dict[str, Any]
) -> Answer:
    """Inspect, plan, train, shrink and report in one go.

    Ends with a folder that holds the trained model, what ships of it, and report.html."""
    from delest import verbs
    from delest.reporting import text

    found = options.read_job(job, changes, training)
    done = verbs.run(found, say=verbs.progress(quiet=quiet), **options.read_training(training))
    return Answer(done, lambda: f"{text.run_text(done)}\n\nreport: {done.path / 'report.html'}")
