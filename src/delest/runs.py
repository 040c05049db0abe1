"""Run folders: how they are named, claimed, written and found again."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from delest import errors, job as jobs, storage
from delest.records.form import read_json, read_object
from delest.records.plan import Plan
from delest.records.run import Run

ROOT = Path("runs")


def place(out: str | Path | None, title: str, *, option: str = "--out", resume: str = "--resume") -> Path:
    """The folder of a new run: `out`, or the next free runs/TITLE-001. Nothing is made yet. `option` is how `out` is given, `resume` how a run is gone on
    with, empty where it cannot be.

    Raises `BadInput` where `out` holds another run or anything else, is a file, or cannot be written.
    """
    if out is None:
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", title).strip("-.") or "job"
        found = (re.fullmatch(re.escape(name) + r"-(\d+)", path.name, re.ASCII) for path in ROOT.glob(f"{name}-*"))
        folder = ROOT / f"{name}-{max((int(match[1]) for match in found if match), default=0) + 1:03d}"
    else:
        folder = Path(out)
    home = next(path for path in (folder, *folder.parents) if path.exists())
    if not home.is_dir():
        raise errors.BadInput(f"{home} is a file: {option} must name a folder.")
    if not os.access(home, os.W_OK):
        raise errors.BadInput(f"{home} may not be written by this user: choose another place with {option}.")
    if (folder / "job.json").exists():
        goes_on = f", or go on with that run by {resume}" if resume else ""
        raise errors.BadInput(f"{folder} holds another run: choose another {option}{goes_on}.")
    if folder.exists() and any(folder.iterdir()):
        raise errors.BadInput(f"{folder} is not empty: choose another {option}, so that nothing in it is overwritten.")
    return folder


def claim(
    folder: Path,
    job: jobs.Job | Mapping[str, Any],
    plan: Plan,
    *,
    settings: Mapping[str, Any] | None = None,
    files: Mapping[str, Any] | None = None,
) -> None:
    """Make the folder and write what the run is: `plan.json`, `files` (JSON by name), and last `job.json` with `settings`. A run in
    somebody else's loop has no job: a mapping that names that `loop` describes it.

    Two runs never get the same folder: raises `FolderTaken`.
    """
    with storage.room_reported(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            open(folder / "plan.json", "x").close()  # the claim: only one can make it
        except FileExistsError:
            raise errors.FolderTaken(f"{folder} was taken by another run just now: start again.") from None
    try:
        storage.write_json(folder / "plan.json", plan)
        for name, content in (files or {}).items():
            storage.write_json(folder / name, content)
        described = job.describe() if isinstance(job, jobs.Job) else job
        storage.write_json(folder / "job.json", {**described, "settings": dict(settings or {})})  # last: now it holds a run
    except errors.DiskFull:
        for name in ("plan.json", *(files or {})):
            (folder / name).unlink(missing_ok=True)
        raise


def settings_of(folder: Path) -> dict[str, Any]:
    """What the run was told besides its job, by name."""
    return _described(folder).get("settings", {})


def unfinished(out: str | Path | None, job: jobs.Job | None, *, whole: bool = False) -> Path:
    """The folder to resume: `out`, or the newest unfinished run of this job; `whole` runs are finished by their report.

    Raises `BadInput` where there is none.
    """
    if out is not None:
        folder = Path(out)
        if not (folder / "job.json").exists():
            raise errors.BadInput(f"{folder} holds no run to resume (it has no job.json).")
        return folder
    candidates = sorted(ROOT.glob("*/job.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in candidates:
        if _can_go_on(path.parent, job, whole):
            return path.parent
    raise errors.BadInput(
        f"there is no unfinished run {'of this job ' if job else ''}under {ROOT.resolve()}: name its folder with --out."
    )


def job_of(folder: Path, given: jobs.Job | None = None) -> jobs.Job:
    """The job of a run, as `job.json` has it; code comes from its origin, or from the job that is given where it has none.

    Raises `BadInput` where the job that is given is another one, or an option that was given differs from the run's.
    """
    described = _described(folder)
    if described.get("loop"):
        raise errors.BadInput(f"{folder} was trained in the loop of {described['loop']}: go on there, by its own checkpoints.")
    if given is not None:
        if given.origin and described["origin"] and given.origin != described["origin"]:
            raise errors.BadInput(f"{folder} is a run of {described['origin']}, not of {given.origin}: name that job, or none.")
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
    return jobs.rebuild(described, given if given is not None and given.origin else None)


def read(folder: Path) -> Run:
    """The run's record, with the folder as its path (it may have been moved); one that is not there yet reads as running."""
    path = folder / "run.json"
    if path.exists():
        return replace(read_json(Run, path), path=folder)
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


def _can_go_on(folder: Path, job: jobs.Job | None, whole: bool) -> bool:
    try:
        done = read(folder).status == "done" and (not whole or (folder / "report.html").exists())
        described = _described(folder)
        return (job is None or described["origin"] == job.origin) and not done and not described.get("loop")
    except errors.BadInput:
        return False  # a damaged run must not stand in the way of a whole one


def _described(folder: Path) -> dict[str, Any]:
    """The content of `job.json`; a field that is not there has its default."""
    return {**jobs.Job().describe(), **read_object(folder / "job.json")}
