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
    **{name: options.TRAINING[name] for name in ("memory", "exact", "device", "threads")},
    "probe": options.option(
        bool, "--probe", "make real steps with the few best, and take the fastest that keeps the budget", undo=False
    ),
}
ELSEWHERE: options.Group = {
    "devices": options.option(
        str, "--devices", "compare devices of the catalogue, as t4,l4,a100,h100, that need not be here", "NAMES"
    ),
    "prices": options.option(str, "--price", "what an hour of each costs, as t4=0.35,l4=0.7", "PRICES"),
    "time": options.option(str, "--time", "with --devices: what the whole run may take, as 10h", "TIME"),
}
ABOUT: options.Group = {"explain": options.option(str, "--explain", "say all about one method, chosen or not", "METHOD")}


@options.with_options(changes=options.JOB, budget=BUDGET, elsewhere=ELSEWHERE, about=ABOUT)
def plan(
    job: options.JobArgument = None,
    *,
    quiet: options.QuietOption = False,
    changes: dict[str, Any],
    budget: dict[str, Any],
    elsewhere: dict[str, Any],
    about: dict[str, Any],
) -> Answer:
    """Show how a job would be trained within a budget.

    Nothing is written. What --json prints is a plan that train and run follow with --plan. With --devices: which machine to take, with
    time and cost of the whole run; the exit status is 3 where none will do.
    """
    from delest import verbs
    from delest.reporting import text

    if elsewhere:
        return _compare(job, changes, {**options.read_training(budget), **elsewhere}, about, quiet)
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


def _compare(job: str | None, changes: dict[str, Any], wishes: dict[str, Any], about: dict[str, Any], quiet: bool) -> Answer:
    """The devices side by side."""
    from delest import verbs
    from delest.reporting.devices import devices_text

    if about:
        raise errors.BadInput("--explain is of a plan for this machine: leave it out where devices are compared.")
    if "prices" in wishes:
        wishes["prices"] = verbs.read_prices(wishes["prices"])
    found = verbs.plan(options.read_job(job, changes), say=verbs.progress(quiet=quiet), **wishes)
    return Answer(found, lambda: devices_text(found), 0 if found.best is not None else errors.NothingFits.exit_status)
