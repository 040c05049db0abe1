"""How fast delest's plan is against the best of a grid that was measured whole.

    python benchmarks/throughput.py [--only JOB] [--minutes N]

The grid is a training loop in plain PyTorch: micro-batch in powers of two, checkpoints on none or every block, memory format (images),
precision (bf16 where the processor gains from it) and AdamW's loop or its fused update; at most 64 points, one after another in one process. A point
whose first step takes twice the best first step makes no more. The five fastest and the plan that `delest.plan(job)` makes then take
turns, each in a process of its own, five rounds: the figure is the median of the rounds' ratios of samples per second, the plan's over those of the
point that is fastest in the median.

The same once more within 0.7 of what the plain step (whole batch, no method) was measured to need: the points are then those whose measured peak
keeps that budget. Where the best of them changes the results, as batch normalisation over a micro-batch does, and the plan does not, the best
of those that do not is shown beside it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import plan as plans
import results_file

JOBS = ("resnet18", "vit", "gpt", "mlp")
FINALISTS, ROUNDS = 5, 5
BUDGET_SHARE = 0.7  # of the plain step's peak
BOUND = 0.95
LIMIT_SECONDS = 1200.0
Finalists = dict[str, dict[str, Any]]


def measure(name: str, folder: Path) -> dict[str, Any]:
    """One row: the grid, and the plan against it, with all free memory and within a budget."""
    started = time.monotonic()
    points = [json.loads(line) for line in run_child("grid", name).splitlines()]
    print(f"{name}: {len(points)} points in {time.monotonic() - started:.0f} s", flush=True)
    plain = next(one for one in points if is_plain(one["point"], points[0]["point"]["rows"]))
    budget = int(BUDGET_SHARE * plain["peak_bytes"])
    return {
        "row": name,
        "batch_size": plain["point"]["rows"],
        "plain_seconds": plain["seconds"],
        "plain_peak_bytes": plain["peak_bytes"],
        "points": points,
        "free": judge(name, points, None, folder),
        "within": judge(name, points, budget, folder),
    }


def is_plain(point: dict[str, Any], batch_size: int) -> bool:
    return point["rows"] == batch_size and not any(value for key, value in point.items() if key != "rows")


def judge(name: str, points: list[dict[str, Any]], budget: int | None, folder: Path) -> dict[str, Any]:
    """The plan for a budget, and how fast it is against the fastest points that keep it."""
    plans.forget_plans()
    planned = json.loads(run_child("plan", name, "free" if budget is None else str(budget)).splitlines()[-1])
    made, fitting = planned["plan"], [one for one in points if budget is None or one["peak_bytes"] <= budget]
    result: dict[str, Any] = {"budget_bytes": budget, "fitting": len(fitting), "planning_seconds": planned["planning_seconds"]}
    if "nothing_fits" in made:
        return {**result, **made}
    result |= {"methods": {one["method"]: short(one["config"]) for one in made["choices"]}, "notes": made["notes"]}
    result |= {
        "keeps": all(one["keeps"] in ("bitwise", "rounding") for one in made["choices"] if one["method"] == "micro_batch")
    }
    fastest = sorted(fitting, key=lambda one: one["seconds"])[:FINALISTS]
    turns = take_turns(name, {"plan": made, **{label(one["point"]): one["point"] for one in fastest}}, folder)
    result["turns"] = turns
    kept = {label(one["point"]): one["keeps"] for one in fastest if fits(turns[label(one["point"])], budget)}
    result["kept_budget"] = fits(turns["plan"], budget)
    result["against"] = against(turns, list(kept))
    result["against_alike"] = against(turns, [one for one, keeps in kept.items() if keeps or not result["keeps"]])
    return result


def fits(turn: dict[str, Any], budget: int | None) -> bool:
    return budget is None or turn["peak_bytes"] <= budget


def against(turns: Finalists, rivals: list[str]) -> dict[str, Any] | None:
    """The fastest of the rivals, and the rounds' ratios of the plan's samples per second over its; None where there is no rival."""
    if not rivals:
        return None
    best = min(rivals, key=lambda one: statistics.median(turns[one]["seconds"]))
    ratios = [theirs / ours for theirs, ours in zip(turns[best]["seconds"], turns["plan"]["seconds"], strict=True)]
    return {"best": best, "ratio": statistics.median(ratios), "ratios": [min(ratios), max(ratios)]}


def take_turns(name: str, ways: dict[str, Any], folder: Path) -> Finalists:
    """Seconds of a step of each way in each round, all with a process of their own, and their highest resident memory."""
    processes = {}
    try:
        for number, (words, way) in enumerate(ways.items()):
            path = folder / f"way-{number}.json"
            path.write_text(json.dumps(way))
            processes[words] = begin(name, path, environment_of(way))
        found: Finalists = {words: {"seconds": [], "peak_bytes": 0} for words in ways}
        for number in range(ROUNDS):
            for words in list(ways) if number % 2 else list(ways)[::-1]:
                answer = ask(processes[words])
                found[words]["seconds"].append(answer["seconds"])
                found[words]["peak_bytes"] = answer["peak_bytes"]
        return found
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()


def environment_of(way: dict[str, Any]) -> dict[str, str]:
    """What a process must be started with to follow a plan; nothing for a point."""
    from delest import methods
    from delest.records.form import from_json
    from delest.records.plan import Plan

    return methods.environment(from_json(Plan, way)) if "choices" in way else {}


def begin(name: str, path: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, str(results_file.HERE / "throughput_child.py"), "turns", name, str(path)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    assert process.stdout is not None
    if process.stdout.readline().strip() != "ready":
        raise SystemExit(f"turns {name} {path.read_text()[:400]} ended with status {process.wait()}")
    return process


def ask(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("step\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def run_child(*arguments: str) -> str:
    command = [sys.executable, str(results_file.HERE / "throughput_child.py"), *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    if answer.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with status {answer.returncode}: {answer.stderr.strip()[-600:]}")
    return answer.stdout


def label(point: dict[str, Any]) -> str:
    return ", ".join([f"{point['rows']} rows", *(name for name, value in point.items() if value is True)])


def short(config: dict[str, Any]) -> dict[str, Any]:
    """A method's settings; blocks by their number."""
    return {name: len(value) if name == "modules" else value for name, value in config.items()}


def bounds_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A plan that was not found counts as no sample at all, unless no point of the grid fits either."""
    found = []
    for kind, words in (("free", "all free memory"), ("within", f"{BUDGET_SHARE:g} of the plain step's peak")):
        for row in rows:
            against = row[kind].get("against")
            if against is not None or ("nothing_fits" in row[kind] and row[kind]["fitting"]):
                ratio = against["ratio"] if against else 0.0
                found.append(
                    results_file.bound_at_least(f"{row['row']}, {words}: samples per second over the best", ratio, BOUND)
                )
    over = sum(not row["within"].get("kept_budget", True) for row in rows)
    return [*found, results_file.bound_at_most("plans over their budget", over, 0)]


def show(row: dict[str, Any]) -> None:
    for kind in ("free", "within"):
        one = row[kind]
        budget = "free memory" if one["budget_bytes"] is None else f"{one['budget_bytes'] / 2**20:.0f} MiB"
        if "nothing_fits" in one:
            words = f"nothing fits, and {one['fitting']} points of the grid do"
        else:
            words = (
                f"{statistics.median(one['turns']['plan']['seconds']):.3f} s a step ({', '.join(one['methods']) or 'plain'})"
            )
        print(f"{row['row']:9} {budget:12} plan {words}, planning {one['planning_seconds']:.1f} s", flush=True)
        for how in dict.fromkeys(("against", "against_alike")):
            if (found := one.get(how)) and (how == "against" or found != one["against"]):
                low, high = found["ratios"]
                print(f"  {found['ratio']:.3f} ({low:.2f} to {high:.2f}) of the best {how[8:]}: {found['best']}", flush=True)


def main() -> None:
    options = results_file.read_options(__doc__.splitlines()[0], JOBS)
    rows = {row["row"]: row for row in results_file.kept_rows("throughput")}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            if name not in rows and time.monotonic() - started < 60 * options.minutes:
                rows[name] = measure(name, Path(folder))
                results_file.write_results("throughput", [rows[one] for one in JOBS if one in rows], [])
                show(rows[name])
    complete = [rows[name] for name in JOBS if name in rows]
    bounds = bounds_of(complete) if len(complete) == len(JOBS) else []
    for bound in bounds:
        print(f"{bound['name']}: {bound['value']:.4g}, bound {bound['bound']:g}: {'kept' if bound['ok'] else 'NOT KEPT'}")
    print(f"written to {results_file.write_results('throughput', complete, bounds)}")


if __name__ == "__main__":
    main()
