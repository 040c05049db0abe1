"""`delest run`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from delest.cli import Answer, options

if TYPE_CHECKING:
    from delest.records.run import Run

EXAMPLE = "delest run examples/digits.py --memory 1GiB --max-drop 0.5%"


@options.with_options(changes=options.JOB, training={**options.TRAINING, **options.MAX_DROP})
def run(
    job: options.JobArgument = None, *, quiet: options.QuietOption = False, changes: dict[str, Any], training: dict[str, Any]
) -> Answer:
    """Inspect, plan, train, shrink and report in one go.

    Ends with a folder that holds the trained model, what ships of it, and report.html.
    """
    from delest import verbs

    found = options.read_job(job, changes, training)
    done = verbs.run(found, say=verbs.progress(quiet=quiet), **options.read_training(training))
    return Answer(done, lambda: _whole_text(done))


def _whole_text(done: Run) -> str:
    """The run, what ships where it was shrunk, and where its page is."""
    from delest.records.form import read_json
    from delest.records.shrunk import Shrunk
    from delest.reporting import text

    shrunk = done.path / "shrunk" / "shrink.json"
    parts = [text.run_text(done), *([text.shrunk_text(read_json(Shrunk, shrunk))] if shrunk.exists() else [])]
    return "\n\n".join([*parts, f"report: {done.path / 'report.html'}"])
