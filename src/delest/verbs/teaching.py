"""A teacher or a student of the user's own, in place of the trained network and beside the narrower ones that are cut from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delest import errors, job as jobs, runs
from delest.verbs.keras_jobs import refuse
from delest.verbs.training import Trained, digest, restore
from delest.verbs.workplace import backend

if TYPE_CHECKING:
    from delest.job import Job
    from delest.records.run import Run
    from delest.training.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Company:
    """Who learns and teaches besides the trained network, and how the journal of a shrink knows them."""

    teacher: Any = None  # a session; None: the trained network teaches
    student: Callable[..., Any] | None = None  # a factory
    known_by: Mapping[str, str] = field(default_factory=dict)


def company(
    trained: Trained,
    teacher: Run | str | Path | Any,
    student: Job | str | Path | Callable[..., Any] | None,
    say: Progress,
) -> Company:
    """`teacher`: a finished run on data that are prepared alike, or a trained module; `student`: a factory, or a job whose model it is.

    Raises `BadInput` where either does not fit the trained network's data.
    """
    known: dict[str, str] = {}
    if teacher is not None or student is not None:
        refuse(trained.place.job, trained.place.source.schema, "a teacher or a student")
    session: Any = None
    factory: Any = None
    if teacher is not None:
        session = _teacher(trained, teacher, say)
        known["teacher"] = digest(session.weights())
    if student is not None:
        factory = student if callable(student) else jobs.load(student).model
        if not callable(factory):
            raise errors.BadInput(f"the student {student} names no model: give a job that has one, or what builds the network.")
        known["student"] = _checked(trained, factory)
    return Company(teacher=session, student=factory, known_by=known)


def _teacher(trained: Trained, teacher: Any, say: Progress) -> Any:
    from delest.verbs.adoption import job_around

    place = trained.place
    if not isinstance(teacher, (str, Path)) and not hasattr(teacher, "path"):
        job = job_around(teacher, place.job)
        assert trained.run.plan is not None
        return backend(job, place.source.schema).session(job, trained.run.plan, place.source.schema)
    folder = runs.find(teacher)
    if runs.read(folder).status != "done":
        raise errors.BadInput(f"the teacher {folder} is {runs.read(folder).status}, not done.")
    found = restore(folder, say)
    refuse(found.place.job, found.place.source.schema, "teaching")
    if found.place.preprocessing != place.preprocessing:
        raise errors.BadInput(
            f"the teacher {folder} was trained on data that are prepared otherwise (other columns, classes or scales): "
            "it must have learnt from the same data and split as the network that is made smaller."
        )
    return found.session


def _checked(trained: Trained, factory: Callable[..., Any]) -> str:
    """The student's layers in words. Raises `BadInput` where it does not build, run or give such answers."""
    from delest.backends.torch.check import check

    place = trained.place
    feed = place.feed("train", place.splits["train"][:32])
    more = next(feed.ordered())
    two = next(place.feed("train", place.splits["train"][:2]).ordered())
    job = replace(place.job, model=factory)
    if faults := check(job, place.source.schema, two, more):
        raise errors.BadInput([f"the student: {fault}" for fault in faults])
    assert trained.run.plan is not None
    weights = backend(job, place.source.schema).session(job, trained.run.plan, place.source.schema).weights()
    return ", ".join(f"{name} {list(array.shape)}" for name, array in weights.items())
