"""Run folders: how they are named, claimed, written and found again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from delest import errors, job as jobs, storage
from delest.records.form import read_json
from delest.records.plan import Plan
from delest.records.run import Run

ROOT = Path("runs")


def place(out: str | Path | None, title: str) -> Path:
    """The folder of a new run: `out`, or the next free runs/TITLE-001. Nothing is made yet.

    Raises `BadInput` where `out` holds another run or anything else, or is a file.
    """
    if out is None:
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", title).strip("-.") or "job"
        taken = [int(path.name.rpartition("-")[2]) for path in ROOT.glob(f"{name}-*") if path.name.rpartition("-")[2].isdigit()]
        return ROOT / f"{name}-{max(taken, default=0) + 1:03d}"
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise errors.BadInput(f"{folder} is a file: --out must name a folder.")
    if (folder / "job.json").exists():
        raise errors.BadInput(f"{folder} holds another run: choose another --out, or go on with that run by --resume.")
    if folder.exists() and any(folder.iterdir()):
        raise errors.BadInput(f"{folder} is not empty: choose another --out, so that nothing in it is overwritten.")
    return folder


def claim(folder: Path, job: jobs.Job, plan: Plan) -> None:
    """Make the folder and write what the run is: `job.json`, `plan.json`. Two runs never get the same folder."""
    with storage.room_reported(folder):
        folder.mkdir(parents=True, exist_ok=True)
        storage.write_json(folder / "plan.json", plan)
        try:
            with open(folder / "job.json", "x") as file:
                file.write(json.dumps({"format": 1, **job.describe()}, indent=2) + "\n")
        except FileExistsError:
            raise errors.BadInput(f"{folder} was taken by another run just now: start again.") from None


def unfinished(out: str | Path | None, job: jobs.Job | None) -> Path:
    """The folder to resume: `out`, or the newest unfinished run of this job. Raises `BadInput` where there is none."""
    if out is not None:
        folder = Path(out)
        if not (folder / "job.json").exists():
            raise errors.BadInput(f"{folder} holds no run to resume (it has no job.json).")
        return folder
    candidates = sorted(ROOT.glob("*/job.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in candidates:
        described = json.loads(path.read_text())
        if (job is None or described["origin"] == job.origin) and read(path.parent).status != "done":
            return path.parent
    raise errors.BadInput(
        f"there is no unfinished run {'of this job ' if job else ''}under {ROOT.resolve()}: name its folder with --out."
    )


def job_of(folder: Path, given: jobs.Job | None = None) -> jobs.Job:
    """The job of a run, as `job.json` has it; code comes from its origin, or from the job that is given where it has none.

    Raises `BadInput` where an option that was given differs from the run's.
    """
    described = _described(folder)
    if given is not None:
        now = given.describe()
        changed = []
        for name in given.set_by:
            outer, _, inner = name.partition(".")
            before, after = (described[outer][inner], now[outer][inner]) if inner else (described[outer], now[outer])
            if before != after:
                changed.append(
                    f"{inner or outer} is {before} in this run, not {after}: leave the option out, or start a new run."
                )
        if changed:
            raise errors.BadInput(changed)
    if described["origin"] is None:
        if given is None:
            raise errors.BadInput(f"the job of {folder} was given as Python objects: pass it again to go on with this run.")
        return given
    return jobs.rebuild(described)


def read(folder: Path) -> Run:
    """The run's record; one that is not there yet reads as running."""
    path = folder / "run.json"
    if path.exists():
        return read_json(Run, path)
    return Run(path=folder, name=folder.name, status="running", job=_described(folder))


def find(run: Run | str | Path) -> Path:
    """The folder of a run. Raises `BadInput` where it holds none."""
    folder = run.path if isinstance(run, Run) else Path(run)
    if folder.name == "run.json":
        folder = folder.parent
    if not (folder / "job.json").exists():
        hint = "it does not exist" if not folder.exists() else "it has no job.json"
        raise errors.BadInput(f"{folder} holds no run: {hint}.")
    return folder


def _described(folder: Path) -> dict[str, Any]:
    try:
        described = json.loads((folder / "job.json").read_text())
    except ValueError as error:
        raise errors.BadInput(f"{folder / 'job.json'} is not valid JSON ({error}).") from None
    if described.get("format", 1) > 1:
        raise errors.BadInput(
            f"{folder / 'job.json'} was written by a newer delest (format {described['format']}): upgrade delest to read it."
        )
    described.pop("format", None)
    return described
