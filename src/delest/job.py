"""What the user brings: model, data, loss, metric and training settings as one `Job`; how a file becomes one."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from delest import errors
from delest.records.form import to_plain

SCHEDULES = ("hold", "cosine", "constant")
PRECISIONS = ("auto", "fp32", "bf16")
MEMORY_FORMATS = ("auto", "contiguous", "channels_last")
LOSSES = ("auto", "cross_entropy", "mse", "l1", "huber", "bce")
AUGMENTATIONS = ("flip", "crop", "erase", "noise", "dropout")
SPLIT_KINDS = ("role", "group", "time")
_KERAS = ("keras", "tensorflow", "jax")  # what the extra brings


@dataclass(frozen=True, kw_only=True)
class Split:
    """How rows are divided. Shares are of all rows; a role that the data bring themselves is left as it is.

    `by` names a column that holds roles (train, validation, selection, test), groups (kept together) or times (test
    is the latest); `kind` says which, None guesses from the values.
    """

    train: float = 0.7
    validation: float = 0.1  # decides when to stop
    selection: float = 0.1  # decides which smaller model is accepted
    test: float = 0.1  # decides nothing
    by: str | None = None
    kind: str | None = None

    def faults(self) -> list[str]:
        shares = {name: getattr(self, name) for name in ("train", "validation", "selection", "test")}
        found = [f"split: {fault}" for name, share in shares.items() for fault in _number_faults(name, share, 0.0, 1.0)]
        if not found and not 0.999 <= sum(shares.values()) <= 1.001:
            found.append(f"split: the shares add up to {sum(shares.values()):g}; they must make 1.")
        if self.train == 0:
            found.append("split: there must be rows to train on (train > 0).")
        if self.kind is not None and self.kind not in SPLIT_KINDS:
            found.append(unknown("split kind", self.kind, SPLIT_KINDS))
        return found


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Training settings. None means: delest's default for this optimizer or this data."""

    optimizer: str = "adamw"  # adamw, sgd (with Nesterov momentum), muon, adadelta, or a class of torch.optim by name
    lr: float | None = None  # at its highest; the default depends on the optimizer
    weight_decay: float | None = None  # only on weights with two dimensions or more
    momentum: float | None = None  # of sgd and muon
    schedule: str = "hold"  # hold: warm-up, hold, linear decay to zero; cosine; constant
    warmup: float = 0.05  # share of all steps
    decay: float = 0.2  # share of all steps at the end (hold)
    epochs: int | None = None  # an upper bound; None: at least 5 and at least 500 steps, at most 50
    patience: int = 3  # evaluations without a better score before the decay starts
    clip: float | None = None  # largest norm of the whole gradient
    label_smoothing: float = 0.1  # of cross_entropy over classes (not of texts), in training only (why it is on: docs/log.md)
    augment: tuple[str, ...] = ()  # flip, crop, erase (images); noise, dropout (tables)
    precision: str = "auto"  # auto: bf16 only where a probe on this machine gains
    memory_format: str = "auto"  # auto: channels_last only where a probe on this machine gains

    def faults(self) -> list[str]:
        found = []
        for name, high in (
            ("lr", math.inf),
            ("weight_decay", math.inf),
            ("momentum", 1.0),
            ("warmup", 1.0),
            ("decay", 1.0),
            ("clip", math.inf),
            ("label_smoothing", 1.0),
        ):
            if getattr(self, name) is not None or getattr(Recipe, name) is not None:
                found.extend(_number_faults(name, getattr(self, name), 0.0, high))
        found.extend(_count_faults("patience", self.patience))
        if self.epochs is not None:
            found.extend(_count_faults("epochs", self.epochs))
        if self.lr == 0:
            found.append("lr is 0: nothing would be learnt. Leave it out for the default.")
        if not isinstance(self.optimizer, str):
            found.append(f"optimizer is a {type(self.optimizer).__name__}: give its name, as in optimizer='adamw'.")
        for name, known in (("schedule", SCHEDULES), ("precision", PRECISIONS), ("memory_format", MEMORY_FORMATS)):
            if getattr(self, name) not in known:
                found.append(unknown(name.replace("_", " "), getattr(self, name), known))
        if not isinstance(self.augment, (tuple, list)):
            found.append(f"augment is {self.augment!r}: give a tuple of names, as in augment=('flip',).")
        else:
            found.extend(unknown("augmentation", name, AUGMENTATIONS) for name in self.augment if name not in AUGMENTATIONS)
        return found

    def epochs_for(self, rows: int, batch_size: int) -> int:
        """The upper bound in epochs: the one that was set, or at least 5 and at least 500 steps, at most 50."""
        if self.epochs is not None:
            return self.epochs
        steps = math.ceil(rows / batch_size)
        return min(50, max(5, math.ceil(500 / steps)))


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training job. `Batch` inputs reach the model as `records.source.Schema` says.

    A `model` of None lets delest choose a starter model by the data. `step(model, batch)` returns the mean loss of a
    batch and replaces `loss` (detectors, several inputs): the batch's `inputs` and `targets` are tensors there.
    `predict(model, inputs)` gives what metric and export see where that is not simply the model's output.
    """

    model: Callable[..., Any] | str | Path | None = None  # a factory, or a `.keras` file
    data: Any = None  # path, Source, (inputs, targets), or a mapping of arrays with `target` naming one
    target: str | None = None
    split: Split = Split()
    loss: str | Callable[..., Any] = "auto"
    step: Callable[..., Any] | None = None
    predict: Callable[..., Any] | None = None
    metric: Any = "auto"
    batch_size: int = 128  # the effective, global one
    recipe: Recipe = Recipe()
    seed: int = 0
    rows: int | None = None  # use only so many rows, a stratified sample
    image_size: int | None = None  # side in pixels; None: the median side, at most 224
    skip_bad: bool = False  # leave out unreadable files instead of stopping at them
    context: int | None = None  # tokens of a text that the model sees at once; None: 128
    tokenizer: str | None = None  # tokenizer.json of the package tokenizers; None: each character is a token
    name: str | None = None
    origin: str | None = None  # "file.py:name": how a child process rebuilds it
    set_by: dict[str, str] = field(default_factory=dict)  # field: "command line"; all else is the file's or the default

    def faults(self) -> list[str]:
        """Faults that can be seen without opening the data or building the model."""
        found: list[str] = []
        for part, kind in ((self.split, Split), (self.recipe, Recipe)):
            if isinstance(part, kind):
                found += part.faults()
            else:
                found.append(f"{kind.__name__.lower()} is a {type(part).__name__}: give a delest.{kind.__name__}(...).")
        if self.data is None:
            found.append("data is missing: give a path, arrays or a Source (on the command line: --data PATH).")
        if isinstance(self.loss, str) and self.loss not in LOSSES:
            found.append(unknown("loss", self.loss, LOSSES))
        code = {"loss": self.loss, "step": self.step, "predict": self.predict}
        for name, value in code.items():
            if not callable(value) and not isinstance(value, str if name == "loss" else type(None)):
                found.append(f"{name} is a {type(value).__name__}: give a function.")
        found.extend(self._metric_faults())
        found.extend(_count_faults("batch size", self.batch_size))
        for name in ("rows", "image_size", "context"):
            if getattr(self, name) is not None:
                found.extend(_count_faults(name.replace("_", " "), getattr(self, name)))
        found.extend(_count_faults("seed", self.seed, least=0))
        if isinstance(self.model, (str, Path)):
            found.extend(_file_faults(Path(self.model)))
        elif self.model is not None and not callable(self.model):
            found.append(
                f"model is a {type(self.model).__name__}, not a factory: give a function that builds it "
                "(`model=MyNet`, not `model=MyNet()`), so that runs start alike and child processes can build it."
            )
        elif _is_module(self.model):
            found.append(
                "model is a built network: give the function or class that builds it (`model=MyNet`, not `model=MyNet()`)."
            )
        return found

    def _metric_faults(self) -> list[str]:
        from delest import metrics

        if isinstance(self.metric, str):
            known = ("auto", "loss", *metrics.NAMES)
            return [] if self.metric in known else [unknown("metric", self.metric, known[1:])]
        needed = ("name", "higher_is_better", "rows", "init", "update", "compute")
        missing = [name for name in needed if not hasattr(self.metric, name)]
        kind = type(self.metric).__name__
        return [f"metric is a {kind} without {', '.join(missing)}: give a name or a delest.metrics.Metric."] if missing else []

    @property
    def title(self) -> str:
        """A name for run folders: the job's own, the file's or the data's."""
        if self.name:
            return self.name
        if self.origin is None:
            return Path(self.data).stem if isinstance(self.data, (str, Path)) else "job"
        code, _, _ = self.origin.rpartition(":")
        if code and "/" not in code:  # package.module:name
            return code.rpartition(".")[2]
        return Path(code if code.endswith(".py") else self.origin).stem or "job"

    def describe(self) -> dict[str, Any]:
        """The job as JSON: plain fields as they are, code by its name. What `job.json` and child processes get."""
        described: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name == "data":
                described["data"] = str(value) if isinstance(value, (str, Path)) else None
            elif item.name == "metric" and not isinstance(value, str):
                described["metric"] = getattr(value, "name", type(value).__name__)
            elif callable(value):
                described[item.name] = getattr(value, "__qualname__", type(value).__name__)
            else:
                described[item.name] = to_plain(value)
        return described


def rebuild(description: dict[str, Any], loaded: Job | None = None) -> Job:
    """The job of `Job.describe()` in another process: code from its origin, plain fields from the description. `loaded` is what its
    origin gave where it was loaded already: its data are not made twice."""
    base = loaded or load(description["origin"])
    changes: dict[str, Any] = {
        name: description[name]
        for name in (
            "target",
            "batch_size",
            "seed",
            "rows",
            "image_size",
            "skip_bad",
            "context",
            "tokenizer",
            "name",
            "origin",
            "set_by",
        )
    }
    changes["split"] = Split(**description["split"])
    changes["recipe"] = Recipe(**{**description["recipe"], "augment": tuple(description["recipe"]["augment"])})
    unchanged = base.describe()
    for name in ("loss", "metric"):  # a name where another was chosen over the file's, be that a name or code
        if description[name] != unchanged[name]:
            changes[name] = description[name]
    if description["data"] is not None:
        changes["data"] = description["data"]
    return replace(base, **changes)


def load(what: str | Path | Job) -> Job:
    """A `Job` from `file.py`, `file.py:name`, `package.module:name`, or a path to data.

    Raises `BadInput` where there is none, where the file raises, or where it holds several and none is named.
    """
    if isinstance(what, Job):
        return what
    text = str(what)
    file, _, name = text.rpartition(":") if ":" in text and not Path(text).exists() else (text, "", "")
    if not file:
        file, name = text, ""
    if file.endswith(".py"):
        path = Path(file)
        if not path.is_file():
            raise errors.BadInput(f"{file} does not exist (looked in {Path.cwd()}).{nearby(path)}")
        origin = f"{path.resolve()}:{name}" if name else str(path.resolve())
        return replace(_job_in(_import_file(path), name, text), origin=origin)
    if name and "/" not in file:
        return replace(_job_in(_import_module(file), name, text), origin=text)
    path = Path(text)
    if not path.exists():
        raise errors.BadInput(f"{text} does not exist (looked in {Path.cwd()}).{nearby(path)}")
    resolved = str(path.resolve())
    return Job(data=resolved, origin=resolved)


def override(job: Job, changes: Mapping[str, Any], who: str = "command line") -> Job:
    """The job with the fields of `changes` that are not None set; `recipe.NAME` and `split.NAME` reach inside."""
    given = {name: value for name, value in changes.items() if value is not None}
    recipe = {name[7:]: value for name, value in given.items() if name.startswith("recipe.")}
    split = {name[6:]: value for name, value in given.items() if name.startswith("split.")}
    plain = {name: value for name, value in given.items() if "." not in name}
    return replace(
        job,
        **plain,
        recipe=replace(job.recipe, **recipe) if recipe else job.recipe,
        split=replace(job.split, **split) if split else job.split,
        set_by={**job.set_by, **dict.fromkeys(given, who)},
    )


def unknown(what: str, name: object, known: tuple[str, ...] | list[str]) -> str:
    """A message for a name that is not known, with the nearest that is."""
    near = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {name!r}.{hint} Known: {', '.join(known)}."


def takes_schema(factory: Callable[..., Any]) -> bool:
    """Whether a model factory asks for the schema: it has a positional parameter without a default."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def _number_faults(name: str, value: Any, low: float, high: float) -> list[str]:
    if isinstance(value, Real) and math.isfinite(value) and low <= float(value) <= high:
        return []
    must = f"be a number of at least {low:g}" if high == math.inf else f"lie between {low:g} and {high:g}"
    return [f"{name} is {f'{float(value):g}' if isinstance(value, Real) else repr(value)}; it must {must}."]


def _count_faults(name: str, value: Any, least: int = 1) -> list[str]:
    good = isinstance(value, Integral) and int(value) >= least
    return [] if good else [f"{name} is {value!r}; it must be a whole number of at least {least}."]


def _file_faults(path: Path) -> list[str]:
    if path.suffix != ".keras":
        return [f"model is {str(path)!r}: a model can be a function that builds it, or a file that ends in .keras."]
    return [] if path.is_file() else [f"model is {str(path)!r}, which does not exist (looked in {Path.cwd()}).{nearby(path)}"]


def _is_module(value: object) -> bool:
    torch, keras = sys.modules.get("torch"), sys.modules.get("keras")
    return (torch is not None and isinstance(value, torch.nn.Module)) or (keras is not None and isinstance(value, keras.Model))


def nearby(path: Path) -> str:
    """A hint at what lies where a path points that does not exist, by name; empty where nothing is like it."""
    folder = path.parent if path.parent.is_dir() else Path()
    near = difflib.get_close_matches(path.name, [entry.name for entry in folder.iterdir()], n=1)
    return f" Did you mean {folder / near[0]}?" if near else ""


def _import_file(path: Path) -> Any:
    name = f"delest_job_{path.stem}_{abs(hash(path.resolve()))}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    _put_on_path(path.resolve().parent)
    with _running(path, str(path)):
        spec.loader.exec_module(module)
    return module


def _import_module(name: str) -> Any:
    _put_on_path(Path.cwd())
    with _running(None, f"{name} (imported in {Path.cwd()})"):
        return importlib.import_module(name)


def _put_on_path(folder: Path) -> None:
    """Let a job import what lies beside it, also later in its functions, as a script can."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@contextlib.contextmanager
def _running(path: Path | None, what: str) -> Iterator[None]:
    """Turn what the user's code raises into `BadInput` with its line in the file `path`; None: in the module being imported."""
    try:
        yield
    except errors.DelestError:
        raise
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name in _KERAS:
            raise errors.MissingExtra(
                f"{what} needs {error.name}, which is not installed: pip install 'delest[keras]'."
            ) from error
        if "Unable to import backend" in str(error):
            raise errors.BadInput(
                f"{what} uses Keras, and KERAS_BACKEND={os.environ.get('KERAS_BACKEND', '')} is none of tensorflow, jax, torch: set it to one of them."
            ) from error
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if (frame.name == "<module>" if path is None else Path(frame.filename).resolve() == path.resolve())
        ]
        number = lines[-1] if lines else error.lineno if isinstance(error, SyntaxError) else None
        line = f", line {number}" if number else ""
        raise errors.BadInput(f"{what}{line}: {type(error).__name__}: {error}") from error


def _job_in(module: Any, name: str, text: str) -> Job:
    if name:
        if not hasattr(module, name):
            known = [key for key, value in vars(module).items() if isinstance(value, Job)]
            raise errors.BadInput(f"{text}: there is no {name!r} in that file. Jobs there: {', '.join(known) or 'none'}.")
        found = getattr(module, name)
    else:
        jobs = {key: value for key, value in vars(module).items() if isinstance(value, Job)}
        if len(jobs) > 1 and "job" not in jobs:
            raise errors.BadInput(f"{text} holds several jobs: name one, as in {text}:{next(iter(jobs))} ({', '.join(jobs)}).")
        found = jobs.get("job") or next(iter(jobs.values()), None) or vars(module).get("job")
        if found is None:
            raise errors.BadInput(f"{text} holds no delest.Job: write `job = delest.Job(model=..., data=...)` in it.")
    if callable(found) and not isinstance(found, Job):
        with _running(Path(getattr(module, "__file__", None) or text), text):
            found = found()
    if not isinstance(found, Job):
        raise errors.BadInput(f"{text}: {name or 'job'} is a {type(found).__name__}, not a delest.Job.")
    return found


RECIPE_FIELDS = tuple(item.name for item in dataclasses.fields(Recipe))
