"""Whether a plan keeps its budget: twelve jobs at four budgets each, trained for real under an enforced limit.

    python benchmarks/plan.py [--only JOB] [--minutes N]

Budgets go from what the plain step is expected to need down to the smallest that is said to work. Each training makes forty steps,
is interrupted after its first checkpoint and resumed, evaluated and saved. When a process has loaded everything and its job's data, and
has its plan, its limit is set from outside: RLIMIT_DATA of VmData + budget - VmRSS - 16 MiB, which the guard derives anew after each
failure, as address space that a failed step leaves behind is no memory. What counts is the high-water mark of its resident set, which
is read at the end. Seconds are in the rows too, and are no claim here: benchmarks/planning_time.py has that.
"""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import results_file

from delest import storage

sys.path.insert(0, str(results_file.HERE))
JOBS = ("mlp", "cnn", "resnet18", "mobile", "dense", "modern", "vit", "encoder", "language", "lstm", "waves", "coder")
SHARES = (1.0, 0.6, 0.3, 0.0)  # of the way from the smallest budget to the plain step's
TOUCHED_LATER_BYTES = 16 << 20  # by libraries
ROOM = 1.02  # of the smallest budget: another process starts a few MiB higher
LIMIT_SECONDS = 600.0


def measure(name: str, out: Path) -> dict[str, Any]:
    """One row: a job at its four budgets."""
    forget_plans()
    plain, smallest, seconds = find_budgets(name)
    row: dict[str, Any] = {
        "row": name,
        "plain_bytes": plain,
        "smallest_bytes": smallest,
        "planning_seconds": seconds,
        "runs": [],
    }
    for share in SHARES:
        budget = int(max(smallest * ROOM, smallest + share * (plain - smallest)))
        row["runs"].append({"share": share, "budget_bytes": budget, **train(name, budget, out / f"{name}-{share:g}")})
        done = row["runs"][-1]
        print(
            f"{name:10} {budget / 2**20:7.0f} MiB  {done.get('ended', '?'):12} peak {done['peak_bytes'] / 2**20:7.0f} MiB  "
            f"{done.get('step_seconds', 0):6.3f} s a step  planning {done.get('planning_seconds', 0):5.1f} s  "
            f"{', '.join(done.get('plan', {}).get('methods', {}))} {done.get('decisions', '')} {done.get('words', '')[:90]}",
            flush=True,
        )
    return row


def forget_plans() -> None:
    """Plans of earlier invocations, so that planning is timed whole; what was measured of the machine stays."""
    for path in storage.cache_folder("probes").glob("job-*"):
        path.unlink()


def find_budgets(name: str) -> tuple[int, int, float]:
    """What the plain step needs at the most, and the smallest budget that is said to work, bytes; seconds that planning both took."""
    code = (
        "import json, sys, time, delest\n"
        "from delest import errors, job as jobs\n"
        "from delest.backends.torch import TorchBackend\n"
        f"loaded = jobs.load({str(results_file.HERE / 'plan_jobs.py') + ':' + name!r})\n"
        "TorchBackend().warm()\n"
        "started = time.perf_counter()\n"
        "plain = delest.plan(loaded).plain.high_bytes\n"
        "try:\n"
        "    delest.plan(loaded, memory=64 << 20)\n"
        "except errors.NothingFits as error:\n"
        "    print(json.dumps([plain, error.smallest_bytes, time.perf_counter() - started]))\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_SECONDS, check=True)
    plain, smallest, seconds = json.loads(answer.stdout.splitlines()[-1])
    return plain, smallest, seconds


def train(name: str, budget: int, folder: Path) -> dict[str, Any]:
    """Train, interrupt after the first checkpoint, resume; what both processes took."""
    first = run(name, budget, folder, "new", interrupt=True)
    if first["ended"] != "Interrupted":
        return first
    second = run(name, budget, folder, "resume", interrupt=False)
    return {**first, **second, "resumed": True, "peak_bytes": max(first["peak_bytes"], second["peak_bytes"])}


def run(name: str, budget: int, folder: Path, how: str, *, interrupt: bool) -> dict[str, Any]:
    command = [sys.executable, str(results_file.HERE / "plan_child.py"), name, str(budget), str(folder), how]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    line = process.stdout.readline()
    while line and line.strip() != "ready":
        if line.startswith("{"):  # no plan
            process.communicate()
            return json.loads(line)
        line = process.stdout.readline()
    enforce(process.pid, budget, hard_bytes=resource.RLIM_INFINITY)
    process.stdin.write("go\n")
    process.stdin.flush()
    if interrupt:
        _interrupt(process, folder)
    try:
        answer, said = process.communicate(timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"ended": f"not within {LIMIT_SECONDS:g} s", "peak_bytes": 0}
    lines = [line for line in answer.splitlines() if line.startswith("{")]
    if not lines:
        return {"ended": f"status {process.returncode}", "words": said.strip()[-400:], "peak_bytes": 0}
    return json.loads(lines[-1])


def enforce(pid: int, budget: int, hard_bytes: int | None = None) -> None:
    """Limit the data of a process that has loaded everything to what keeps it resident within the budget; no higher than `hard_bytes` may it
    lift the limit itself (None: not at all)."""
    sizes = sizes_of(pid)
    limit = max(0, sizes["VmData"] + budget - sizes["VmRSS"] - TOUCHED_LATER_BYTES)
    resource.prlimit(pid, resource.RLIMIT_DATA, (limit, limit if hard_bytes is None else hard_bytes))


def sizes_of(pid: int) -> dict[str, int]:
    """A process's sizes by the kernel's names, bytes."""
    status = dict(part.split(":") for part in Path(f"/proc/{pid}/status").read_text().splitlines() if part.startswith("Vm"))
    return {key: int(value.split()[0]) << 10 for key, value in status.items()}


def _interrupt(process: subprocess.Popen[str], folder: Path) -> None:
    """Once there is a checkpoint after the first steps; a training that ends before is not interrupted."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if any(int(path.name.rpartition("-")[2]) > 0 for path in folder.glob("checkpoints/step-*") if path.name[5:].isdigit()):
            process.send_signal(signal.SIGINT)
            return
        time.sleep(0.02)


def bounds_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    runs = [run for row in rows for run in row["runs"]]
    return [
        results_file.bound_at_most("trainings that did not end well", sum(run["ended"] != "done" for run in runs), 0),
        results_file.bound_at_most(
            "trainings over their budget", sum(run["peak_bytes"] > run["budget_bytes"] for run in runs), 0
        ),
        results_file.bound_at_least("trainings", len(runs), len(JOBS) * len(SHARES)),
    ]


def main() -> None:
    options = results_file.read_options(__doc__.splitlines()[0], JOBS)
    with tempfile.TemporaryDirectory() as folder:
        results_file.fill_table("plan", JOBS, options, lambda name: measure(name, Path(folder)), bounds_of)


if __name__ == "__main__":
    main()
