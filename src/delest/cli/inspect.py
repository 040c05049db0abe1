"""`delest inspect`."""

from __future__ import annotations

from typing import Any

from delest.cli import Answer, options

EXAMPLE = "delest inspect examples/digits.py"


@options.with_options(changes=options.JOB)
def inspect(job: options.JobArgument = None, *, changes: dict[str, Any]) -> Answer:
    """Show what is in the data and what is wrong with it."""
    from delest import verbs
    from delest.reporting import text

    summary = verbs.inspect(options.read_job(job, changes))
    return Answer(summary, lambda: text.summary_text(summary))
