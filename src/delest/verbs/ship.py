"""After training: make the model smaller, report, predict."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delest import errors, job as jobs, runs, storage, units
from delest.records.form import read_json
from delest.records.run import Run
from delest.records.shrunk import Shrunk
from delest.verbs.keras_jobs import is_keras, refuse
from delest.verbs.teaching import Company, company
from delest.verbs.training import Trained, read_weights, restore
from delest.verbs.workplace import backend

if TYPE_CHECKING:
    from delest.shrinking.acceptance import Wish
    from delest.shrinking.journal import Journal
    from delest.training.progress import Progress

EPOCHS = 10  # for narrower networks of one that was trained elsewhere, where no time is given


def shrink(
    run: Run | str | Path | Any,
    data: Any = None,
    *,
    weights: str | Path | None = None,
    out: str | Path | None = None,
    max_drop: float = 0.005,
    latency: str | float | None = None,
    size: str | int | None = None,
    time: str | float | None = None,
    threads: int | None = None,
    teacher: Run | str | Path | Any = None,
    student: jobs.Job | str | Path | Callable[..., Any] | None = None,
    say: Progress | None = None,
) -> Shrunk:
    """Make a trained model smaller and faster: prune and distil it within `time`, quantise, and ship what pays inside `max_drop`.

    `run` is a finished run, or what was trained elsewhere: a trained module with `data` (a `Job`, or what a job takes as data), or a `Job` (or its name) with
    `weights`, a safetensors file. That becomes a run of its own, in `out`; its network receives pixels from 0 to 1, and numbers as they are stored.
    `max_drop` is the largest loss of the metric that the one-sided 95 % confidence bound on the selection split may allow: in
    its own unit (0.005 is half a point of accuracy), or as a share of the score for errors such as rmse. `latency` ("5ms", seconds) is what one row may take, `size` ("2MB", bytes)
    what the file may. `time` ("10min", seconds; None: as long as the training took) is for narrower networks; with 0 there are none.
    `teacher` is who teaches in place of the trained network: a run on the same data, or a trained module. `student`, a factory or a job that has one, builds a network
    of your own, which learns first and ships where it pays; `delest.load` then wants that factory.
    Begun again in the same run, it goes on where it was interrupted.

    Raises `BadInput` where `run` is neither, `CheckFailed` where the exported
    model does not answer like the trained one, `AccuracyNotMet` where nothing inside `max_drop` is as fast and small as was wished, `Interrupted`.
    """
    from delest.shrinking.acceptance import Wish
    from delest.training.progress import for_terminal

    say = say or for_terminal()
    wish = Wish(
        latency_seconds=None if latency is None else units.read_seconds(latency),
        size_bytes=None if size is None else units.read_size(size),
    )
    trained = _trained(run, data, weights, out, threads, say)
    folder, epoch = trained.run.path, _epoch_seconds(trained)
    if teacher is not None or student is not None:
        refuse(trained.place.job, trained.place.source.schema, "a teacher or a student")
    if time is None:
        seconds = trained.run.seconds.get("training", 0.0) or EPOCHS * epoch
    else:
        seconds = 0.0 if time in (0, "0") else units.read_seconds(time)
    if (teacher is not None or student is not None) and not (seconds and len(trained.place.splits["validation"])):
        raise errors.BadInput(
            "a teacher and a student take time and validation rows: leave out --time 0, or --teacher and --student."
        )
    try:
        others = company(trained, teacher, student, say)
        shrunk = shrink_trained(trained, max_drop=max_drop, threads=threads, say=say, seconds=seconds, wish=wish, others=others)
    except errors.AccuracyNotMet:
        report(folder)
        raise
    except errors.Interrupted as stopped:
        given = {"latency": latency, "size": size, "time": time, "threads": threads, "teacher": teacher, "student": student}
        raise errors.Interrupted(stopped.signal_number, _again(folder, max_drop=max_drop, **given)) from None
    report(folder)
    return shrunk


def _trained(
    run: Any, data: Any, weights: str | Path | None, out: str | Path | None, threads: int | None, say: Progress
) -> Trained:
    """What is to be made smaller: a finished run, or what becomes one."""
    from delest.verbs.adoption import adopt, job_around

    if weights is not None:
        return adopt(jobs.load(run), weights, out=out, threads=threads, say=say)
    if not isinstance(run, (Run, str, Path)):
        return adopt(job_around(run, data), None, out=out, threads=threads, say=say)
    if data is not None or out is not None:
        raise errors.BadInput(
            "a run has its data and its folder: `data`, `weights` and `out` are for what was trained elsewhere."
        )
    folder = runs.find(run)
    status = runs.read(folder).status
    if status == "diverged":
        raise errors.BadInput(
            f"{folder} diverged, and its settings stay: start a new run with a lower --lr, or with --clip 1.0."
        )
    if status != "done":
        raise errors.BadInput(f"{folder} is {status}, not done: finish it with `delest train --out {folder} --resume`.")
    return restore(folder, say)


def _epoch_seconds(trained: Trained) -> float:
    """Of training: as it was, or of what was trained elsewhere as it is planned."""
    run = trained.run
    if run.epochs:
        return run.seconds.get("training", 0.0) / run.epochs
    assert run.plan is not None
    predicted = run.plan.predicted
    step = None if predicted is None else predicted.step_seconds
    return (step or 0.0) * trained.place.feed("train").steps


def _again(folder: Path, **given: Any) -> str:
    """The command that goes on with an interrupted shrink: with the same wishes, or its journal would begin anew."""
    said = {name: value for name, value in given.items() if isinstance(value, (str, Path, int, float))}  # no objects
    options = (f" --{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in said.items())
    return f"delest shrink {shlex.quote(str(folder))}{''.join(options)}"


def shrink_trained(
    trained: Trained,
    *,
    max_drop: float,
    threads: int | None,
    say: Progress,
    seconds: float = 0.0,
    wish: Wish | None = None,
    others: Company | None = None,
) -> Shrunk:
    """`shrink` for a training that is still in memory; narrower networks are made for `seconds`."""
    from delest.hardware import machine
    from delest.shrinking.acceptance import Wish
    from delest.shrinking.pipeline import shrink_run

    place, run, here = trained.place, trained.run, machine.describe()
    if place.job.step is not None and place.job.predict is None:
        raise errors.BadInput(
            "this job has a `step` and no `predict`: give the Job a `predict(model, inputs)`, so that there is an output to export."
        )
    say.stage("shrink: exporting, quantising and measuring on this machine")
    # Without VNNI, int8 products of pairs are added in 16 bits and saturate: weights then get 7 bits (docs/log.md).
    reduce_range = not {"avx512_vnni", "avx_vnni", "amx_int8"} & set(here.instruction_sets)
    used = threads or (run.plan.threads if run.plan and run.plan.threads else here.cores)
    try:
        shrunk = shrink_run(
            folder=run.path,
            session=trained.session,
            backend=backend(place.job, place.source.schema),
            feeds={role: place.feed(role) for role in place.splits},
            preprocessing=place.preprocessing,
            metric=place.metric,
            weights=trained.session.weights(),
            name=run.name,
            max_drop=max_drop,
            threads=used,
            reduce_range=reduce_range,
            say=say.note,
            ladder=_ladder(trained, seconds, used, others or Company(), say)
            if seconds and len(place.splits["validation"])
            else None,
            wish=wish or Wish(),
            processor=here.processor,
        )
    finally:
        if (run.path / "shrunk" / "shrink.json").exists():
            done = read_json(Shrunk, run.path / "shrunk" / "shrink.json")
            spent = sum(done.seconds.values()) + sum(stage.seconds for stage in done.stages)
            storage.write_json(
                run.path / "run.json", replace(runs.read(run.path), seconds={**runs.read(run.path).seconds, "shrinking": spent})
            )
    return shrunk


def _ladder(trained: Trained, seconds: float, threads: int, others: Company, say: Progress) -> Any:
    """What makes the ladder of narrower networks, once the pipeline knows what may be lost."""
    from delest.shrinking.ladder import Ladder

    place, run = trained.place, trained.run
    plan = run.plan
    assert plan is not None
    epoch = _epoch_seconds(trained)

    def ladder(journal: Journal, network: Any, judging: Any, allowed: float) -> Ladder:
        return Ladder(
            journal=journal,
            trained=network,
            backend=backend(place.job, place.source.schema),
            job=place.job,
            plan=plan,
            feeds={role: place.feed(role, augmented=role == "train") for role in place.splits},
            judging=judging,
            metric=place.metric,
            allowed=allowed,
            seconds=seconds,
            epoch_seconds=epoch,
            threads=threads,
            say=say,
            weights_sha256=run.weights_sha256,
            teacher=others.teacher,
            student=others.student,
            known_by=others.known_by,
        )

    return ladder


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
        hardware=machine.describe_for_report(),
    )


def predict(bundle: str | Path, inputs: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Answers of an exported bundle for new inputs: images, folders of images, arrays, tables or texts.

    `bundle` is a bundle's folder or a run's (what it shipped is taken). Each answer has `input`, and `label` with its
    `probability` (of a text: the token that comes next, and the `loss` of those before), or `value`. Raises `BadInput` naming every input that cannot be read.
    """
    from delest import bundle as bundles
    from delest.bundle.inputs import predict_rows

    paths = [Path(item) for item in inputs]
    return predict_rows(bundles.load(_bundle_folder(Path(bundle), paths)), paths)


def load(path: str | Path, factory: Callable[..., Any] | None = None) -> Any:
    """The trained network of a run or a bundle, a torch module in evaluation mode or a keras.Model, narrower where it was made so; nothing is unpickled. Of a run that was
    not shrunk, or that cannot be exported, it is the network with its best weights.

    `factory` builds the network as it was before (None: the factory of the run's job). Raises `BadInput` where there are no weights, no
    factory is known, or it builds another network.
    """
    from delest.data import Preprocessing
    from delest.records.form import from_json, read_object

    given = Path(path)
    places = [given, given / "shrunk", given / "bundle"]
    if (given / "bundle.json").exists():  # a form of the trained network, whose weights are those of the run's bundle
        places += [parent / "bundle" for parent in given.resolve().parents[:2]]
    folder = next((one for one in places if (one / "weights.safetensors").exists()), given)
    if (folder / "weights.safetensors").exists():
        weights, preprocessing = folder / "weights.safetensors", read_object(folder / "bundle.json")["preprocessing"]
    elif (folder / "best.safetensors").exists() and (folder / "preprocessing.json").exists():
        weights, preprocessing = folder / "best.safetensors", read_object(folder / "preprocessing.json")
    else:
        raise errors.BadInput(f"{given} holds no weights: give a run that was trained, or its bundle/ or shrunk/ folder.")
    schema = from_json(Preprocessing, preprocessing).schema
    if factory is not None:
        if not callable(factory):
            raise errors.BadInput(
                f"a {type(factory).__name__} builds no network: give a factory, as in delest.load({str(given)!r}, MyNet)."
            )
        job = jobs.Job(model=factory, data="")
    else:
        run = next((one for one in (given, *given.resolve().parents[:2]) if (one / "job.json").exists()), None)
        if run is None:
            raise errors.BadInput(
                f"{given} belongs to no run: say what builds the network, as in delest.load({str(given)!r}, MyNet)."
            )
        job = runs.job_of(run, None)
    architecture = folder / "architecture.json"
    changed = read_object(architecture) if architecture.exists() else {}
    if "student" in changed and factory is None:
        raise errors.BadInput(
            f"{given} is a student of your own: say what builds it, as in delest.load({str(given)!r}, MyStudent)."
        )
    if is_keras(job, schema):
        return _keras_model(job, schema, changed, read_weights(weights))
    from delest.backends.torch import model as models
    from delest.backends.torch.pruning.architecture import rebuild

    model = models.build(job, schema)
    if "tensors" in changed:
        model = rebuild(model, changed)
    import torch

    model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in read_weights(weights).items()})
    return model.eval()


def _keras_model(job: jobs.Job, schema: Any, changed: dict[str, Any], weights: Any) -> Any:
    from delest.records.plan import Plan

    keras = backend(job, schema)
    if "tensors" in changed:
        job = keras.narrower(job, schema, changed)
    session = keras.session(job, Plan(batch_size=job.batch_size, micro_batch=job.batch_size), schema)
    session.load_weights(weights)
    return session.model


def _bundle_folder(folder: Path, needed: Sequence[Path]) -> Path:
    """The bundle that a folder is or holds; a trained run without one is exported first, where all that is `needed` then exists."""
    if (folder / "bundle.json").exists():
        return folder
    for name in ("shrunk", "bundle"):
        if (folder / name / "bundle.json").exists():
            return folder / name
    if not (folder / "job.json").exists():
        reason = "it does not exist" if not folder.exists() else "it has neither bundle.json nor job.json"
        raise errors.BadInput(f"{folder} holds no bundle and no run: {reason}.")
    if missing := [f"{path} does not exist (looked in {Path.cwd()})." for path in needed if not path.exists()]:
        raise errors.BadInput(missing)
    shrink(folder, time=0)
    return folder / "shrunk"
