"""A network that was trained elsewhere, as a finished run: what makes it smaller, reports and predicts goes on from there."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delest import errors, job as jobs, runs, storage, tensors
from delest.verbs.planning import plan_workplace
from delest.verbs.training import Settings, Trained, began, digest, read_weights, start_folder
from delest.verbs.workplace import backend, open_workplace

if TYPE_CHECKING:
    from delest.training.progress import Progress


def job_around(module: Any, data: Any) -> jobs.Job:
    """A job whose network is a trained module: `data` is a job (its own model is left aside), or anything that a job takes as data.

    Raises `BadInput` where `module` is no torch.nn.Module and no data are given.
    """
    import torch

    if not isinstance(module, torch.nn.Module):
        raise errors.BadInput(
            f"a {type(module).__name__} cannot be made smaller: give a run, its folder, or a trained torch.nn.Module."
        )
    if data is None:
        raise errors.BadInput("a module alone says nothing of its data: give them as well, as in delest.shrink(model, (x, y)).")
    job = data if isinstance(data, jobs.Job) else jobs.Job(data=data, name=type(module).__name__)
    return replace(job, model=lambda: copy.deepcopy(module), origin=None)


def adopt(job: jobs.Job, weights: str | Path | None, *, out: str | Path | None, threads: int | None, say: Progress) -> Trained:
    """Judge the network of a job, with `weights` (safetensors) or those that its factory gives it, and write it down as a run of no step.

    It receives pixels from 0 to 1, and numbers as they are stored: what else it was trained with belongs into its factory.
    Raises `BadInput` for a job that does not work, and weights that do not fit or that nothing can be judged by.
    """
    from delest.data import unscaled
    from delest.training.evaluate import evaluate

    folder = runs.place(out, job.title)
    place = open_workplace(job, say)
    place.preprocessing = unscaled(place.preprocessing)
    given = None if weights is None else read_weights(Path(weights))
    plan = plan_workplace(place, memory=None, device=None, threads=threads, say=say, startable=False)
    session = backend(job, place.source.schema).session(place.job, plan, place.source.schema)
    if given is not None:
        session.load_weights(given)
    folder = start_folder(folder, place, plan, session, Settings(threads=threads, out=out, init_from=weights))
    run = began(folder, place, plan, session, None)
    say.stage(f"judging the network as it is, in {folder}")
    scores = {
        role: evaluate(session, place.feed(role), place.metric).metrics(place.metric) if len(place.splits[role]) else {}
        for role in ("validation", "test")
    }
    with storage.written_atomically(folder / "best.safetensors") as file:
        tensors.write(file, tensors.Under(session.state().arrays, "model."), {"step": "0"})
    scored = replace(run, validation=scores["validation"], test=scores["test"])
    run = replace(scored, status="done", weights_sha256=digest(session.weights()))
    storage.write_json(folder / "run.json", run)
    return Trained(run, place, session)
