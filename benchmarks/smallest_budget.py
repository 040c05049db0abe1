"""How little memory a job can train in at the same effective batch, against the plain step with `torch.optim.AdamW` as it comes.

    python benchmarks/smallest_budget.py [--only JOB] [--minutes N] [--plans FOLDER]

For each job planning says which combination takes the least memory, of those that it expects to take at most 1.7 times as long as the
plain step: of all methods, of those that keep Adam's rule (all but the factored second moment), and of those that keep the results
(`--exact`). They are then run for real, as is the plain step, each in a process of its own: the peak is the high-water mark of the resident set above the warm idle process, over three steps and one
evaluation (the plain step: three steps), with malloc's mmap threshold fixed at 64 KiB, on one thread. The plans without micro-batches
are run beside them. A folder of plans keeps them between invocations (JOB.json), as planning takes longer than measuring. Times are processor seconds of one process that makes the plain step and each plan's in turn; the ratio is the
median of these pairs.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import results_file

CLASSES = {  # by what their memory goes to; the share of activations that was traced is in each row
    "gpt": "activations at least 70 %",
    "encoder": "activations 60 to 70 %",
    "mlp": "states dominate",
    "resnet18": "batch normalisation",
    "vit": "activations at least 70 %",
    "wide": "states dominate",
    "deep": "activations 60 to 70 %",
    "wider": "activations 60 to 70 %",
    "resnet18-224": "batch normalisation",
}
BOUNDS = {  # times less memory than the plain step: with any method, and exact
    "activations at least 70 %": (5.0, 3.0),
    "activations 60 to 70 %": (4.0, 2.5),
    "batch normalisation": (2.5, 1.4),
    "states dominate": (3.3, 1.3),
}
ADAM_BOUND = 2.4  # where states dominate, keeping Adam's rule: all that delest changes of it is how its moments are stored
TIME_BOUND = 1.7
LIMIT_SECONDS = 3600.0


def measure(name: str, folder: Path, plans: Path) -> dict[str, Any]:
    """One row: a job with its plans, their peaks and their times."""
    kept = plans / f"{name}.json"
    if not kept.exists():
        kept.write_text(json.dumps(child("plan", name)))
    planned = json.loads(kept.read_text())
    paths = {}
    for what, made in planned.pop("plans").items():
        paths[what] = folder / f"{name}-{'-'.join(re.findall(r'[a-zA-Z]+', what))}.json"
        paths[what].write_text(json.dumps(made))
    peaks: dict[str, float] = {"plain": child("memory", name, "plain")["peak_bytes"]}
    for what, path in paths.items():
        same = next((other for other in peaks if other in paths and _choices(paths[other]) == _choices(path)), None)
        peaks[what] = peaks[same] if same else child("memory", name, str(path))["peak_bytes"]
    timed = [str(path) for what, path in paths.items() if "whole" not in what]
    seconds = child("time", name, *timed)["seconds"]
    row: dict[str, Any] = {"row": name, "class": CLASSES[name], **planned, "plain_peak_bytes": peaks["plain"]}
    row["plain_seconds"] = seconds["plain"]
    for what, path in paths.items():
        made = json.loads(path.read_text())
        grown = made["predicted"]["peak_bytes"] - made["predicted"]["runtime_bytes"]
        row[what] = {
            "methods": _choices(path),
            "peak_bytes": peaks[what],
            "predicted_bytes": grown,
            "factor": peaks["plain"] / peaks[what],
        }
        if str(path) in seconds:
            ratios = [b / a for a, b in zip(seconds["plain"], seconds[str(path)], strict=True)]
            row[what] |= {
                "seconds": seconds[str(path)],
                "time_ratio": statistics.median(ratios),
                "time_ratios": [min(ratios), max(ratios)],
            }
    return row


def _choices(path: Path) -> dict[str, Any]:
    """A plan's methods with their settings; blocks by their number."""
    made = json.loads(path.read_text())
    return {
        one["method"]: {key: len(value) if key == "modules" else value for key, value in one["config"].items()}
        for one in made["choices"]
    }


def child(what: str, name: str, *paths: str) -> dict[str, Any]:
    command = [sys.executable, str(results_file.HERE / "smallest_child.py"), what, name, *paths]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    if answer.returncode:
        raise SystemExit(f"{what} {name} ended with status {answer.returncode}: {answer.stderr.strip()[-600:]}")
    return json.loads(answer.stdout.splitlines()[-1])


def bounds_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for kind, (any_bound, exact_bound) in BOUNDS.items():
        mine = [row for row in rows if row["class"] == kind]
        for what, bound in (("any", any_bound), ("exact", exact_bound)):
            words = "--exact" if what == "exact" else "any method"
            least = min(row[what]["factor"] for row in mine)
            found.append(results_file.bound_at_least(f"{kind}, times less memory, {words}", least, bound))
        if kind == "states dominate":
            least = min(row["any, Adam's rule"]["factor"] for row in mine)
            found.append(results_file.bound_at_least(f"{kind}, times less memory, keeping Adam's rule", least, ADAM_BOUND))
    for what, words in (("any", "any method"), ("any, Adam's rule", "keeping Adam's rule"), ("exact", "--exact")):
        median = statistics.median(row[what]["time_ratio"] for row in rows)
        found.append(results_file.bound_at_most(f"times as long as the plain step, median, {words}", median, TIME_BOUND))
    return found


def show(row: dict[str, Any]) -> None:
    print(f"{row['row']:9} {row['class']:26} plain {row['plain_peak_bytes'] / 2**20:6.0f} MiB", flush=True)
    for what in ("any", "any, Adam's rule", "exact"):
        one, whole = row[what], row.get(f"{what}, whole batch")
        beside = f"; without micro-batches {whole['factor']:4.2f}" if whole else ""
        print(
            f"  {what:16} {one['factor']:4.2f} times less, {one['time_ratio']:4.2f} times as long{beside}: {', '.join(one['methods'])}",
            flush=True,
        )


def main() -> None:
    options = results_file.read_options(
        __doc__.splitlines()[0], list(CLASSES), plans="folder that keeps plans, so that they are made once"
    )
    with tempfile.TemporaryDirectory() as folder:
        plans = Path(options.plans or folder)
        results_file.fill_table(
            "smallest_budget", list(CLASSES), options, lambda name: measure(name, Path(folder), plans), bounds_of, show
        )


if __name__ == "__main__":
    main()
