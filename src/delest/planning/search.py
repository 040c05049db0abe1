"""The fastest plan that keeps within a budget: from a probe's figures where they are enough, else over traces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from delest import errors
from delest.planning import probed, traced
from delest.planning.request import Request
from delest.planning.traced import Refusal, Retrace
from delest.records.form import to_plain
from delest.records.hardware import Roofline
from delest.records.plan import Choice, Plan

SHORT_STEP_SECONDS = 0.05  # tracing takes longer than such a step can win back


def choose(
    request: Request, tracing: Callable[[], tuple[Retrace, Roofline] | tuple[Retrace, Roofline, Refusal]] | None = None
) -> Plan | None:
    """The plan for a request; None where only traces can tell, and `tracing` is not given.

    `tracing` gives what traces the job's step with methods applied, this machine's rates, and what tells
    whether a real step with them is refused (default: none is).
    Raises `NothingFits` with the smallest budget that works.
    """
    faster, rejected = probed.faster(request)
    request = threaded(request, faster)
    plain, split = probed.plain_footprint(request, faster), None
    if plain.high_bytes <= request.budget_bytes:
        return probed.choose(request, faster, rejected)
    if (plain.step_seconds or 0.0) < SHORT_STEP_SECONDS and not (request.exact and request.probe["batch_statistics"]):
        try:
            return probed.choose(request, faster, rejected)
        except errors.NothingFits as error:  # traces know more than to split the batch
            split = error
    if tracing is None:
        return None
    try:
        plan = traced.choose(request, tuple(faster), *tracing())
    except errors.NothingFits as error:
        if split is not None and (split.smallest_bytes or 0) <= (error.smallest_bytes or 0):
            raise split from None
        if error.plan is not None:
            error.plan["rejected"] = [*to_plain(rejected), *error.plan["rejected"]]
        raise
    return replace(plan, rejected=(*rejected, *plan.rejected))


def threaded(request: Request, faster: Sequence[Choice]) -> Request:
    """A request with the number of threads that was chosen."""
    count = next((choice.config["count"] for choice in faster if choice.method == "threads"), request.threads)
    return replace(request, threads=count)
