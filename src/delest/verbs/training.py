"""Training: from a job to a run folder with the best weights."""

from __future__ import annotations

import contextlib
import hashlib
import shlex
import statistics
import time as clock
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delest import __version__, errors, job as jobs, malloc, runs, storage, supervision, units
from delest.records.footprint import Footprint
from delest.records.form import read_json, read_object
from delest.records.plan import Plan
from delest.records.run import Best, Run
from delest.training import limit, tracking
from delest.verbs.planning import plan_as_given, plan_workplace
from delest.verbs.preview import train_preview
from delest.verbs.starting import plan_of_before, start_with
from delest.verbs.workplace import (
    Workplace,
    backend,
    build_trainer,
    guarded_bytes,
    open_workplace,
    preprocessing_json,
)

if TYPE_CHECKING:
    from delest.training.loop import Trainer
    from delest.training.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `train` and `run` are told besides the job."""

    plan: Plan | str | Path | None = None
    memory: str | int | None = None
    exact: bool | None = None
    time: str | float | None = None
    preview: str | float | None = None
    out: str | Path | None = None
    resume: bool = False
    init_from: str | Path | None = None
    device: str | None = None
    threads: int | None = None
    checkpoint_seconds: float | None = None  # 60
    track: str | Sequence[str] | None = None
    max_drop: float | None = None  # of run's shrinking


@dataclass
class Trained:
    """A finished training with what it left in memory, for the verbs that go on from it."""

    run: Run
    place: Workplace
    session: Any
    seconds: dict[str, float] = field(default_factory=dict)


def train(
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
    say: Progress | None = None,
) -> Run:
    """Train a job and keep the best weights: checked, planned, checkpointed, resumable.

    `job` is a `Job`, a path or a name (see `delest.job.load`); with `resume` it may be left out where `out` names the run.
    `memory` bounds the resident set (bytes, "2GiB", "80%"), with `exact` by methods that keep the results alone; `time` the training ("10min", seconds), `preview` is the
    share of training rows to train on first, `track` names trackers ("tensorboard,mlflow", a sequence) that are told of it as well. Raises `BadInput`, `NothingFits`, `Diverged`, `Interrupted` (resumable).
    """
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
    )
    return train_with(job, settings, say, "train").run


def train_with(job: Any, settings: Settings, say: Progress | None, verb: str) -> Trained:
    """Train or go on training; `verb` is the command to name when a signal stops it."""
    from delest.training.progress import for_terminal

    say = say or for_terminal()
    loaded = None if job is None else jobs.load(job)
    if settings.resume:
        folder = runs.unfinished(settings.out, loaded)
        if runs.read(folder).status == "done":
            say.stage(f"{folder} is finished: there is nothing to resume")
            return restore(folder, say, loaded)
        loaded, settings = runs.job_of(folder, loaded), _as_begun(folder, settings)
    elif loaded is None:
        raise errors.BadInput("no job was given: name a file, a module:name or a path to data.")
    else:
        folder = runs.place(settings.out, loaded.title)
    tracked = tracking.read_names(settings.track)
    settings = replace(settings, track=",".join(tracked) or None)
    with limit.held(_known_budget(settings, folder)) as hold:
        with contextlib.nullcontext() if hold is None else hold.released():
            place = open_workplace(loaded, say, folder if settings.resume else None)
            plan = _plan(place, settings, folder, say)
            _ = place.summary  # now: looking at the data takes memory for a moment
            start_with(plan, place.seconds.get("planning", 0.0))
        for note in () if settings.resume else plan.notes:
            say.note(note)
        with limit.held(guarded_bytes(plan)):
            return _train_as_planned(place, plan, folder, settings, say, verb)


def _known_budget(settings: Settings, folder: Path) -> int | None:
    """The budget of a plan that is there before the data are opened, which is then held from the beginning."""
    given = folder / "plan.json" if settings.resume else settings.plan
    if given is None:
        return None
    return guarded_bytes(given if isinstance(given, Plan) else read_json(Plan, Path(given)))


def _train_as_planned(place: Workplace, plan: Plan, folder: Path, settings: Settings, say: Progress, verb: str) -> Trained:
    limits = _limits(settings)
    session = _session(place, plan)
    begun = settings.resume and any(folder.glob("checkpoints/step-*"))  # which hold the weights already
    begin_with = None if settings.init_from is None or begun else read_weights(Path(settings.init_from))
    if begin_with is not None:
        session.load_weights(begin_with)
    preview = None
    if settings.preview is not None and not settings.resume:
        preview = train_preview(place, plan, units.read_share(settings.preview), say)
        session = _session(place, plan)
        if begin_with is not None:
            session.load_weights(begin_with)
    if not settings.resume:
        folder = start_folder(folder, place, plan, session, settings)
    trainer = build_trainer(place, session, folder, say)
    trainer.limits = replace(limits, memory_bytes=guarded_bytes(plan))
    run = began(folder, place, plan, session, preview)
    supervision.tell(folder, trainer.limits.memory_bytes)
    with limit.reported("the newest checkpoint was loaded"):
        resumed = settings.resume and trainer.resume(supervision.crash())
    if resumed:
        say.stage(f"train: going on from step {trainer.position.step:,} of {trainer.position.total_steps:,} in {folder}")
    else:
        say.stage(f"train: {trainer.position.total_steps:,} steps of {place.job.batch_size} rows, in {folder}")
    if settings.track:
        names = tracking.read_names(settings.track)
        trainer.tracking = tracking.Tracking(names, run, trainer.position.step, say.note)
    run = _carry_out(trainer, run, verb, say)
    return Trained(run, place, session, dict(place.seconds))


def _session(place: Workplace, plan: Plan) -> Any:
    with limit.reported("the model and its optimizer were built"):
        return backend(place.job, place.source.schema).session(place.job, plan, place.source.schema)


def _as_begun(folder: Path, settings: Settings) -> Settings:
    """The settings of a run that goes on: those it began with. Its time and checkpoints may be given anew."""
    begun = runs.settings_of(folder)
    if settings.init_from is not None:
        settings = replace(settings, init_from=str(Path(settings.init_from).resolve()))
    changed = [
        f"--{name.replace('_', '-')}"
        for name in ("plan", "memory", "exact", "preview", "init_from", "device", "threads")
        if getattr(settings, name) not in (None, begun.get(name))
    ]
    if changed:
        raise errors.BadInput(
            f"{', '.join(changed)}: a run goes on with the settings it began with. Leave it out, or start a new run."
        )
    return replace(settings, **{name: value for name, value in begun.items() if getattr(settings, name) is None})


def restore(folder: Path, say: Progress, given: jobs.Job | None = None) -> Trained:
    """A finished run as it was in memory: data opened, best weights in a session."""
    run = runs.read(folder)
    job = runs.job_of(folder, given)
    place = open_workplace(job, say, folder)
    check_same_data(folder, place)
    session = backend(job, place.source.schema).session(job, read_json(Plan, folder / "plan.json"), place.source.schema)
    session.load_weights(read_weights(folder / "best.safetensors"))
    return Trained(run, place, session)


def read_weights(path: Path) -> Mapping[str, Any]:
    """Arrays of a safetensors file. Raises `BadInput` where it is missing or damaged."""
    from delest.tensors import Arrays

    return Arrays(path)


def check_same_data(folder: Path, place: Workplace) -> None:
    """Raise `BadInput` where the data are not those that the run was started with."""
    before = read_object(folder / "data.json")
    if before["fingerprint"] != place.source.fingerprint:
        now = place.source.description
        how = "its content is another now" if before["source"] == now else f"it is {now} now"
        raise errors.BadInput(
            f"the data have changed since {folder} was started with {before['source']}: {how}. "
            "Bring the old data back, or start a new run."
        )


def _limits(settings: Settings) -> Any:
    from delest.training.loop import Limits

    seconds = None if settings.time is None else units.read_seconds(settings.time)
    every = settings.checkpoint_seconds
    return Limits(seconds=seconds) if every is None else Limits(checkpoint_seconds=every, seconds=seconds)


def _plan(place: Workplace, settings: Settings, folder: Path, say: Progress) -> Plan:
    before = plan_of_before()
    if settings.resume:
        check_same_data(folder, place)
        return read_json(Plan, folder / "plan.json")
    if before is not None:
        place.seconds |= before.seconds
        return before
    wishes: dict[str, Any] = {name: getattr(settings, name) for name in ("memory", "exact", "device", "threads")}
    if settings.plan is None:
        wishes["exact"] = bool(settings.exact)
        return plan_workplace(place, **wishes, say=say, startable=supervision.restartable)
    return plan_as_given(place, settings.plan, wishes, say)


def start_folder(folder: Path, place: Workplace, plan: Plan, session: Any, settings: Settings) -> Path:
    """Claim the folder, or the next one where it is counted up and another run was faster."""
    from delest.training import checkpoints

    state = session.state()
    weights = sum(array.nbytes for name, array in state.arrays.items() if name.startswith("model."))
    checkpoints.check_room(folder, sum(array.nbytes for array in state.arrays.values()), weights)
    names = ("memory", "exact", "time", "preview", "device", "threads", "checkpoint_seconds", "max_drop", "track")
    begun = {name: getattr(settings, name) for name in names}
    begun["init_from"] = None if settings.init_from is None else str(Path(settings.init_from).resolve())
    files = {"data.json": place.describe_data(), "preprocessing.json": preprocessing_json(place)}
    while True:
        try:
            runs.claim(folder, place.job, plan, settings=begun, files=files)
            return folder
        except errors.FolderTaken:
            if settings.out is not None:
                raise
            folder = runs.place(None, place.job.title)


def began(folder: Path, place: Workplace, plan: Plan, session: Any, preview: dict[str, Any] | None) -> Run:
    import platform

    import numpy

    before = runs.read(folder)
    run = Run(
        path=folder,
        name=folder.name,
        status="running",
        job=place.job.describe(),
        metric=place.metric.name,
        higher_is_better=place.metric.higher_is_better,
        parameters=session.parameters(),
        plan=plan,
        data=place.summary,
        seconds={**before.seconds, **place.seconds},
        preview=preview or before.preview,
        measured=before.measured,
        versions={
            "delest": __version__,
            "python": platform.python_version(),
            **backend(place.job, place.source.schema).versions(),
            "numpy": numpy.__version__,
        },
    )
    storage.write_json(folder / "run.json", run)
    return run


def _carry_out(trainer: Trainer, run: Run, verb: str, say: Progress) -> Run:
    from delest.hardware import machine

    started, before = clock.monotonic(), machine.resident_bytes()
    machine.reset_peak()
    status: Any = "failed"
    try:
        trainer.train()
        status = "done"
    except errors.Interrupted as stopped:
        status = "interrupted"
        raise errors.Interrupted(stopped.signal_number, _go_on(run, verb)) from None
    except errors.Diverged:
        status = "diverged"
        raise
    finally:
        wall = run.seconds.get("wall", 0.0) + clock.monotonic() - started
        run = replace(run, seconds={**run.seconds, "wall": wall})
        run = _finished(run, trainer, status, _measured(run, before, machine.peak_resident_bytes(), trainer))
        if trainer.tracking is not None:
            trainer.tracking.close(run)
    return run


def _go_on(run: Run, verb: str) -> str:
    """What to type to go on with a run."""
    if run.job["origin"] is None:
        return f"delest.{verb}(job, out={str(run.path)!r}, resume=True)"
    return f"delest {verb} {shlex.quote(str(run.job['origin']))} --out {shlex.quote(str(run.path))} --resume"


def _measured(run: Run, idle: int, peak: int, trainer: Trainer) -> Footprint:
    """The highest peak of all parts of the run."""
    assert run.plan is not None
    mean = trainer.position.training_seconds / max(1, trainer.position.step)  # with what compiling took, and saving
    timed = trainer.step_seconds if run.plan.device == "cpu" else ()
    peak = max(peak, run.measured.peak_bytes if run.measured else 0)
    return Footprint(
        peak_bytes=peak,
        runtime_bytes=idle,
        low_bytes=peak,
        high_bytes=peak,
        step_seconds=statistics.median(timed) if timed else mean,
        batch_size=run.plan.batch_size,
        micro_batch=run.plan.micro_batch,
        device=run.plan.device,
        allocator=malloc.current() if run.plan.device == "cpu" else "cuda",
        basis="measurement",
        how="run",
        isolated=False,
    )


def _finished(run: Run, trainer: Trainer, status: Any, measured: Footprint | None) -> Run:
    """Write the run's record as it now stands; the test split is read here, once, when training is done."""
    p = trainer.position
    test: dict[str, float] = {}
    seconds = {**run.seconds, "training": p.training_seconds, "evaluating": p.evaluating_seconds}
    weights_sha256 = None
    if status == "done":
        began = clock.monotonic()
        test = trainer.test()
        seconds["evaluating"] += clock.monotonic() - began
        weights_sha256 = digest(trainer.session.weights())
    best = None if p.best_score is None else Best(step=p.best_step, epoch=p.best_epoch, score=p.best_score)
    run = replace(
        run,
        status=status,
        steps=p.step,
        epochs=trainer.epochs(),
        stopped_by=p.stopped_by or ("epochs" if status == "done" else None),
        measured=measured,
        best=best,
        validation=p.validation or {},
        test=test,
        seconds=seconds,
        decisions=tuple(storage.read_lines(run.path / "decisions.jsonl")),
        weights_sha256=weights_sha256,
    )
    storage.write_json(run.path / "run.json", run)
    return run


def digest(weights: Mapping[str, Any]) -> str:
    """SHA-256 of weights: names, types, shapes and bytes, in the order of names."""
    import numpy as np

    total = hashlib.sha256()
    for name in sorted(weights):
        array = np.ascontiguousarray(weights[name])
        total.update(f"{name} {array.dtype} {array.shape}".encode())
        total.update(array.reshape(-1).view(np.uint8).data)
    return total.hexdigest()
