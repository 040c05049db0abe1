"""After training: make the model smaller, report, predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delest import errors, runs, storage
from delest.records.form import read_json
from delest.records.run import Run
from delest.records.shrunk import Shrunk
from delest.verbs.training import Trained, restore
from delest.verbs.workplace import backend

if TYPE_CHECKING:
    from delest.training.progress import Progress


def shrink(
    run: Run | str | Path, *, max_drop: float = 0.005, threads: int | None = None, say: Progress | None = None
) -> Shrunk:
    """Export a run's best model and quantise it, keeping int8 only where it pays inside `max_drop`.

    `max_drop` is the largest loss of the metric that the one-sided 95 % confidence bound on the selection split may allow: in
    its own unit (0.005 is half a point of accuracy), or as a share of the score for errors such as rmse. Raises `BadInput` where `run` is not a finished run, `CheckFailed` where the exported
    model does not answer like the trained one.
    """
    from delest.training.progress import for_terminal

    say = say or for_terminal()
    folder = runs.find(run)
    if runs.read(folder).status == "diverged":
        raise errors.BadInput(
            f"{folder} diverged, and its settings stay: start a new run with a lower --lr, or with --clip 1.0."
        )
    if runs.read(folder).status != "done":
        raise errors.BadInput(
            f"{folder} is {runs.read(folder).status}, not done: finish it with `delest train --out {folder} --resume`."
        )
    shrunk = shrink_trained(restore(folder, say), max_drop=max_drop, threads=threads, say=say)
    report(folder)
    return shrunk


def shrink_trained(trained: Trained, *, max_drop: float, threads: int | None, say: Progress) -> Shrunk:
    """`shrink` for a training that is still in memory."""
    from delest.hardware import machine
    from delest.shrinking.pipeline import shrink_run

    place, run, here = trained.place, trained.run, machine.describe()
    if place.job.step is not None and place.job.predict is None:
        raise errors.BadInput(
            "this job has a `step` and no `predict`: give the Job a `predict(model, inputs)`, so that there is an output to export."
        )
    say.stage("shrink: exporting, quantising and measuring on this machine")
    # Without VNNI, int8 products of pairs are added in 16 bits and saturate: weights then get 7 bits (docs/log.md).
    reduce_range = not {"avx512_vnni", "avx_vnni", "amx_int8"} & set(here.instruction_sets)
    shrunk = shrink_run(
        folder=run.path,
        session=trained.session,
        backend=backend(place.job),
        feeds={role: place.feed(role) for role in place.splits},
        preprocessing=place.preprocessing,
        metric=place.metric,
        weights=trained.session.weights(),
        name=run.name,
        max_drop=max_drop,
        threads=threads or (run.plan.threads if run.plan and run.plan.threads else here.cores),
        reduce_range=reduce_range,
        say=say.note,
    )
    updated = replace(runs.read(run.path), seconds={**runs.read(run.path).seconds, "shrinking": sum(shrunk.seconds.values())})
    storage.write_json(run.path / "run.json", updated)
    return shrunk


def report(run: Run | str | Path) -> Path:
    """Write a run's `report.html`, one page that needs no network. Raises `BadInput` where there is no run."""
    from delest.hardware import machine
    from delest.reporting.page import write_report

    folder = runs.find(run)
    shrunk = folder / "shrunk" / "shrink.json"
    return write_report(
        folder,
        runs.read(folder),
        metrics=storage.read_lines(folder / "metrics.jsonl"),
        shrunk=read_json(Shrunk, shrunk) if shrunk.exists() else None,
        hardware=machine.describe(accelerators=True),
    )


def predict(bundle: str | Path, inputs: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Answers of an exported bundle for new inputs: images, folders of images, arrays or tables.

    `bundle` is a bundle's folder or a run's (what it shipped is taken). Each answer has `input`, and `label` with its
    `probability`, or `value`. Raises `BadInput` naming every input that cannot be read.
    """
    from delest import bundle as bundles
    from delest.bundle.inputs import predict_rows

    return predict_rows(bundles.load(_bundle_folder(Path(bundle))), [Path(item) for item in inputs])


def _bundle_folder(folder: Path) -> Path:
    """The bundle that a folder is or holds; a trained run without one is exported first."""
    if (folder / "bundle.json").exists():
        return folder
    for name in ("shrunk", "bundle"):
        if (folder / name / "bundle.json").exists():
            return folder / name
    if not (folder / "job.json").exists():
        reason = "it does not exist" if not folder.exists() else "it has neither bundle.json nor job.json"
        raise errors.BadInput(f"{folder} holds no bundle and no run: {reason}.")
    shrink(folder)
    return folder / "shrunk"
