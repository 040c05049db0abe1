"""The same Keras training on TensorFlow, JAX and torch: one process after the other, from the same weights, on the same batches."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from delest import errors, job as jobs, processes, storage, units
from delest.records.frameworks import PRIORITIES, FrameworkComparison, FrameworkResult
from delest.verbs.keras_jobs import is_keras
from delest.verbs.memory import read_budget
from delest.verbs.workplace import Workplace, backend, build_trainer, check_batch, open_workplace, preprocessing_json

if TYPE_CHECKING:
    from delest.training.progress import Progress

FRAMEWORKS = ("tensorflow", "jax", "torch")
EPOCHS = 3  # that are compared, where the job has more
COMPARED_ROWS = 32  # whose loss is compared
TOLERANCE = 1e-3  # of a loss, and of the largest value that a layer gives; frameworks sum in another order
LONGEST_SECONDS = 24 * 3600.0
CLOSE = 0.1  # to the soonest: trained again, since trainings differ so much from one time to the next
TRAININGS, AGAIN_SECONDS = 3, 60.0  # of frameworks that are close, where one takes no longer
INSTALLED_BY = {"tensorflow": "pip install tensorflow", "jax": "pip install jax", "torch": "pip install torch"}


def compare(
    job: Any,
    *,
    backends: Sequence[str] | str | None = None,
    epochs: int | None = None,
    priority: Literal["time", "memory"] = "time",
    memory: str | int | None = None,
    say: Progress | None = None,
) -> FrameworkComparison:
    """Train a Keras job for a few epochs on each framework, and say which to take.

    All begin with the same weights and see the same batches in the same order, by the same schedule, each in a process of its own, one after the other.
    `backends` are names (a sequence or "tensorflow,jax,torch"; None: those that are installed), `epochs` how many are trained (None: the job's, at
    most three). Recommended is, by `priority`, what would train all of the job's epochs soonest or took the least memory, among those that kept `memory`
    (bytes, "2GiB"). Those within a tenth of the soonest are trained three times where that takes less than a minute each, and judged by their medians.

    Raises `BadInput` for a job that is not Keras's or in no file, and for a framework that is unknown; `MissingExtra` for one that is not installed.
    """
    from delest.training.progress import Progress

    say, names = say or Progress(), _named(backends)
    if priority not in PRIORITIES:
        raise errors.BadInput(jobs.unknown("priority", str(priority), PRIORITIES))
    if epochs is not None and (not isinstance(epochs, int) or epochs < 1):
        raise errors.BadInput(f"{epochs!r} epochs cannot be compared: give 1 or more.")
    budget = read_budget(memory)
    if "keras" not in sys.modules:
        os.environ.setdefault("KERAS_BACKEND", names[0])  # which is installed: the job's file loads it
    place = open_workplace(jobs.load(job), say)
    if not is_keras(place.job, place.source.schema):
        raise errors.BadInput(
            "frameworks are compared for a job whose model is Keras's (`Job(model=...)` with a factory of a keras.Model, or a .keras file): "
            "this one's is torch's, which runs on PyTorch alone."
        )
    if place.job.origin is None:
        raise errors.BadInput("a job given as Python objects cannot be trained in another process: put it in a file.")
    check_batch(place)
    feed = place.feed("train")
    whole = place.job.recipe.epochs_for(len(feed), feed.batch_size)
    trained = epochs or min(EPOCHS, whole)
    if trained == 1 < whole:
        raise errors.BadInput(
            f"1 epoch of {whole} does not tell what compiling takes from what epochs do: give --epochs 2 or more."
        )
    with tempfile.TemporaryDirectory(prefix="delest-") as folder:
        took: dict[str, float] = {}

        def tried(name: str, which: str) -> FrameworkResult:
            say.stage(f"compare: {trained} of {whole} epochs with Keras on {name} ({which})")
            began = time.monotonic()
            result = _tried(place, name, Path(folder), trained, whole, say)
            took[name] = time.monotonic() - began
            return result

        found = {name: [tried(name, f"{number} of {len(names)}")] for number, name in enumerate(names, 1)}
        again = close([one for (one,) in found.values()], budget) if priority == "time" else []
        if any(took[name] > AGAIN_SECONDS for name in again):
            again = []
        for number in range(2, TRAININGS + 1):
            for name in again:
                found[name].append(tried(name, f"its times are close to another's: training {number} of {TRAININGS}"))
        results = _compared([_middle(trainings) for trainings in found.values()], Path(folder))
    recommended, why = recommend(results, priority, budget)
    return FrameworkComparison(
        results=results,
        recommended=recommended,
        why=why,
        priority=priority,
        memory_bytes=budget,
        metric=place.metric.name,
        higher_is_better=place.metric.higher_is_better,
        epochs=trained,
        whole_epochs=whole,
        batch_size=feed.batch_size,
        steps=feed.steps,
    )


def recommend(results: Sequence[FrameworkResult], priority: str, budget: int | None) -> tuple[str | None, str]:
    """The framework to take, and why: the soonest or the smallest of those that trained within the budget."""
    trained = [one for one in results if one.ok]
    fitting = [one for one in trained if budget is None or (one.peak_bytes or 0) <= budget]
    if not trained:
        return None, "none trained the job"
    if not fitting:
        least = min(one.peak_bytes or 0 for one in trained)
        return (
            None,
            f"none stays within {units.format_bytes(budget or 0)}: the least that one took is {units.format_bytes(least)}",
        )

    def cost(one: FrameworkResult) -> float:
        return float((one.whole_seconds if priority == "time" else one.peak_bytes) or 0)

    best = min(fitting, key=cost)
    others = [cost(one) for one in fitting if one is not best]
    if not others:
        return best.name, "the only one that fits" if len(trained) > 1 else "the only one that trained the job"
    if priority == "time":
        second = min((one for one in fitting if one is not best), key=cost)
        even = len(best.whole_seconds_of) > 1 and max(best.whole_seconds_of) > min(second.whole_seconds_of, default=math.inf)
        if even:
            spans = [f"{min(one.whole_seconds_of):.3g} to {max(one.whole_seconds_of):.3g} s" for one in (best, second)]
            return best.name, f"level with {second.name}: {' and '.join(spans)} in {len(best.whole_seconds_of)} trainings each"
        return best.name, f"{cost(second) / max(1e-9, cost(best)):.3g} times as fast as the next"
    return best.name, f"{1 - cost(best) / min(others):.0%} less memory than the next"


def close(results: Sequence[FrameworkResult], budget: int | None) -> list[str]:
    """The frameworks to train again, as one training each does not tell which is the soonest."""
    fitting = [one for one in results if one.ok and (budget is None or (one.peak_bytes or 0) <= budget)]
    soonest = min((one.whole_seconds or 0.0 for one in fitting), default=0.0)
    near = [one for one in fitting if (one.whole_seconds or 0.0) <= (1 + CLOSE) * soonest]
    return [one.name for one in near] if len(near) > 1 else []


def _middle(trainings: Sequence[FrameworkResult]) -> FrameworkResult:
    """The training in the middle of those on one framework, or one that failed."""
    failed = [one for one in trainings if not one.ok]
    if failed or len(trainings) == 1:
        return (failed or trainings)[0]
    ordered = sorted(trainings, key=lambda one: one.whole_seconds or 0.0)
    return replace(ordered[len(ordered) // 2], whole_seconds_of=tuple(one.whole_seconds or 0.0 for one in trainings))


def _named(backends: Sequence[str] | str | None) -> tuple[str, ...]:
    """The frameworks to compare. Raises `BadInput` and `MissingExtra`."""
    if importlib.util.find_spec("keras") is None:
        raise errors.MissingExtra("frameworks are compared through Keras, which is not installed: pip install 'delest[keras]'.")
    if backends is None:
        found = tuple(name for name in FRAMEWORKS if importlib.util.find_spec(name) is not None)
        return found or ("torch",)  # whose absence is then said
    given = backends.split(",") if isinstance(backends, str) else list(backends)
    names = tuple(dict.fromkeys(word.strip().lower() for word in given if word.strip()))
    if not names:
        raise errors.BadInput(f"no framework is named: give some of {', '.join(FRAMEWORKS)}.")
    for name in names:
        if name not in FRAMEWORKS:
            raise errors.BadInput(jobs.unknown("framework", name, FRAMEWORKS))
        if importlib.util.find_spec(name) is None:
            raise errors.MissingExtra(f"{name} is not installed: {INSTALLED_BY[name]}, or leave it out of --backends.")
    return names


def _tried(place: Workplace, name: str, folder: Path, epochs: int, whole: int, say: Progress) -> FrameworkResult:
    """The training on one framework; a fault of it is in the result, for the others are still worth comparing."""
    began = time.time()
    shutil.rmtree(folder / name, ignore_errors=True)  # of an earlier training
    try:
        with processes.begin(
            "delest.verbs.comparing:train_under",
            place.job,
            environment={"KERAS_BACKEND": name},
            name=name,
            folder=str(folder),
            preprocessing=preprocessing_json(place),
            epochs=epochs,
            began=began,
        ) as running:
            _follow(running.process, folder / name / "metrics.jsonl", say)
            answer = running.answer(LONGEST_SECONDS)
    except errors.DelestError as error:
        say.note(f"{name} did not train the job: {error}")
        return FrameworkResult(name=name, fault=str(error))
    steps = place.feed("train").steps
    step, evaluation = answer["step_seconds"], answer["evaluation_seconds"]
    seconds = answer["start_seconds"] + answer["compile_seconds"] + whole * (steps * step + evaluation)
    return FrameworkResult(name=name, whole_seconds=seconds, **answer)


def _follow(process: Any, path: Path, say: Progress) -> None:
    """Show each epoch of a training as it ends, until its process does."""
    shown = 0
    while process.poll() is None:
        time.sleep(0.2)
        rows = [row for row in storage.read_lines(path) if row["kind"] == "validation"]
        for row in rows[shown:]:
            say.note(f"epoch {row['epoch']:g}: validation score {row['score']:.4g}")
        shown = len(rows)


def train_under(
    job: jobs.Job, *, name: str, folder: str, preprocessing: dict[str, Any], epochs: int, began: float
) -> dict[str, Any]:
    """Train a Keras job on the framework that this process has; called through `delest.processes`. Returns fields of a `FrameworkResult`.

    The first process leaves its weights in `folder`, the others begin with them; each leaves what its layers give, in `NAME.npz`.
    """
    from delest import tensors
    from delest.frameworks.keras.layers import leave_answers
    from delest.hardware import machine
    from delest.records.plan import Plan
    from delest.training.loop import Limits
    from delest.training.progress import Progress

    place = _workplace(
        replace(job, recipe=replace(job.recipe, epochs=epochs, patience=max(epochs, job.recipe.patience))), preprocessing
    )
    under = backend(place.job, place.source.schema)
    under.warm()
    idle = machine.resident_bytes()
    plan = Plan(batch_size=place.job.batch_size, micro_batch=place.job.batch_size)
    session = under.session(place.job, plan, place.source.schema)
    weights = Path(folder, "weights.safetensors")
    if weights.exists():
        session.load_weights(tensors.Arrays(weights))
    else:
        with storage.written_atomically(weights) as file:
            tensors.write(file, session.weights())
    looking = time.time()
    first_loss = leave_answers(session, place.feed("train", place.splits["train"][:COMPARED_ROWS]), Path(folder, f"{name}.npz"))
    looked = time.time() - looking  # which no training does
    own = Path(folder, name)
    own.mkdir()
    trainer = build_trainer(place, session, own, Progress())
    trainer.limits = Limits(checkpoint_seconds=LONGEST_SECONDS)
    spans = _watched(session)
    ready, begun = time.time(), time.monotonic()
    trainer.train()
    ended = time.monotonic()
    p, steps = trainer.position, place.feed("train").steps
    last = spans[-steps:]
    gaps = [after[0] - before[0] for before, after in pairwise(last)]
    if epochs == 1:  # of one: its first step compiles
        gaps = [statistics.median(gaps[1:])] if len(gaps) > 1 else []
    step = statistics.mean(gaps or [last[-1][1] - last[-1][0]])
    epoch = ended - last[0][0] if epochs > 1 else steps * step + p.evaluating_seconds
    return {
        "versions": under.versions(),
        "start_seconds": ready - began - looked,
        "compile_seconds": max(0.0, ended - begun - epochs * epoch),
        "step_seconds": step,
        "evaluation_seconds": max(0.0, epoch - steps * step),
        "peak_bytes": machine.peak_resident_bytes(),
        "runtime_bytes": idle,
        "first_loss": first_loss,
        "validation": p.validation or {},
    }


def _workplace(job: jobs.Job, preprocessing: dict[str, Any]) -> Workplace:
    from delest.data import Preprocessing, open_job, split
    from delest.records.form import from_json

    source = open_job(job)
    return Workplace(job, source, split(source, job.split, job.seed), from_json(Preprocessing, preprocessing))


def _watched(session: Any) -> list[tuple[float, float]]:
    """The moments at which steps begin and end, from now on."""
    step: Callable[..., Any] = session.step
    spans: list[tuple[float, float]] = []

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.monotonic()
        found = step(*args, **kwargs)
        spans.append((began, time.monotonic()))
        return found

    session.step = timed
    return spans


# Agreement


def _compared(found: list[FrameworkResult], folder: Path) -> tuple[FrameworkResult, ...]:
    """Results with what differs from the first framework that trained the job."""
    trained = [one for one in found if one.ok]
    if not trained:
        return tuple(found)
    first, results = trained[0], []
    for one in found:
        if one.ok and one is not first:
            assert one.first_loss is not None
            assert first.first_loss is not None
            difference = abs(one.first_loss - first.first_loss) / max(1e-6, abs(first.first_loss))
            at = None
            if not difference <= TOLERANCE:  # NaN too
                at = first_difference(folder / f"{first.name}.npz", folder / f"{one.name}.npz") or "the loss"
            one = replace(one, loss_difference=difference, differs_at=at)
        results.append(one)
    return tuple(results)


def first_difference(first: Path, second: Path) -> str | None:
    """The first layer that gives something else in the second file, in words; None where all agree within the tolerance."""
    import numpy as np

    with np.load(first) as one, np.load(second) as other:
        for number, (name, its) in enumerate(zip(one["names"], other["names"], strict=False)):
            if name != its:
                return f"{name} (where the other runs {its})"
            a, b = one[f"a{number}"], other[f"a{number}"]
            if a.shape != b.shape:
                return f"{name} (shapes {a.shape} and {b.shape})"
            if not np.allclose(a, b, rtol=0, atol=TOLERANCE * max(1e-6, float(np.abs(a).max(initial=0.0)))):
                return str(name)
    return None
