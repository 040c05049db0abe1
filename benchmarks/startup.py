"""How long the command line takes to start: `delest --help` as a whole process, beside a bare interpreter.

    python benchmarks/startup.py

Both are run in turn, 20 times each after one that is not counted.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import results_file

RUNS = 20
COMMANDS = {
    "bare interpreter": [sys.executable, "-c", "pass"],
    "delest --help": [str(Path(sys.executable).with_name("delest")), "--help"],
}
BOUND_SECONDS = 0.3


def time_process(command: list[str]) -> float:
    """Wall seconds of one whole process; raises where it fails."""
    before = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - before


def main() -> None:
    options = results_file.read_options(__doc__.splitlines()[0], list(COMMANDS))
    seconds: dict[str, list[float]] = {name: [] for name in options.only}
    for turn in range(RUNS + 1):
        for name in options.only:
            taken = time_process(COMMANDS[name])
            if turn:
                seconds[name].append(taken)
    rows = {row["row"]: row for row in results_file.kept_rows("startup")}
    rows.update({name: summarise(name, taken) for name, taken in seconds.items()})
    bounds = []
    if rows.keys() >= COMMANDS.keys():
        median = rows["delest --help"]["median_seconds"]
        bounds.append(results_file.bound_at_most("delest --help, seconds", median, BOUND_SECONDS))
    path = results_file.write_results("startup", list(rows.values()), bounds)
    print(f"{'':18}{'median':>10}{'quartiles':>20}")
    for row in rows.values():
        spread = f"{row['lower_seconds']:.3f} to {row['upper_seconds']:.3f} s"
        print(f"{row['row']:18}{row['median_seconds']:>8.3f} s{spread:>20}")
    for bound in bounds:
        print(f"{bound['name']}: {bound['value']:.3f}, at most {bound['bound']}: {'kept' if bound['ok'] else 'NOT KEPT'}")
    print(f"written to {path}")


def summarise(name: str, taken: list[float]) -> dict[str, Any]:
    lower, median, upper = statistics.quantiles(taken, n=4)
    return {"row": name, "runs": len(taken), "median_seconds": median, "lower_seconds": lower, "upper_seconds": upper}


if __name__ == "__main__":
    main()
