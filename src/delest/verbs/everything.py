"""The whole way in one call: inspect, plan, train, shrink, report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from delest import job as jobs, runs
from delest.records.plan import Plan
from delest.records.run import Run
from delest.verbs.ship import report, shrink_trained
from delest.verbs.training import Settings, restore, train_with

if TYPE_CHECKING:
    from delest.training.progress import Progress


def run(
    job: Any = None,
    *,
    plan: Plan | str | Path | None = None,
    memory: str | int | None = None,
    time: str | float | None = None,
    preview: str | float | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    init_from: str | Path | None = None,
    device: str | None = None,
    threads: int | None = None,
    checkpoint_seconds: float = 60.0,
    max_drop: float = 0.005,
    say: Progress | None = None,
) -> Run:
    """Inspect, plan, train, shrink and report; the run's folder then has `report.html`, `bundle/` and `shrunk/`.

    Arguments are those of `train` and `shrink`. A job with its own `step` and no `predict` has nothing to export: it is
    trained and reported only.
    """
    from delest.training.progress import for_terminal

    say = say or for_terminal()
    settings = Settings(
        plan=plan,
        memory=memory,
        time=time,
        preview=preview,
        out=out,
        resume=resume,
        init_from=init_from,
        device=device,
        threads=threads,
        checkpoint_seconds=checkpoint_seconds,
    )
    loaded = None if job is None else jobs.load(job)
    if resume and runs.read(folder := runs.unfinished(out, loaded)).status == "done":
        trained = restore(folder, say)
    else:
        trained = train_with(loaded, settings, say, "run")
    if trained.place.job.step is None or trained.place.job.predict is not None:
        shrink_trained(trained, max_drop=max_drop, threads=threads, say=say)
    page = report(trained.run.path)
    say.stage(f"report: {page}")
    return runs.read(trained.run.path)
