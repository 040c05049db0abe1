"""What a reader can do with a run: its settings and who set them, the command that repeats it, the code that uses its bundle."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from delest.job import Job
from delest.records.run import Run, Summary
from delest.records.shrunk import Shrunk
from delest.reporting import words

COMMAND_LINE = "command line"


def settings(run: Run) -> list[tuple[str, str, str]]:
    """Name, value and who set it, for each setting of the job and its recipe."""
    defaults = Job().describe()
    rows: list[tuple[str, str, str]] = []
    for name, value in run.job.items():
        if name == "recipe":
            rows.extend(_setting(f"recipe.{key}", item, defaults["recipe"].get(key), run) for key, item in value.items())
        elif name not in ("split", "set_by", "origin", "name") and not (value is None and defaults.get(name) is None):
            rows.append(_setting(name, value, defaults.get(name), run))
    return rows


def command(run: Run, shrunk: Shrunk | None) -> str | None:
    """The command that repeats the run; None where the job was made in a running Python and has no file."""
    origin = run.job.get("origin")
    if not origin:
        return None
    parts = ["delest", "run" if shrunk else "train", origin]
    for name in (name for name, who in (run.job.get("set_by") or {}).items() if who == COMMAND_LINE):
        room, _, field = name.rpartition(".")
        value = (run.job.get(room) or {}).get(field) if room else run.job.get(name)
        parts.extend(_option(f"split-{field}" if room == "split" else field, value))
    if run.plan is not None and run.plan.memory_bytes is not None:
        parts.extend(("--memory", _exact_size(run.plan.memory_bytes)))
    if run.plan is not None and run.plan.threads is not None:
        parts.extend(("--threads", str(run.plan.threads)))  # sums are rounded differently by another number
    if shrunk is not None:
        parts.extend(("--max-drop", f"{shrunk.max_drop:g}"))
    return shlex.join(parts)


def usage(run: Run, shrunk: Shrunk | None) -> str | None:
    """A few lines of Python that run what ships with ONNX Runtime alone; None where nothing was exported."""
    if shrunk is None or run.data is None:
        return None
    path = str(_shown(shrunk.path, run.path) / "model.onnx")
    modules = "numpy, onnxruntime"
    lines = [f"model = onnxruntime.InferenceSession({_quoted(path)})", *_rows(run.data)]
    if run.data.kind == "table":
        modules = "onnxruntime, polars"
    if run.data.classes:
        modules = f"json, {modules}"
        lines.append("probabilities = model.run(None, rows)[0]")
        lines.append('labels = json.loads(model.get_modelmeta().custom_metadata_map["labels"])')
        lines.append("print([labels[k] for k in probabilities.argmax(1)])")
    else:
        lines.append("print(model.run(None, rows)[0])")
    return "\n".join([f"import {modules}", *lines])


def _rows(data: Summary) -> list[str]:
    if data.kind == "table":
        return [
            'table = polars.read_csv("new.csv")',
            'types = {"tensor(float)": "float32", "tensor(string)": "object"}',
            "rows = {item.name: table[item.name].to_numpy().astype(types[item.type]) for item in model.get_inputs()}",
        ]
    arrays = []
    for column in data.columns:
        shape = (1, *(column.get("shape") or ()))
        name = "image" if data.kind == "images" else str(column["name"])
        arrays.append(f"{_quoted(name)}: numpy.zeros({shape}, {_quoted(str(column.get('dtype', 'float32')))})")
    return [f"rows = {{{', '.join(arrays)}}}  # put yours here, as they are stored"]


def _setting(name: str, value: Any, default: Any, run: Run) -> tuple[str, str, str]:
    who = (run.job.get("set_by") or {}).get(name) or ("default" if value == default else "job")
    return name.removeprefix("recipe.").replace("_", " "), _plain(value), who


def _plain(value: Any) -> str:
    if value is None:
        return "chosen by delest"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(words.clean(item) for item in value) or "none"
    return f"{value:g}" if isinstance(value, float) else words.clean(value)


def _option(field: str, value: Any) -> list[str]:
    name = field.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, list | tuple):
        return [part for item in value for part in (f"--{name}", str(item))]
    return [] if value is None else [f"--{name}", str(value)]


def _exact_size(size: int) -> str:
    for unit, power in (("GiB", 2**30), ("MiB", 2**20)):
        if size % power == 0:
            return f"{size // power}{unit}"
    return f"{size}B"


def _shown(path: Path, folder: Path) -> Path:
    """A path below the run folder from there, any other as it is."""
    return path.relative_to(folder) if path.is_relative_to(folder) else path


def _quoted(text: str) -> str:
    """A Python string literal in double quotes."""
    return json.dumps(text, ensure_ascii=False)
