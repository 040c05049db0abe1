"""Proving on this machine that a plan's methods keep what they state, and that a killed run goes on bit for bit."""

from __future__ import annotations

import json
import math
import os
import signal
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delest import errors, job as jobs, processes
from delest.methods import environment
from delest.records.form import from_json, to_json
from delest.records.plan import Plan
from delest.records.verification import MethodCheck, ResumeCheck, Verification
from delest.verbs.planning import plan_as_given, plan_workplace
from delest.verbs.training import digest
from delest.verbs.workplace import Workplace, backend, build_trainer, check_device, open_workplace, preprocessing_json

if TYPE_CHECKING:
    from delest.training.progress import Progress

STEPS = 20  # that are compared
EPOCH_STEPS, RUN_STEPS = 4, 8  # of the short run: it is killed in the middle of its second epoch
LONGEST_SECONDS = 3600.0  # of either child: someone waits for it, and may end it at any time
FP64 = 2  # times the memory of fp32


def verify(
    job: Any,
    *,
    plan: Plan | str | Path | None = None,
    memory: str | int | None = None,
    device: str | None = None,
    threads: int | None = None,
    say: Progress | None = None,
) -> Verification:
    """Check a plan on this machine: each method's losses, gradients and weights against the plain step's over 20 steps, and a
    short run that is killed and resumed against one that is not.

    Without `plan` the job is planned first, within `memory` as `delest.plan` does it. A check that fails is in what is
    returned. Raises `BadInput` for a plan that does not belong to the job, `NothingFits`, and `OutOfMemory` where the plain
    step does not fit even on few rows.
    """
    from delest.training.progress import Progress

    say = say or Progress()
    place = open_workplace(jobs.load(job), say)
    if plan is None:
        chosen = plan_workplace(place, memory=memory, device=device, threads=threads, say=say)
    else:
        chosen = plan_as_given(place, plan, {"memory": memory, "device": device, "threads": threads}, say)
        check_device(chosen.device)
    started = time.monotonic()
    rows, methods = _compare(place, chosen, say)
    compared = time.monotonic()
    resume = _kill_and_resume(place, chosen, say)
    seconds = {**place.seconds, "comparing": compared - started, "resuming": time.monotonic() - compared}
    return Verification(
        ok=all(check.ok for check in methods) and resume.ok is not False,
        plan=chosen,
        methods=methods,
        resume=resume,
        rows=rows,
        job=place.job.describe(),
        seconds=seconds,
    )


# Methods


def _compare(place: Workplace, plan: Plan, say: Progress) -> tuple[int, tuple[MethodCheck, ...]]:
    """Rows of a batch that was compared, and a check for each method."""
    if not plan.choices:
        return plan.batch_size, ()
    names = ", ".join(choice.method for choice in plan.choices)
    say.stage(f"verify: {STEPS} steps without methods and with {names}")
    least = min(plan.batch_size, 2 * plan.micro_batch)  # fewer would be one part, and prove nothing of its parts
    answer = processes.call(
        "delest.footprint.comparison:compare",
        place.job,
        timeout=LONGEST_SECONDS,
        environment=environment(plan),
        preprocessing=preprocessing_json(place),
        plan=to_json(plan),
        rates=_rates(place),
        rows=_rows(plan, least),
        least_rows=least,
    )
    return answer["rows"], tuple(from_json(MethodCheck, check) for check in answer["checks"])


def _rates(place: Workplace) -> list[float]:
    """The first of the rates that the job trains with."""
    from delest.training.schedules import Schedule

    feed, recipe = place.feed("train"), place.job.recipe
    total = recipe.epochs_for(len(feed), feed.batch_size) * feed.steps
    schedule = Schedule.of(recipe, max(STEPS, total))
    return [schedule.rate(step) for step in range(STEPS)]


def _rows(plan: Plan, least: int) -> int:
    """The whole batch, or so much of it that the plain step fits in the memory that is free, by the plan's own figures."""
    from delest.hardware import machine

    if plan.plain is None or plan.device != "cpu":
        return plan.batch_size
    rows, free = plan.batch_size, machine.describe().available_bytes
    grown = FP64 * (plan.plain.high_bytes - plan.plain.runtime_bytes)
    while rows > least and plan.plain.runtime_bytes + grown * rows / plan.batch_size > free:
        rows = max(least, rows // 2)
    return rows


# Kill and resume


def _kill_and_resume(place: Workplace, plan: Plan, say: Progress) -> ResumeCheck:
    """A short run left alone, one that is killed, and that one resumed: a process each."""
    if place.job.origin is None:
        why = "not tried: the job was given as Python objects, which no other process can build again. Put it in a file."
        return ResumeCheck(ok=None, why=why)
    say.stage("verify: a short run left alone, one killed, and that one resumed")
    with tempfile.TemporaryDirectory(prefix="delest-") as home:
        whole = _train_briefly(place, plan, Path(home, "whole"))
        killed_at = min(whole["steps"] - 1, whole["epoch_steps"] + 2)
        try:
            _train_briefly(place, plan, Path(home, "killed"), kill_at=killed_at)
        except errors.ProbeFailed as ended:
            if ended.exit_code != -signal.SIGKILL:
                raise
        resumed = _train_briefly(place, plan, Path(home, "killed"), resume=True)
    same = resumed["sha256"] == whole["sha256"]
    went_on = resumed["resumed_from"] is not None and 0 < resumed["resumed_from"] <= killed_at
    if not went_on:
        why = "the resumed process found no checkpoint that the killed one had finished."
    elif same:
        why = "weights, optimizer, random state and best weights end the same to the last bit."
    else:
        why = "weights, optimizer or random state end otherwise than in the run that was left alone."
    return ResumeCheck(
        ok=same and went_on,
        why=why,
        steps=whole["steps"],
        killed_at=killed_at,
        resumed_from=resumed["resumed_from"],
        sha256=whole["sha256"],
        resumed_sha256=resumed["sha256"],
    )


def _train_briefly(place: Workplace, plan: Plan, folder: Path, **how: Any) -> Mapping[str, Any]:
    return processes.call(
        "delest.verbs.verification:train_briefly",
        place.job,
        timeout=LONGEST_SECONDS,
        environment=environment(plan),
        preprocessing=preprocessing_json(place),
        plan=to_json(plan),
        folder=str(folder),
        **how,
    )


def train_briefly(
    job: jobs.Job,
    *,
    preprocessing: dict[str, Any],
    plan: dict[str, Any],
    folder: str,
    resume: bool = False,
    kill_at: int | None = None,
) -> dict[str, Any]:
    """Train a job for a few steps in a folder, with a checkpoint after each; called through `delest.processes`. Nothing guards
    its memory: what a guard splits depends on what is free at the moment.

    With `kill_at` SIGKILL ends this process after so many steps, before the last of them is saved. Returns `steps`,
    `epoch_steps`, `resumed_from` (the step of the checkpoint, None where there was none) and the digest `sha256`.
    """
    from delest.training.loop import Limits
    from delest.training.progress import Progress

    place = _small_workplace(job, preprocessing)
    session = backend(place.job, place.source.schema).session(place.job, from_json(Plan, plan), place.source.schema)
    trainer = build_trainer(place, session, Path(folder), Progress())
    trainer.limits = Limits(checkpoint_seconds=0.0)
    resumed_from = trainer.position.step if resume and trainer.resume() else None
    if kill_at is not None:
        _kill_after(session, kill_at)
    trainer.train()
    return {
        "steps": trainer.position.step,
        "epoch_steps": trainer.train_feed.steps,
        "resumed_from": resumed_from,
        "sha256": _digest(Path(folder)),
    }


def _small_workplace(job: jobs.Job, preprocessing: dict[str, Any]) -> Workplace:
    """The job on few rows, evenly spaced, and for few epochs, in which it does not end early."""
    from delest.data import Preprocessing, open_job, split

    source, size = open_job(job), job.batch_size
    splits = {
        role: _evenly(index, EPOCH_STEPS * size if role == "train" else size)
        for role, index in split(source, job.split, job.seed).items()
    }
    epochs = max(2, math.ceil(RUN_STEPS * size / max(1, len(splits["train"]))))
    recipe = replace(job.recipe, epochs=epochs, patience=epochs + 1)
    return Workplace(replace(job, recipe=recipe), source, splits, from_json(Preprocessing, preprocessing))


def _evenly(index: Any, count: int) -> Any:
    import numpy as np

    return index if len(index) <= count else index[np.linspace(0, len(index) - 1, count).astype(np.int64)]


def _kill_after(session: Any, steps: int) -> None:
    """Have the session's step number `steps` be the last thing that this process does."""
    step, taken = session.step, 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal taken
        done, taken = step(*args, **kwargs), taken + 1
        if taken == steps:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    session.step = counted


def _digest(folder: Path) -> str:
    """SHA-256 of all that the last checkpoint holds as arrays, and of the best weights."""
    from safetensors.numpy import load_file

    newest = max((folder / "checkpoints").glob("step-*"))
    state, best = load_file(newest / "state.safetensors"), load_file(folder / "best.safetensors")
    numbers = json.loads((newest / "state.json").read_text())["scalars"]  # what an optimizer keeps as plain numbers
    return digest({**state, **{f"best.{name}": array for name, array in best.items()}, "numbers": _characters(numbers)})


def _characters(value: Any) -> Any:
    import numpy as np

    return np.frombuffer(json.dumps(value, sort_keys=True).encode(), np.uint8)
