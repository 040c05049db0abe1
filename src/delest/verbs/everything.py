"""The whole way in one call: inspect, plan, train, shrink, report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delest import errors, job as jobs, runs
from delest.records.plan import Plan
from delest.records.run import Run
from delest.verbs.ship import report, shrink_trained
from delest.verbs.training import Settings, train_with

if TYPE_CHECKING:
    from delest.training.progress import Progress


def run(
    job: Any = None,
    *,
    plan: Plan | str | Path | None = None,
    memory: str | int | None = None,
    exact: bool = False,
    time: str | float | None = None,
    preview: str | float | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    init_from: str | Path | None = None,
    device: str | None = None,
    threads: int | None = None,
    checkpoint_seconds: float | None = None,
    track: str | Sequence[str] | None = None,
    max_drop: float | None = None,
    say: Progress | None = None,
) -> Run:
    """Inspect, plan, train, shrink and report; the run's folder then has `report.html`, `bundle/` and `shrunk/`.

    Arguments are those of `train` and `shrink` (`max_drop` None: 0.005). Where the model cannot be exported the report is
    written all the same, before the error is raised. A job with its own `step` and no `predict` has nothing to export: it is
    trained and reported only.
    """
    from delest.training.progress import for_terminal

    say = say or for_terminal()
    settings = Settings(
        plan=plan,
        memory=memory,
        exact=exact or None,
        time=time,
        preview=preview,
        out=out,
        resume=resume,
        init_from=init_from,
        device=device,
        threads=threads,
        checkpoint_seconds=checkpoint_seconds,
        track=track,
        max_drop=max_drop,
    )
    loaded = None if job is None else jobs.load(job)
    if resume:
        settings = replace(settings, out=runs.unfinished(out, loaded, whole=True))
    trained = train_with(loaded, settings, say, "run")
    if trained.place.job.step is None or trained.place.job.predict is not None:
        promised = runs.settings_of(trained.run.path).get("max_drop") if max_drop is None else max_drop
        try:
            shrink_trained(trained, max_drop=0.005 if promised is None else promised, threads=threads, say=say)
        except errors.DelestError:
            report(trained.run.path)
            raise
    page = report(trained.run.path)
    say.stage(f"report: {page}")
    return runs.read(trained.run.path)
