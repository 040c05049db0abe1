"""How fast delest's plan is against the best of a grid that was measured whole.

    python benchmarks/throughput.py [--only JOB] [--minutes N]

The grid is a training loop in plain PyTorch: micro-batch in powers of two, checkpoints on none or every block, memory format (images),
precision (bf16 where the processor gains from it) and AdamW's loop or its fused update; at most 64 points, one after another in one process. A point
whose first step takes twice the best first step makes no more. The five fastest and the plan that `delest.plan(job)` makes then take
turns, each in a process of its own, five rounds: the figure is the median of the rounds' ratios of samples per second, the plan's over those of the
point that is fastest in the median.

The same once more within 0.7 of what the plain step (whole batch, no method) was measured to need: the points are then those whose measured peak
in a process of their own keeps that budget. Where the best of them changes the results, as batch normalisation over a micro-batch does, and the plan does not, the best
of those that do not is shown beside it.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import plan as plans
import results_file

from delest import methods
from delest.planning.request import EXACT
from delest.records.form import from_json
from delest.records.plan import Plan

JOBS = ("resnet18", "vit", "gpt", "mlp")
FINALISTS, ROUNDS = 5, 5
MOST_STARTED = 15  # points, of which each is first seen to keep the budget or not
CHOSEN_FOR_SPEED = ("precision", "memory_format", "threads")  # points have them too
BUDGET_SHARE = 0.7  # of the plain step's peak
BOUND = 0.95
LIMIT_SECONDS = 1200.0


@dataclass
class Way:
    """A point or a plan in a process of its own, which makes steps when asked."""

    process: subprocess.Popen[str]
    keeps: bool  # the results, to rounding
    peak_bytes: int = 0  # the process's highest resident memory so far
    seconds: list[float] = field(default_factory=list)  # a step, by round

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args} ended with status {self.process.wait()}")
        answer = json.loads(line)
        self.peak_bytes = answer["peak_bytes"]
        return answer

    def turn(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self.seconds.append(self.read()["seconds"])

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()

    @property
    def described(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "peak_bytes": self.peak_bytes, "keeps": self.keeps}


def begin(name: str, what: dict[str, Any], keeps: bool, folder: Path) -> Way:
    """Waits until it has made its first steps; a plan's process is started as the plan asks for."""
    path = folder / "way.json"
    path.write_text(json.dumps(what))
    environment = methods.environment(from_json(Plan, what)) if "choices" in what else {}
    command = [sys.executable, str(results_file.HERE / "throughput_child.py"), "turns", name, str(path)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    way = Way(process, keeps)
    way.read()
    return way


def measure(name: str, folder: Path) -> dict[str, Any]:
    """One row: the grid, and the plan against it, with all free memory and within a budget."""
    started = time.monotonic()
    points = [json.loads(line) for line in run_child("grid", name).splitlines()]
    print(f"{name}: {len(points)} points in {time.monotonic() - started:.0f} s", flush=True)
    return {"row": name, "points": points, **compare(name, points, folder)}


def compare(name: str, points: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    plain = next(one for one in points if is_plain(one["point"], points[0]["point"]["rows"]))
    way = begin(name, plain["point"], True, folder)
    way.end()
    budget = int(BUDGET_SHARE * way.peak_bytes)
    return {
        "batch_size": plain["point"]["rows"],
        "plain_seconds": plain["seconds"],
        "plain_peak_bytes": way.peak_bytes,
        "free": judge(name, points, None, folder),
        "within": judge(name, points, budget, folder),
    }


def is_plain(point: dict[str, Any], batch_size: int) -> bool:
    return point["rows"] == batch_size and not any(value for key, value in point.items() if key != "rows")


def judge(name: str, points: list[dict[str, Any]], budget: int | None, folder: Path) -> dict[str, Any]:
    """The plan for a budget, and how fast it is against the fastest points that keep it."""
    plans.forget_plans()
    planned = json.loads(run_child("plan", name, "free" if budget is None else str(budget)).splitlines()[-1])
    made, most = planned["plan"], math.inf if budget is None else budget
    fitting = sorted((one for one in points if one["least_peak_bytes"] <= most), key=lambda one: one["seconds"])
    result = {"budget_bytes": budget, "fitting": len(fitting), "planning_seconds": planned["planning_seconds"]}
    found = "nothing_fits" not in made
    if found:
        result |= {"methods": {one["method"]: short(one["config"]) for one in made["choices"]}, "notes": made["notes"]}
    else:
        result |= made
    ways = take_turns(name, made if found else None, fitting, most, folder)
    result["ways"] = {words: way.described for words, way in ways.items()}
    ours, rivals = ways.pop("plan", None), {words: way for words, way in ways.items() if way.peak_bytes <= most}
    result["kept_budget"] = ours is None or ours.peak_bytes <= most
    result["against"] = against(ours, rivals)
    result["against_alike"] = against(
        ours, {words: way for words, way in rivals.items() if way.keeps or not (ours and ours.keeps)}
    )
    return result


def take_turns(
    name: str, made: dict[str, Any] | None, fitting: list[dict[str, Any]], most: float, folder: Path
) -> dict[str, Way]:
    """The plan, where there is one, and the fastest points that keep the budget in a process of their own, `FINALISTS` at the most, in rounds."""
    ways: dict[str, Way] = {}
    try:
        if made is not None:
            chosen = [one["keeps"] in EXACT for one in made["choices"] if one["method"] not in CHOSEN_FOR_SPEED]
            ways["plan"] = begin(name, made, all(chosen), folder)
        most_ways = FINALISTS + len(ways)
        for one in fitting[:MOST_STARTED]:
            way = begin(name, one["point"], one["keeps"], folder)
            if way.peak_bytes <= most:
                ways[label(one["point"])] = way
            else:
                way.end()
            if len(ways) == most_ways:
                break
        for number in range(ROUNDS):
            for way in list(ways.values()) if number % 2 else list(ways.values())[::-1]:
                way.turn()
        return ways
    finally:
        for way in ways.values():
            way.end()


def against(ours: Way | None, rivals: dict[str, Way]) -> dict[str, Any] | None:
    """The fastest of the rivals, and the rounds' ratios of the plan's samples per second over its, 0 where there is no plan; None where there is
    no rival."""
    if not rivals:
        return None
    best = min(rivals, key=lambda words: statistics.median(rivals[words].seconds))
    ratios = [0.0] if ours is None else [one / mine for one, mine in zip(rivals[best].seconds, ours.seconds, strict=True)]
    return {"best": best, "ratio": statistics.median(ratios), "ratios": [min(ratios), max(ratios)]}


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
    """None for a budget that no point of the grid keeps."""
    found = []
    for kind, words in (("free", "all free memory"), ("within", f"{BUDGET_SHARE:g} of the plain step's peak")):
        for row in rows:
            if (against := row[kind]["against"]) is not None:
                name = f"{row['row']}, {words}: samples per second over the best"
                found.append(results_file.bound_at_least(name, against["ratio"], BOUND))
    over = sum(not row["within"]["kept_budget"] for row in rows)
    return [*found, results_file.bound_at_most("plans over their budget", over, 0)]


def show(row: dict[str, Any]) -> None:
    for kind in ("free", "within"):
        one = row[kind]
        budget = "free memory" if one["budget_bytes"] is None else f"{one['budget_bytes'] / 2**20:.0f} MiB"
        if "nothing_fits" in one:
            words = "not found: nothing fits"
        else:
            words = f"{statistics.median(one['ways']['plan']['seconds']):.3f} s a step ({', '.join(one['methods']) or 'plain'})"
        print(f"{row['row']:9} {budget:12} plan {words}, planning {one['planning_seconds']:.1f} s", flush=True)
        for how in ("against", "against_alike"):
            if (found := one[how]) and (how == "against" or found != one["against"]):
                low, high = found["ratios"]
                which = "best" if how == "against" else "best that keeps the results"
                print(f"  {found['ratio']:.3f} ({low:.2f} to {high:.2f}) of the {which}: {found['best']}", flush=True)


def main() -> None:
    options = results_file.read_options(__doc__.splitlines()[0], JOBS)
    with tempfile.TemporaryDirectory() as folder:
        results_file.fill_table("throughput", JOBS, options, lambda name: measure(name, Path(folder)), bounds_of, show)


if __name__ == "__main__":
    main()
