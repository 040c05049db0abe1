"""Looking before anything is done: at a job's data, at this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from delest import job as jobs
from delest.verbs.workplace import open_workplace

if TYPE_CHECKING:
    from delest.records.hardware import Diagnosis
    from delest.records.run import Summary


def inspect(job: Any) -> Summary:
    """Look at a job's data: what is there, what is wrong with it. Raises `BadInput` with every fault found."""
    from delest.training.progress import Progress

    return open_workplace(jobs.load(job), Progress()).summary


def doctor(*, measure: bool = False, clear_cache: bool = False, deep: bool = False) -> Diagnosis:
    """Versions, processor, memory, GPUs and whether this build of torch can use them, extras, and what to mend.

    With `measure` also the roofline, which takes about six seconds the first time; with `clear_cache` the cache is emptied; with `deep` PyTorch, TensorFlow and JAX,
    where they are installed, each prove that they train on every device that they see.
    Raises `BadInput` for a cache folder that cannot be emptied.
    """
    from delest.hardware.doctor import diagnose

    return diagnose(measure=measure, clear_cache=clear_cache, deep=deep)
