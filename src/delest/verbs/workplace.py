"""A job with its data opened, divided and measured: where every verb starts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delest import errors, metrics
from delest.job import Job
from delest.records.form import read_json, to_json
from delest.records.plan import Plan
from delest.verbs.keras_jobs import is_keras

if TYPE_CHECKING:
    from delest.records.batch import Inputs
    from delest.records.run import Summary
    from delest.records.source import Schema, Target
    from delest.training.loop import Trainer
    from delest.training.progress import Progress

TEXT_BATCH = 32  # windows, where only a text is given


@dataclass
class Workplace:
    """A job, its source, the row numbers of each role and the preprocessing fitted on the training rows."""

    job: Job
    source: Any
    splits: Mapping[str, Any]
    preprocessing: Any
    seconds: dict[str, float] = field(default_factory=dict)

    @cached_property
    def metric(self) -> metrics.Metric:
        target = self.source.schema.target
        judged = self.job.step is None or self.job.predict is not None
        if self.source.schema.is_text:  # a loss of the user's own is no mean over rows, and no bundle gives it
            judged = judged and isinstance(self.job.loss, str)
        return metrics.chosen(self.job.metric, target.kind if target else None, judged)

    @cached_property
    def summary(self) -> Summary:
        from delest.data import summarise

        return summarise(self.source, self.splits)

    def feed(self, role: str, index: Any = None, *, augmented: bool = False) -> Any:
        """The batches of one role, or of the given rows."""
        from delest.data import Feed

        return Feed(
            self.source,
            self.splits[role] if index is None else index,
            self.preprocessing,
            batch_size=self.job.batch_size,
            seed=self.job.seed,
            augment=self.job.recipe.augment if augmented else (),
        )

    def first_inputs(self, rows: int) -> Inputs:
        """So many training rows as the model receives them."""
        return next(iter(self.feed("train", self.splits["train"][:rows]).ordered())).inputs

    def describe_data(self) -> dict[str, Any]:
        """The content of `data.json`."""
        return {
            "fingerprint": self.source.fingerprint,
            "source": self.source.description,
            "split": {role: len(index) for role, index in self.splits.items()},
            "seed": self.job.seed,
        }


def open_workplace(job: Job, say: Progress, folder: Path | None = None) -> Workplace:
    """Open a job's data and fit its preprocessing, or take that of the run in `folder`.

    Raises `BadInput` with every fault of the job's fields and its data together.
    """
    from delest.data import Preprocessing, fit_preprocessing, open_job, split

    started = time.monotonic()
    faults = job.faults()
    source = None
    if job.data is not None:
        try:
            source = open_job(job)
        except errors.BadInput as error:
            faults.extend(error.faults)
    if source is not None:
        faults += _mismatches(job, source)
    if faults or source is None:
        raise errors.BadInput(faults)
    splits = split(source, job.split, job.seed)
    if folder is None:
        job = _with_fitting_batch(job, len(splits["train"]), source.schema.is_text, say)
    if folder is None:
        preprocessing = fit_preprocessing(source, splits["train"], ids=job.model is not None)
    else:
        preprocessing = read_json(Preprocessing, folder / "preprocessing.json")
    say.stage(f"data: {source.description}")
    for left_out in source.left_out[:5]:
        say.note(f"left out: {left_out}")
    if len(source.left_out) > 5:
        say.note(f"and {len(source.left_out) - 5} more left out")
    return Workplace(job, source, splits, preprocessing, {"inspecting": time.monotonic() - started})


def _with_fitting_batch(job: Job, rows: int, is_text: bool, say: Progress) -> Job:
    """Data without a job of its own get a batch that suits them, where the default is too large and nobody set it."""
    if job.model is not None or "batch_size" in job.set_by:
        return job
    if is_text and job.batch_size == Job.batch_size:  # each of a window's tokens is learnt from
        job = replace(job, batch_size=TEXT_BATCH)
        say.note(f"batches of {TEXT_BATCH} windows are taken; --batch-size takes others")
    if job.batch_size <= rows:
        return job
    batch = max(2, rows // 8)
    say.note(f"the default batch of {job.batch_size} rows is larger than the {rows} training rows: {batch} is taken")
    return replace(job, batch_size=batch)


def check_batch(place: Workplace) -> None:
    """Raise `BadInput` where a batch would need more rows than there are to train on."""
    rows = len(place.splits["train"])
    if place.job.batch_size > rows:
        raise errors.BadInput(
            f"the batch of {place.job.batch_size} rows is larger than the {rows} training rows: give --batch-size {rows} or less."
        )


def given_plan(place: Workplace, plan: Plan | str | Path, told: Mapping[str, Any]) -> Plan:
    """A plan that was given, a record or its file, in place of one that is made here.

    Raises `BadInput` for a plan of another batch size, methods that are not known or exclude each other, and for anything
    `told` (by option, None: not given) that the plan says itself.
    """
    from delest import methods

    said = [name for name, value in told.items() if value is not None]
    if said:
        raise errors.BadInput(
            f"{', '.join(f'--{name}' for name in said)}: the plan that was given says so already. Leave it out."
        )
    check_batch(place)
    found = plan if isinstance(plan, Plan) else read_json(Plan, Path(plan))
    if found.batch_size != place.job.batch_size:
        raise errors.BadInput(
            f"the plan is for a batch of {found.batch_size} rows, the job has {place.job.batch_size}: make a new plan."
        )
    if faults := methods.conflicts(methods.configs(found), methods.of_recipe(place.job.recipe)) or _contradictions(found):
        raise errors.BadInput(faults)
    check_device(found.device)
    return found


def _contradictions(plan: Plan) -> list[str]:
    """What an edited plan says twice, and not alike."""
    names = [choice.method for choice in plan.choices]
    found = [f"the plan has the choice {name} more than once." for name in dict.fromkeys(names) if names.count(name) > 1]
    rows = (plan.config("micro_batch") or {}).get("rows", plan.batch_size)
    if isinstance(rows, int) and rows != plan.micro_batch:
        found.append(
            f"the plan's micro_batch is {plan.micro_batch} rows, its choice micro_batch makes it {rows} of {plan.batch_size}: write the same."
        )
    return found


def _mismatches(job: Job, source: Any) -> list[str]:
    """A metric or loss that cannot judge this target; no target where one is needed."""
    target = source.schema.target
    if target is None:
        return (
            []
            if job.step is not None
            else ["the data have no target to learn: name one with --target, or give the Job a `step`."]
        )
    if target.kind == "array":
        return _array_mismatches(job, target)
    faults = []
    if target.kind == "tokens":
        if isinstance(job.metric, str) and job.metric not in ("auto", "loss"):
            faults.append(f"the metric {job.metric} does not judge a text: use loss, the cross-entropy of a token in nats.")
    elif (
        isinstance(job.metric, str)
        and job.metric in metrics.NAMES
        and (job.metric in metrics.OF_NUMBERS) != (target.kind == "number")
    ):
        fit = ", ".join(name for name in metrics.NAMES if (name in metrics.OF_NUMBERS) == (target.kind == "number"))
        faults.append(f"the metric {job.metric} does not judge a {target.kind} target ({target.name}): use one of {fit}.")
    losses = {"number": ("mse", "l1", "huber"), "class": ("cross_entropy", "bce"), "tokens": ("cross_entropy",)}[target.kind]
    if isinstance(job.loss, str) and job.step is None and job.loss not in ("auto", *losses):
        faults.append(
            f"the loss {job.loss} does not fit a {target.kind} target ({target.name}): use one of {', '.join(losses)}."
        )
    return faults


def _array_mismatches(job: Job, target: Target) -> list[str]:
    """What judges single values where a target holds an array a row."""
    what = f"target {target.name!r} holds {'x'.join(map(str, target.shape))} values a row"
    faults = []
    if job.step is None and isinstance(job.loss, str):
        advice = (
            "class numbers, as `targets.argmax(1)` makes them of one-hot rows, or give the Job a `step` or a loss of your own"
        )
        faults.append(f"{what}; the loss {job.loss} needs one: give {advice}.")
    if isinstance(job.metric, str) and (job.metric != "auto" or (job.step is not None and job.predict is not None)):
        faults.append(f"{what}, which the metric {job.metric} does not judge: give a delest.metrics.Metric of your own.")
    return faults


def build_trainer(
    place: Workplace, session: Any, folder: Path, say: Progress, *, rows: Any = None, saving: bool = True
) -> Trainer:
    """The training loop over a workplace; `rows` instead of all training rows, `saving` False for a preview."""
    from delest.training.loop import Trainer

    return Trainer(
        session=session,
        train_feed=place.feed("train", rows, augmented=True),
        validation_feed=place.feed("validation"),
        test_feed=place.feed("test"),
        recipe=place.job.recipe,
        metric=place.metric,
        folder=folder,
        progress=say,
        saving=saving,
    )


def guarded_bytes(plan: Plan) -> int | None:
    """The budget that the guard holds: one that was asked for, of this process's own memory."""
    return plan.memory_bytes if plan.device == "cpu" else None


def preprocessing_json(place: Workplace) -> dict[str, Any]:
    """The preprocessing as JSON, for files and child processes."""
    return to_json(place.preprocessing)


def backend(job: Job, schema: Schema) -> Any:
    """The framework behind a job: Keras where its model is Keras's, else PyTorch."""
    if is_keras(job, schema):
        from delest.frameworks.keras import KerasBackend

        return KerasBackend()
    from delest.backends.torch import TorchBackend

    return TorchBackend()


def check_device(device: str | None) -> None:
    """Raise `BadInput` for a device that is unknown or that this build of torch cannot use, with the remedy."""
    if device in (None, "auto", "cpu"):
        return
    if device != "cuda":
        raise errors.BadInput(f"unknown device {device!r}: use cpu or cuda.")
    from delest.hardware.accelerators import find_accelerators

    found = find_accelerators()
    if not any(gpu.usable for gpu in found):
        why = "; ".join(f"{gpu.name}: {gpu.remedy}" for gpu in found) or "no GPU was found on this machine"
        raise errors.BadInput(f"--device cuda cannot be used: {why}. `delest doctor` says more.")
