"""`delest plan`."""

from __future__ import annotations

import sys
from typing import Any

from delest import errors
from delest.cli import Answer, options
from delest.records.form import from_json
from delest.records.plan import Plan

EXAMPLE = "delest plan examples/digits.py --memory 400MiB"
BUDGET: options.Group = {
    **{name: options.TRAINING[name] for name in ("memory", "device", "threads")},
    "exact": options.option(bool, "--exact", "only what keeps the results, bit for bit or to rounding", undo=False),
}
ABOUT: options.Group = {"explain": options.option(str, "--explain", "say all about one method, chosen or not", "METHOD")}


@options.with_options(changes=options.JOB, budget=BUDGET, about=ABOUT)
def plan(
    job: options.JobArgument = None,
    *,
    quiet: options.QuietOption = False,
    changes: dict[str, Any],
    budget: dict[str, Any],
    about: dict[str, Any],
) -> Answer:
    """Show how a job would be trained within a budget.

    Nothing is written. What --json prints is a plan that train and run follow with --plan.
    """
    from delest import verbs
    from delest.reporting import text

    method = about.get("explain")
    explained = None if method is None else verbs.explain(method)
    found = options.read_job(job, changes)

    def show(plan: Plan) -> str:
        return text.plan_text(plan) if method is None else text.explained_text(plan, method, explained or "")

    try:
        plan = verbs.plan(found, say=verbs.progress(quiet=quiet), **options.read_training(budget))
    except errors.NothingFits as error:
        if error.plan is not None and not quiet:
            print(f"with the smallest budget that works:\n\n{show(from_json(Plan, error.plan))}\n", file=sys.stderr)
        raise
    return Answer(plan, lambda: show(plan))
