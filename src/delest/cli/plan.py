"""`delest plan`."""

from __future__ import annotations

from typing import Any

from delest.cli import Answer, options

EXAMPLE = "delest plan examples/digits.py --memory 400MiB"
BUDGET: options.Group = {name: options.TRAINING[name] for name in ("memory", "device", "threads")}


@options.with_options(changes=options.JOB, budget=BUDGET)
def plan(
    job: options.JobArgument = None, *, quiet: options.QuietOption = False, changes: dict[str, Any], budget: dict[str, Any]
) -> Answer:
    """Show how a job would be trained within a budget.

    Nothing is written. What --json prints is a plan that train and run follow with --plan.
    """
    from delest import verbs
    from delest.reporting import text

    found = options.read_job(job, changes)
    plan = verbs.plan(found, say=verbs.progress(quiet=quiet), **options.read_training(budget))
    return Answer(plan, lambda: text.plan_text(plan))
