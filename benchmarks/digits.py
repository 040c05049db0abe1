"""The official MNIST example's network, trained by its own loop, by Lightning and by `delest train`, to the same accuracy.

    python benchmarks/digits.py [--only ROW] [--minutes N]

Whole processes in turn, three seeds: imports, delest's checks, inspection and planning are all counted. Lightning is
needed beside delest: pip install -c constraints.txt -e '.[lightning]'.
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

import numpy as np
import results_file

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
PEERS = ("plain", "lightning")
OURS, EXPLAINING = "delest train", "plain with delest's recipe"
RIVALS = (*PEERS, OURS, EXPLAINING)
BOUND_TIME, BOUND_POINTS = 0.40, 0.2


def write_data(folder: Path) -> Path:
    """The shipped digits as 8,000 training and 2,000 test rows."""
    digits = np.load(HERE.parent / "examples" / "data" / "mnist10k.npz")
    images, labels = digits["images"], digits["labels"]
    path = folder / "digits.npz"
    np.savez(path, x_train=images[:8000], y_train=labels[:8000], x_test=images[8000:], y_test=labels[8000:])
    return path


def measure(rival: str, seed: int, data: Path) -> dict[str, Any]:
    """Wall seconds of one whole process and the accuracy on the 2,000 test rows."""
    with tempfile.TemporaryDirectory() as folder:
        if rival == OURS:
            command = [
                sys.executable,
                "-m",
                "delest",
                "train",
                str(HERE / "digits_job.py"),
                "--seed",
                str(seed),
                "--out",
                f"{folder}/run",
                "--json",
                "--quiet",
            ]
        else:
            command = [sys.executable, str(HERE / "digits_rivals.py"), rival, "--data", str(data), "--seed", str(seed)]
        started = time.perf_counter()
        done = subprocess.run(command, env={**os.environ, "DIGITS": str(data)}, capture_output=True, text=True)
        seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{rival} failed:\n{done.stderr}")
    answer = json.loads(done.stdout.strip().splitlines()[-1] if rival != OURS else done.stdout)
    row = {"row": f"{rival}, seed {seed}", "rival": rival, "seed": seed, "seconds": seconds}
    if rival != OURS:
        return {**row, "accuracy": answer["accuracy"]}
    return {**row, "accuracy": answer["test"]["accuracy"], "parts_seconds": answer["seconds"], "epochs": answer["epochs"]}


def bounds_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Time against each peer in the median of paired seeds, accuracy against each in the mean."""
    by = {rival: {row["seed"]: row for row in rows if row["rival"] == rival} for rival in RIVALS}
    bounds = []
    for peer in PEERS:
        ratio = statistics.median(by[OURS][seed]["seconds"] / by[peer][seed]["seconds"] for seed in SEEDS)
        short = 100 * (mean(by[peer]) - mean(by[OURS]))
        bounds.append(results_file.bound_at_most(f"time against {peer}", ratio, BOUND_TIME))
        bounds.append(results_file.bound_at_most(f"points of accuracy below {peer}", short, BOUND_POINTS))
    return bounds


def mean(rows: dict[int, dict[str, Any]]) -> float:
    return statistics.mean(row["accuracy"] for row in rows.values())


def main() -> None:
    options = results_file.read_options(__doc__.splitlines()[0], RIVALS)
    until = time.monotonic() + 60 * options.minutes
    rows = {row["row"]: row for row in results_file.kept_rows("digits")}
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder))
        for seed in SEEDS:
            for rival in RIVALS:
                name = f"{rival}, seed {seed}"
                if rival not in options.only or name in rows or time.monotonic() > until:
                    continue
                rows[name] = measure(rival, seed, data)
                print(f"{name:40}{rows[name]['seconds']:8.1f} s{100 * rows[name]['accuracy']:9.2f} %", flush=True)
                results_file.write_results("digits", list(rows.values()), [])
    whole = len(rows) == len(SEEDS) * len(RIVALS)
    bounds = bounds_of(list(rows.values())) if whole else []
    path = results_file.write_results("digits", list(rows.values()), bounds)
    print(f"\n{'median of three seeds':32}{'seconds':>10}{'mean accuracy':>16}")
    for rival in RIVALS:
        mine = {row["seed"]: row for row in rows.values() if row["rival"] == rival}
        if mine:
            print(f"{rival:32}{statistics.median(row['seconds'] for row in mine.values()):>10.1f}{100 * mean(mine):>14.2f} %")
    for bound in bounds:
        print(f"{bound['name']}: {bound['value']:.3f}, at most {bound['bound']}: {'kept' if bound['ok'] else 'NOT KEPT'}")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
