"""One training of benchmarks/plan.py in this process, under a limit that its parent sets; prints a line of JSON at its end.

    python plan_child.py JOB BUDGET FOLDER new|resume

Tells its parent `ready` once everything is loaded and planned, and waits for a line before it trains.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def status_bytes(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) << 10


def main() -> None:
    import delest
    from delest import errors, job as jobs
    from delest.backends.torch import TorchBackend
    from delest.hardware import machine
    from delest.training.progress import Progress

    name, budget, folder, how = sys.argv[1:]
    loaded = jobs.load(f"{Path(__file__).with_name('plan_jobs.py')}:{name}")
    TorchBackend().warm()
    result: dict[str, Any] = {}
    try:
        if how == "new":  # planned in child processes, which would inherit the limit
            started = time.perf_counter()
            plan = delest.plan(loaded, memory=int(budget))
            result["planning_seconds"] = time.perf_counter() - started
        print("ready", flush=True)
        sys.stdin.readline()
        machine.reset_peak()
        result["idle_bytes"] = machine.resident_bytes()
        if how == "new":
            result["plan"] = {
                "methods": {choice.method: choice.config for choice in plan.choices},
                "micro_batch": plan.micro_batch,
                "predicted_bytes": plan.predicted.peak_bytes,
                "high_bytes": plan.predicted.high_bytes,
                "predicted_step_seconds": plan.predicted.step_seconds,
            }
            run = delest.train(loaded, plan=plan, out=folder, checkpoint_seconds=1, say=Progress())
        else:
            run = delest.train(loaded, out=folder, resume=True, say=Progress())
        result |= {
            "ended": "done",
            "steps": run.steps,
            "step_seconds": run.seconds["training"] / run.steps,
            "decisions": [one["kind"] for one in run.decisions],
        }
    except errors.DelestError as error:
        result |= {"ended": type(error).__name__, "words": str(error)}
        if isinstance(error, errors.NothingFits):
            result["smallest_bytes"] = error.smallest_bytes
    result["peak_bytes"] = status_bytes("VmHWM")
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
