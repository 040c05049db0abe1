"""A teacher or a student of the user's own, in place of the trained network and beside the narrower ones that are cut from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delest import errors, job as jobs, runs
from delest.records.run import Run
from delest.verbs.keras_jobs import refuse
from delest.verbs.training import Trained, digest, restore
from delest.verbs.workplace import backend

if TYPE_CHECKING:
    from delest.job import Job
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
        known["teacher"] = _identity(session, trained.place.first_inputs(2))
    if student is not None:
        factory = student if callable(student) else jobs.load(student).model
        if not callable(factory):
            raise errors.BadInput(f"the student {student} names no model: give a job that has one, or what builds the network.")
        begun = _checked(trained, factory, "student")
        known["student"] = _identity(begun, trained.place.first_inputs(2))
    return Company(teacher=session, student=factory, known_by=known)


def _teacher(trained: Trained, teacher: Any, say: Progress) -> Any:
    import numpy as np

    from delest.verbs.adoption import job_around

    place = trained.place
    if not isinstance(teacher, (Run, str, Path)):
        return _checked(trained, job_around(teacher, place.job).model, "teacher")
    folder = runs.find(teacher)
    status = runs.read(folder).status
    if status != "done":
        raise errors.BadInput(
            f"the teacher {folder} is {status}, not done: finish it with `delest train --out {folder} --resume`."
        )
    found = restore(folder, say)
    refuse(found.place.job, found.place.source.schema, "teaching")
    if found.place.preprocessing != place.preprocessing:
        raise errors.BadInput(
            f"the teacher {folder} was trained on data that are prepared otherwise (other columns, classes or scales; a network that came with "
            "--weights receives values as they are stored): it must have learnt from the same data and split as the network that is made smaller."
        )
    ours, theirs = place.splits, found.place.splits
    same = ours.keys() == theirs.keys() and all(np.array_equal(ours[role], theirs[role]) for role in ours)
    if not same or found.place.source.fingerprint != place.source.fingerprint:
        raise errors.BadInput(
            f"the teacher {folder} was trained on other data or another split (another --seed?): it knows rows by which the narrower networks are judged."
        )
    return found.session


def _checked(trained: Trained, factory: Any, who: str) -> Any:
    """A session with the network of a factory. Raises `BadInput` where it does not build, run or give such answers."""
    from delest.backends.torch.check import check

    place, plan = trained.place, trained.run.plan
    assert plan is not None
    few, more = (next(place.feed("train", place.splits["train"][:rows]).ordered()) for rows in (2, 32))
    job = replace(place.job, model=factory)
    if faults := check(job, place.source.schema, few, more):
        raise errors.BadInput([f"the {who}: {fault}" for fault in faults])
    return backend(job, place.source.schema).session(job, plan, place.source.schema)


def _identity(session: Any, inputs: Any) -> str:
    """What a network is: its weights, its layers in words, and what it answers."""
    import numpy as np

    answers = session.predict(inputs)
    arrays = {"answers": answers} if isinstance(answers, np.ndarray) else {}
    layers = np.frombuffer(repr(session.model).encode(), np.uint8)
    return digest({**session.weights(), **arrays, "layers": layers})
