"""What being measured does to a script: three as tutorials write them, each run alone and under `measure_script`.

    python benchmarks/measure_scripts.py

Each pair is one run of each kind, in turn, the order swapped from pair to pair. A step's time is the time between two lines
in which the script prints a loss, taken here as the lines arrive. Output and losses, printed with all their digits, must be
the same. Lightning and transformers must be installed (the environment that `make bench` uses).
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from typing import Any

import results_file

PAIRS = 5
WARM_UP = 5  # steps that are not timed
BOUND_RATIO = 1.05
SCRIPTS = ("plain_torch", "lightning_mnist", "transformers_trainer")
MEASURED = "import sys; from delest.footprint.script import measure_script; sys.exit(measure_script(sys.argv[1:]).status)"


def run(command: list[str]) -> tuple[list[str], float]:
    """The lines of standard output and the median seconds between two that tell a training loss; raises where it fails."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    assert process.stdout is not None
    lines, times = [], []
    for line in process.stdout:
        if is_step(line):
            times.append(time.perf_counter())
        lines.append(line)
    if process.wait():
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
    seconds = [after - before for before, after in zip(times[WARM_UP:], times[WARM_UP + 1 :], strict=False)]
    return lines, statistics.median(seconds)


def is_step(line: str) -> bool:
    return line.startswith(("loss ", "{'loss'"))


def compare(name: str) -> dict[str, Any]:
    """One row: a script alone and measured, `PAIRS` times."""
    script = [sys.executable, str(results_file.HERE / "scripts" / f"{name}.py")]
    measured = [sys.executable, "-c", MEASURED, *script]
    row: dict[str, Any] = {"row": name, "pairs": PAIRS, "alone_seconds": [], "measured_seconds": []}
    same_output = same_losses = 0
    for pair in range(PAIRS):
        kinds = [("alone_seconds", script), ("measured_seconds", measured)]
        outputs = {}
        for kind, command in kinds if pair % 2 == 0 else reversed(kinds):
            outputs[kind], seconds = run(command)
            row[kind].append(seconds)
        one, other = outputs.values()
        same_output += one == other
        same_losses += list(filter(is_step, one)) == list(filter(is_step, other))
    ratios = [after / before for before, after in zip(row["alone_seconds"], row["measured_seconds"], strict=True)]
    return {
        **row,
        "ratio": statistics.median(ratios),
        "lowest_ratio": min(ratios),
        "highest_ratio": max(ratios),
        "same_output": same_output,
        "same_losses": same_losses,
    }


def find_bounds(rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    if not rows.keys() >= set(SCRIPTS):
        return []
    bounds = []
    for name in SCRIPTS:
        row = rows[name]
        bounds += [
            results_file.bound_at_most(f"{name}: step time measured over alone", row["ratio"], BOUND_RATIO),
            results_file.bound_at_least(f"{name}: pairs with the same output", row["same_output"], row["pairs"]),
            results_file.bound_at_least(f"{name}: pairs with the same losses", row["same_losses"], row["pairs"]),
        ]
    return bounds


def main() -> None:
    options = results_file.read_options(__doc__.splitlines()[0], list(SCRIPTS))
    begun = time.monotonic()
    rows = {row["row"]: row for row in results_file.kept_rows("measure_scripts")}
    for name in options.only:
        if time.monotonic() - begun > 60 * options.minutes:
            break
        rows[name] = compare(name)
        path = results_file.write_results("measure_scripts", list(rows.values()), find_bounds(rows))
        row = rows[name]
        print(
            f"{name:22}{statistics.median(row['alone_seconds']):8.4f} s a step alone,"
            f"{statistics.median(row['measured_seconds']):8.4f} s measured; ratio {row['ratio']:.3f} "
            f"({row['lowest_ratio']:.3f} to {row['highest_ratio']:.3f}); same output in {row['same_output']} of {row['pairs']}"
        )
        print(f"written to {path}")
    for bound in find_bounds(rows):
        print(f"{bound['name']}: {bound['value']:.3f}, bound {bound['bound']}: {'kept' if bound['ok'] else 'NOT KEPT'}")


if __name__ == "__main__":
    main()
