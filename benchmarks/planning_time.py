"""How long a user waits for a plan, on networks of the zoo.

    python benchmarks/planning_time.py [--only CASE] [--minutes N]

Each kind of network that the zoo has at two batch sizes, at the larger one. Timed is the whole of `delest.plan(job)` in a process of its own, to which
the job is new and the machine is not: its rates were measured for another job before, in a cache folder that each process gets a copy of. Once
with all free memory, and once with a budget midway between the smallest that delest names and the most that the plain step may need, where combinations
of methods are compared over traces; then asked again.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import results_file
import zoo

ABOUT_MACHINE = "mlp-64"  # its plan within a budget measures what is known of the machine afterwards; never a row
TINY_BYTES = 64 << 20
SHORT_STEP_SECONDS = 0.05
BOUND_SECONDS, SHORT_BOUND_SECONDS = 30.0, 5.0
LIMIT_SECONDS = 900.0
CHILD = """
import json, sys, time
import delest
from delest import errors, job as jobs

job, answers = jobs.load(sys.argv[1]), []
for budget in json.loads(sys.argv[2]):
    started = time.perf_counter()
    try:
        plan = delest.plan(job, memory=budget)
        answer = {"methods": [one.method for one in plan.choices], "rows": plan.micro_batch, "plain_high_bytes": plan.plain.high_bytes,
                  "plain_seconds": plan.plain.step_seconds, "notes": plan.notes}
    except errors.NothingFits as error:
        answer = {"smallest_bytes": error.smallest_bytes}
    answers.append({**answer, "seconds": time.perf_counter() - started})
print(json.dumps(answers))
"""


def cases() -> list[zoo.Case]:
    """Of each kind with two batch sizes the larger one."""
    kinds: dict[str, list[zoo.Case]] = {}
    for case in zoo.load_cases():
        kinds.setdefault(case.kind, []).append(case)
    return [max(of_kind, key=lambda case: case.batch_size) for of_kind in kinds.values() if len(of_kind) > 1]


def measure(name: str, warm: Path) -> dict[str, Any]:
    """One row: planning seconds with all free memory, within a budget, and asked again; the smallest budget's beside them."""
    free, least = planned(name, [None, TINY_BYTES], warm)
    budget = (least["smallest_bytes"] + free["plain_high_bytes"]) // 2
    within, again = planned(name, [budget, budget], warm)
    return {"row": name, "budget_bytes": budget, "free": free, "smallest": least, "within": within, "again": again}


def planned(name: str, budgets: list[int | None], warm: Path) -> list[dict[str, Any]]:
    """Answers of a process to which the job is new, one for each budget."""
    with tempfile.TemporaryDirectory() as folder:
        cache = shutil.copytree(warm, Path(folder, "cache"))
        return run_child(name, budgets, cache)


def run_child(name: str, budgets: list[int | None], cache: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-c", CHILD, f"{results_file.HERE / 'planning_jobs.py'}:{name}", json.dumps(budgets)]
    environment = {**os.environ, "DELEST_CACHE": str(cache)}
    answer = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, env=environment)
    if answer.returncode:
        raise SystemExit(f"{name} ended with status {answer.returncode}: {answer.stderr.strip()[-600:]}")
    return json.loads(answer.stdout.splitlines()[-1])


def is_short(row: dict[str, Any]) -> bool:
    return row["free"]["plain_seconds"] < SHORT_STEP_SECONDS


def bounds_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for which, words in (("free", "all free memory"), ("within", "midway to the smallest budget")):
        slowest = max(row[which]["seconds"] for row in rows)
        found.append(results_file.bound_at_most(f"seconds to plan, {words}, longest", slowest, BOUND_SECONDS))
        if short := [row[which]["seconds"] for row in rows if is_short(row)]:
            what = f"seconds to plan, {words}, longest of steps below {SHORT_STEP_SECONDS:g} s"
            found.append(results_file.bound_at_most(what, max(short), SHORT_BOUND_SECONDS))
    return found


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['row']:18} step {row['free']['plain_seconds']:6.3f} s; plan {row['free']['seconds']:5.1f} s, smallest {row['smallest']['seconds']:5.1f} s, "
        f"{row['budget_bytes'] / 2**20:5.0f} MiB {row['within']['seconds']:5.1f} s, again {row['again']['seconds']:4.1f} s: "
        f"{', '.join(row['within'].get('methods', ['nothing fits']))}",
        flush=True,
    )


def main() -> None:
    names = [case.name for case in cases()]
    options = results_file.read_options(__doc__.splitlines()[0], names)
    with tempfile.TemporaryDirectory() as folder:
        warm = Path(folder, "warm")

        def measured(name: str) -> dict[str, Any]:
            if not warm.exists():
                run_child(ABOUT_MACHINE, [TINY_BYTES], warm)
                for path in (warm / "probes").glob("job-*"):
                    path.unlink()
            return measure(name, warm)

        results_file.fill_table("planning_time", names, options, measured, bounds_of, show)


if __name__ == "__main__":
    main()
