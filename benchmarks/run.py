"""`delest run` from data to a report, as a whole process: time, memory, accuracy, and what int8 saves.

    python benchmarks/run.py [--cifar10 FOLDER]

The folder holds CIFAR-10 as the Hugging Face hub lays it out (see examples/cifar10.py). The baseline of every size and
latency is the trained model itself: PyTorch eager and its fp32 weights, measured in the same run, alternating.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import results_file

EXAMPLES = Path(__file__).parent.parent / "examples"
BOUND_SECONDS, BOUND_ACCURACY, BOUND_SMALLER, BOUND_RESIDENT = 120.0, 0.975, 3.5, 1 << 30


def measure(name: str, arguments: list[str]) -> dict[str, Any]:
    """One whole run in an empty folder with an empty cache. `resident_bytes` is the largest of any of its processes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "delest", "run", *arguments, "--out", f"{folder}/run", "--json", "--quiet"]
        environment = {**os.environ, "DELEST_CACHE": f"{folder}/cache"}
        started = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            printed = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        if process.returncode:
            raise SystemExit(f"{name} ended with status {process.returncode}")
        run = json.loads(printed)
        shrunk = json.loads(Path(folder, "run", "shrunk", "shrink.json").read_text())
    forms = {form["name"]: form for form in shrunk["candidates"]}
    return {
        "row": name,
        "seconds": seconds,
        "resident_bytes": usage.ru_maxrss * 1024,
        "test_accuracy": run["test"]["accuracy"],
        "shipped": shrunk["shipped"],
        "shipped_test_accuracy": shrunk["test"]["accuracy"],
        "predicted_bytes": run["plan"]["predicted"]["peak_bytes"],
        "training_bytes": run["measured"]["peak_bytes"],
        "parts_seconds": run["seconds"],
        "times_smaller": forms["torch"]["weights_bytes"] / forms["int8"]["file_bytes"],
        "forms": {
            form: {
                key: found[key]
                for key in ("file_bytes", "weights_bytes", "latency_seconds", "latency_spread", "selection", "bound")
            }
            for form, found in forms.items()
        },
    }


def bounds_of(rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    bounds = []
    if "digits" in rows:
        digits = rows["digits"]
        bounds.append(results_file.bound_at_most("digits, seconds from data to report", digits["seconds"], BOUND_SECONDS))
        bounds.append(results_file.bound_at_least("digits, test accuracy", digits["test_accuracy"], BOUND_ACCURACY))
        bounds.append(
            results_file.bound_at_least("digits, int8 smaller than the fp32 weights", digits["times_smaller"], BOUND_SMALLER)
        )
    if "cifar10" in rows:
        bounds.append(
            results_file.bound_at_most("cifar10 --rows 5000, resident bytes", rows["cifar10"]["resident_bytes"], BOUND_RESIDENT)
        )
    return bounds


def main() -> None:
    options = results_file.read_options(
        __doc__.splitlines()[0], ("digits", "cifar10"), cifar10="folder of CIFAR-10; without it that row is left as it is"
    )
    until = time.monotonic() + 60 * options.minutes
    commands = {"digits": [str(EXAMPLES / "digits.py")]}
    if options.cifar10:
        commands["cifar10"] = [str(EXAMPLES / "cifar10.py"), "--data", options.cifar10, "--rows", "5000"]
    rows = {row["row"]: row for row in results_file.kept_rows("run")}
    for name, arguments in commands.items():
        if name in options.only and name not in rows and time.monotonic() < until:
            rows[name] = measure(name, arguments)
            results_file.write_results("run", list(rows.values()), [])
    bounds = bounds_of(rows) if len(rows) == 2 else []
    path = results_file.write_results("run", list(rows.values()), bounds)
    print(f"{'':10}{'seconds':>9}{'resident':>12}{'accuracy':>10}{'ships':>7}{'smaller':>9}")
    for row in rows.values():
        print(
            f"{row['row']:10}{row['seconds']:>9.1f}{row['resident_bytes'] / 2**20:>8,.0f} MiB{100 * row['test_accuracy']:>8.1f} %"
            f"{row['shipped']:>7}{row['times_smaller']:>8.1f}x"
        )
    for bound in bounds:
        print(f"{bound['name']}: {bound['value']:.4g}, bound {bound['bound']:.4g}: {'kept' if bound['ok'] else 'NOT KEPT'}")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
