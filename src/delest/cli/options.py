"""Options that commands share, made from the fields they set, and how given ones become a job and arguments.

A group maps what an option sets (`recipe.lr`, `memory`) to a parameter of the command line. All defaults are None, not
given: what then holds is said by the job or the verb alone.
"""

from __future__ import annotations

import functools
import inspect
import math
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from delest import errors, job as jobs
from delest.records.form import read_json
from delest.records.plan import Plan
from delest.units import read_seconds, read_share, read_size

Group = Mapping[str, inspect.Parameter]


def option(kind: Any, flag: str, about: str, metavar: str | None = None, *, undo: bool = True) -> inspect.Parameter:
    """One parameter that may be left out; a bool gets `--no-name` too unless `undo` is False, a tuple may be repeated."""
    kind = _without_none(kind)
    name = flag.removeprefix("--").replace("-", "_")
    if get_origin(kind) is tuple:
        kind = list[str]
    declared = f"{flag}/--no-{flag.removeprefix('--')}" if kind is bool and undo else flag
    shown = typer.Option(declared, help=about, metavar=metavar, show_default=False)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, shown])


def _without_none(kind: Any) -> Any:
    if get_origin(kind) in (Union, types.UnionType):
        return next(part for part in get_args(kind) if part is not type(None))
    return kind


_RECIPE_HELP = {
    "optimizer": "adamw, sgd, muon, adadelta, or a class of torch.optim",
    "lr": "learning rate at its highest",
    "weight_decay": "on weights with two dimensions or more",
    "momentum": "of sgd and muon",
    "schedule": ", ".join(jobs.SCHEDULES),
    "warmup": "share of all steps",
    "decay": "share of all steps at the end, with the schedule hold",
    "epochs": "upper bound",
    "patience": "evaluations without a better score before the end begins",
    "clip": "largest norm of the whole gradient",
    "label_smoothing": "of cross_entropy over classes",
    "augment": f"{', '.join(jobs.AUGMENTATIONS)}; repeat it or separate by commas",
    "precision": ", ".join(jobs.PRECISIONS),
    "memory_format": ", ".join(jobs.MEMORY_FORMATS),
}


def _recipe_options() -> Group:
    """One option for each field of `Recipe`; a field without help text here is shown by its name."""
    kinds, defaults = get_type_hints(jobs.Recipe), jobs.Recipe()
    group = {}
    for name in jobs.RECIPE_FIELDS:
        about, default = _RECIPE_HELP.get(name, name.replace("_", " ")), getattr(defaults, name)
        ending = "" if default in (None, ()) else f" [{default}]"
        group[f"recipe.{name}"] = option(kinds[name], f"--{name.replace('_', '-')}", about + ending)
    return group


JOB: Group = {
    "data": option(str, "--data", "folder of images, CSV, Parquet, .npz, .npy or .txt to use instead of the job's", "PATH"),
    "target": option(str, "--target", "column that is to be predicted", "COLUMN"),
    "split.by": option(str, "--split-by", "column that holds roles, groups or times", "COLUMN"),
    "split.kind": option(str, "--split-kind", f"what that column holds: {', '.join(jobs.SPLIT_KINDS)}"),
    "rows": option(int, "--rows", "use only so many rows, a stratified sample"),
    "image_size": option(int, "--image-size", "side in pixels"),
    "skip_bad": option(bool, "--skip-bad", "leave unreadable rows out, or stop at them"),
    "context": option(int, "--context", "tokens of a text that the model sees at once [128]", "TOKENS"),
    "tokenizer": option(str, "--tokenizer", "tokenizer.json for a text, whose tokens are characters without it", "FILE"),
    "batch_size": option(int, "--batch-size", f"effective batch size [{jobs.Job().batch_size}]"),
    "loss": option(str, "--loss", ", ".join(jobs.LOSSES)),
    "metric": option(str, "--metric", "what the model is judged by, as accuracy or rmse"),
    "seed": option(int, "--seed", "of the split, the weights and the order of rows"),
    "name": option(str, "--name", "of the run's folder"),
    **_recipe_options(),
}
TRAINING: Group = {
    "memory": option(str, "--memory", "budget of memory, as 2GiB or 80%", "SIZE"),
    "exact": option(bool, "--exact", "only what keeps the results, bit for bit or to rounding", undo=False),
    "time": option(str, "--time", "budget of time, as 10min; training winds down within it", "TIME"),
    "preview": option(str, "--preview", "train on a share of the rows first, as 5%", "SHARE"),
    "out": option(Path, "--out", "folder of the run [runs/NAME-001, counted up]", "FOLDER"),
    "resume": option(bool, "--resume", "go on with the run in --out, or with the newest unfinished one", undo=False),
    "init_from": option(Path, "--init-from", "safetensors file of weights to begin with", "FILE"),
    "plan": option(Path, "--plan", "follow a plan.json instead of making one", "FILE"),
    "device": option(str, "--device", "cpu or cuda"),
    "threads": option(int, "--threads", "of the processor"),
    "checkpoint_seconds": option(str, "--checkpoint-every", "time between checkpoints, as 60s or 5min", "TIME"),
    "track": option(str, "--track", "tell tensorboard or mlflow too; several separated by commas", "NAMES"),
}
MAX_DROP: Group = {
    "max_drop": option(str, "--max-drop", "largest loss: of accuracy in points, as 0.5%; of an error as a share of it", "LOSS")
}
SMALLER: Group = {
    "latency": option(str, "--latency", "what one row may take, as 5ms", "TIME"),
    "size": option(str, "--size", "what the file may take, as 2MB", "SIZE"),
    "time": option(str, "--time", "for narrower networks, as 10min; 0: none [as long as the training took]", "TIME"),
}
LEARNING: Group = {
    "teacher": option(str, "--teacher", "a finished run on the same data that teaches in place of RUN", "RUN"),
    "student": option(str, "--student", "a job whose model is a student of your own", "JOB"),
}
GIVEN: Group = {
    "weights": option(str, "--weights", "safetensors of a network that was trained elsewhere", "FILE"),
    "out": option(str, "--out", "its run folder [runs/NAME-001, counted up]", "FOLDER"),
}
THREADS: Group = {"threads": TRAINING["threads"]}
JSON = option(bool, "--json", "print one JSON object on standard output, all else on standard error", undo=False)
JobArgument = Annotated[
    str | None, typer.Argument(metavar="JOB", help="file.py, file.py:name, module:name, or a path to data", show_default=False)
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="no progress on standard error", show_default=False)]


def with_options(**groups: Group) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command the options of groups, and `--json`, which `main` acts on.

    The command gets one mapping a group, of those that were given.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        own = [item for item in inspect.signature(command, eval_str=True).parameters.values() if item.name not in groups]
        parameters = [*own, *(item for group in groups.values() for item in group.values()), JSON]

        @functools.wraps(command)
        def call(**values: Any) -> Any:
            given = {
                name: {key: values[item.name] for key, item in group.items() if values[item.name] is not None}
                for name, group in groups.items()
            }
            return command(**{item.name: values[item.name] for item in own}, **given)

        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {item.name: item.annotation for item in parameters}
        return call

    return decorate


def read_job(
    what: str | None, changes: Mapping[str, Any], training: Mapping[str, Any] = MappingProxyType({})
) -> jobs.Job | None:
    """The job of JOB, or of `--data` where JOB is left out, with the given options over it.

    None where a run goes on (`--resume --out FOLDER`): its folder knows the job. Raises `BadInput` where there is no job,
    or where options would change that of a run which goes on.
    """
    text = what or changes.get("data")
    if what is None and training.get("resume") and "out" in training:
        if changes:
            names = ", ".join(_flag(JOB[name]) for name in changes)
            raise errors.BadInput(f"{names}: a run goes on with the settings it began with. Leave them out, or name JOB.")
        return None
    if text is None:
        raise errors.BadInput("JOB is missing: give a file with a job, as in examples/digits.py, or a path to data.")
    given = dict(changes)
    if "recipe.augment" in given:
        words = (word.strip() for item in given["recipe.augment"] for word in item.split(","))
        given["recipe.augment"] = tuple(word for word in words if word)
    for name in ("data", "tokenizer"):  # a run must find its files again from any folder
        if name in given and Path(given[name]).exists():
            given[name] = str(Path(given[name]).resolve())
    return jobs.override(jobs.load(text), given)


def read_training(training: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `train`, `run` and `shrink`: the plan is read, --max-drop and --checkpoint-every are numbers; budgets
    stay as they were written, for the run's records."""
    given, faults = dict(training), list[str]()
    for name, read in _READERS.items():
        if name in given:
            try:
                value = read(given[name])
            except errors.BadInput as error:
                faults.extend(f"{_flag({**TRAINING, **MAX_DROP}[name])}: {fault}" for fault in error.faults)
            else:
                given[name] = given[name] if name in ("memory", "time", "preview") else value
    if faults:
        raise errors.BadInput(faults)
    return given


def _flag(parameter: inspect.Parameter) -> str:
    """The option as it is typed."""
    return "--" + parameter.name.replace("_", "-")


def _read_drop(text: str) -> float:
    """Per cent, or a number in the metric's own unit, which is above 1 for many an rmse."""
    try:
        drop = read_share(text) if "%" in text else float(text)
    except ValueError:
        drop = math.nan
    if not 0 <= drop < math.inf:
        raise errors.BadInput(f"{text!r} is not a loss of the metric: write it as 0.5% or as a number in the metric's unit.")
    return drop


def _read_threads(count: int) -> int:
    if count < 1:
        raise errors.BadInput(f"{count} threads cannot compute: give 1 or more.")
    return count


_READERS: Mapping[str, Callable[[Any], Any]] = {
    "memory": lambda text: read_size(text, whole_bytes=1 << 40),
    "time": read_seconds,
    "preview": read_share,
    "threads": _read_threads,
    "plan": lambda path: read_json(Plan, path),
    "checkpoint_seconds": read_seconds,
    "max_drop": _read_drop,
}
