"""delest's estimates against the zoo on a CUDA device: bytes allocated and reserved at the peak, case by case.

    python benchmarks/footprint_gpu.py

Each case runs in a process of its own; `benchmarks/gpu.sh` says so and ends where there is no device. The estimate is made for the
catalogue's entry of that device, before the case runs there.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from typing import Any

import results_file
import zoo

NAME = "footprint_gpu"
LIMIT_SECONDS = 300


def run_case(name: str) -> dict[str, Any]:
    """Estimate one case for this device, then train it there for three steps; in this process, which is thought to be fresh."""
    import torch

    import delest

    case, title = zoo.find_case(name), torch.cuda.get_device_name()
    inputs, targets = case.inputs(case.batch_size)
    asked: dict[str, Any] = {"targets": targets, "loss": case.loss, "optimizer": case.optimizer, "precision": case.precision}
    started = time.perf_counter()
    exact = delest.estimate(case.model, inputs, device=title, allocator="exact", batch_size=case.batch_size, **asked)
    seconds = time.perf_counter() - started
    reserved = delest.estimate(case.model, inputs, device=title, allocator="cuda", batch_size=case.batch_size, **asked)
    model = case.model().cuda()
    optimizer = case.optimizer(model.parameters())
    inputs, targets = on_device(inputs), on_device(targets)
    times = []
    for _ in range(6):
        torch.cuda.synchronize()
        before = time.perf_counter()
        case.step(model, optimizer, inputs, targets)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - before)
    return {
        "device": title,
        "allocated_bytes": torch.cuda.max_memory_allocated(),
        "estimated_allocated_bytes": exact.peak_bytes,
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "estimated_reserved_bytes": reserved.peak_bytes - reserved.runtime_bytes,
        "step_seconds": statistics.median(times[2:]),
        "estimated_step_seconds": exact.step_seconds,
        "estimating_seconds": seconds,
    }


def on_device(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: on_device(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(on_device(item) for item in value)
    return value.cuda() if hasattr(value, "cuda") else value


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "--case":
        print(json.dumps(run_case(sys.argv[2])))
        return
    names = [case.name for case in zoo.load_cases()]
    options = results_file.read_options(__doc__.splitlines()[0], names)
    rows = [row for row in results_file.kept_rows(NAME) if row["row"] not in options.only]
    started = time.monotonic()
    for name in options.only:
        if time.monotonic() - started > 60 * options.minutes:
            break
        done = subprocess.run([sys.executable, __file__, "--case", name], capture_output=True, text=True, timeout=LIMIT_SECONDS)
        lines = done.stdout.strip().splitlines()
        answer = (
            json.loads(lines[-1]) if done.returncode == 0 else {"raised": (done.stderr.strip().splitlines() or ["nothing"])[-1]}
        )
        rows.append({"row": name, **answer})
        print(name, answer)
        results_file.write_results(NAME, rows, find_bounds(rows) if {row["row"] for row in rows} == set(names) else [])


def find_bounds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    errors = [abs(row["estimated_allocated_bytes"] / row["allocated_bytes"] - 1) for row in rows if "raised" not in row]
    return [
        results_file.bound_at_most("allocated, median error", statistics.median(errors), 0.02),
        results_file.bound_at_most("allocated, worst error", max(errors), 0.12),
        results_file.bound_at_most("cases that raise", sum("raised" in row for row in rows), 0),
    ]


if __name__ == "__main__":
    main()
