"""Keras jobs on three frameworks, as `model.fit` trains them and as delest does; and whether `delest compare` names the best.

    python benchmarks/frameworks.py [--only ROW]      # in an environment with delest[keras]

A row is a model: on each framework, one process after the other, `model.fit` with its defaults, `delest.train` with no budget, and with a budget of what the fit took above
its libraries less 40 % (where nothing fits, the smallest budget that works); then `delest compare`. Memory is the highest resident set less that of the fit's process with its
framework started and its data there: what delest's command loads besides counts against it. Recommended should be the framework on which the command `delest train`, with no budget, has trained the job
soonest, from its start to its end, in the median of three times on each by turns.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import results_file

HERE = Path(__file__).parent
JOBS = HERE / "frameworks_child.py"
MODELS = ("cnn", "mlp", "transformer", "recommender")
KERNELS = "mobilenet"  # a further row: delest with no budget, on layers that have faster kernels
FRAMEWORKS = ("tensorflow", "jax", "torch")
COMMANDS = 3  # by which the best framework is told
SHARE = 0.6  # of a fit's memory, which is asked for
FASTER, LESS = 1.3, 0.3


def run(framework: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "KERAS_BACKEND": framework, "TF_CPP_MIN_LOG_LEVEL": "2", **variables}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment)


def answer(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    if done.returncode:
        raise SystemExit(f"{' '.join(done.args[1:])}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def by_fit(framework: str, model: str) -> dict[str, Any]:
    found = answer(run(framework, str(JOBS), model))
    return {"idle_bytes": found["idle_bytes"], **taken(found["peak_bytes"], found["idle_bytes"]), **times_of(**found["clock"])}


def by_delest(framework: str, model: str, idle: int, memory: int | None = None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        clock = Path(folder, "clock")
        words = ["-m", "delest", "train", f"{JOBS}:{model}_job", "--quiet", "--json"]
        within = [] if memory is None else ["--memory", f"{math.ceil(memory / 2**20)}MiB"]
        began = time.perf_counter()
        done = run(framework, *words, *within, "--out", str(Path(folder, "run")), CLOCK=str(clock))
        whole = time.perf_counter() - began
        if done.returncode == 3 and memory is not None:  # nothing fits: the smallest budget that works
            smallest = json.loads(done.stdout)["error"]["smallest_bytes"]
            if smallest is None or smallest <= memory:
                raise SystemExit(f"{model} on {framework}: {done.stderr[-2000:]}")
            return {**by_delest(framework, model, idle, smallest), "asked_bytes": memory}
        trained, starts, ends = answer(done), [[]], []
        for line in clock.read_text().splitlines():
            began, *ended = line.split()
            starts[-1].append(float(began))
            if ended:
                ends.append(float(ended[0]))
                starts.append([])
    found = {**taken(trained["measured"]["peak_bytes"], idle), **times_of(starts[: len(ends)], ends), "command_seconds": whole}
    facts = {
        "micro_batch": trained["plan"]["micro_batch"],
        "splits": sum(one["kind"] == "split" for one in trained["decisions"]),
    }
    return {**found, **facts, "budget_bytes": memory}


def taken(peak: int, idle: int) -> dict[str, int]:
    return {"peak_bytes": peak, "above_idle_bytes": peak - idle}


def times_of(starts: list[list[float]], ends: list[float]) -> dict[str, Any]:
    """Seconds of a steady step (the median of the epochs' means, but for the first) and those that steps took beyond as many steady ones: warming up."""
    steps = [(ended - began[0]) / len(began) for began, ended in zip(starts, ends, strict=True)]
    steady, count = statistics.median(steps[1:]), sum(map(len, starts))
    whole = sum(step * len(began) for step, began in zip(steps, starts, strict=True))
    return {"step_seconds": steady, "steps": count, "warming_seconds": max(0.0, whole - steady * count)}


def measure(model: str) -> dict[str, Any]:
    row: dict[str, Any] = {"row": model}
    for framework in FRAMEWORKS:
        print(f"{model} on {framework}", file=sys.stderr, flush=True)
        fit = by_fit(framework, model)
        idle = fit["idle_bytes"]
        row[framework] = {"fit": fit, "delest": by_delest(framework, model, idle)}
        if model != KERNELS:
            row[framework]["within"] = by_delest(framework, model, idle, idle + int(SHARE * fit["above_idle_bytes"]))
    if model == KERNELS:
        return row
    job = f"{HERE / 'keras_models.py'}:{model}_job"
    told = answer(run(FRAMEWORKS[0], "-m", "delest", "compare", job, "--json"))
    row["recommended"] = told["recommended"]
    commands = {framework: [row[framework]["delest"]["command_seconds"]] for framework in FRAMEWORKS}
    for _ in range(COMMANDS - 1):
        for framework, seconds in commands.items():
            seconds.append(by_delest(framework, model, row[framework]["fit"]["idle_bytes"])["command_seconds"])
    row["commands"] = commands
    row["best"] = min(FRAMEWORKS, key=lambda name: statistics.median(commands[name]))
    row["compared"] = {one["name"]: one["whole_seconds"] for one in told["results"]}
    return row


def gains(row: dict[str, Any], framework: str, way: str) -> tuple[float, float]:
    """(how many times as fast a step is as fit's, the share of its memory that is saved)"""
    fit, ours = row[framework]["fit"], row[framework][way]
    return fit["step_seconds"] / ours["step_seconds"], 1 - ours["above_idle_bytes"] / fit["above_idle_bytes"]


def show(row: dict[str, Any]) -> None:
    for framework in FRAMEWORKS:
        for way in row[framework]:
            one = row[framework][way]
            times, saved = gains(row, framework, way)
            print(
                f"{row['row']:12} {framework:10} {way:7} {one['step_seconds'] * 1e3:8.1f} ms a step, {one['above_idle_bytes'] / 2**20:6,.0f} MiB: "
                f"{times:.2f} times as fast, {saved:+.0%} saved",
                flush=True,
            )
    if "best" in row:
        print(f"{row['row']:12} recommended {row['recommended']}, best {row['best']}", flush=True)


def bounds_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    by_kernels = [gains(row, framework, "delest")[0] for row in rows if row["row"] == KERNELS for framework in FRAMEWORKS]
    rows = [row for row in rows if row["row"] != KERNELS]
    cells = [[gains(row, framework, way) for way in ("delest", "within")] for row in rows for framework in FRAMEWORKS]
    reached = [max(max(times / FASTER, (1 - LESS) / (1 - saved)) for times, saved in cell) for cell in cells]
    worse = [times < 1 and saved < 0 for cell in cells for times, saved in cell]
    right = sum(row["recommended"] == row["best"] for row in rows)
    return [
        results_file.bound_at_least(
            "1.3 times faster or 30 % less memory than model.fit, of it in the median", statistics.median(reached), 1.0
        ),
        results_file.bound_at_most("slower and larger than model.fit, trainings", sum(worse), 0),
        results_file.bound_at_least("the recommended framework is the best, models", right, len(rows)),
        results_file.bound_at_least(
            "MobileNet, times as fast as model.fit, median of three frameworks", statistics.median(by_kernels), FASTER
        ),
    ]


def main() -> None:
    names = (*MODELS, KERNELS)
    options = results_file.read_options(__doc__.splitlines()[0], names)
    results_file.fill_table("frameworks", names, options, measure, bounds_of, show)


if __name__ == "__main__":
    main()
