"""delest's callbacks in scripts as tutorials write them: each script with and without, under a limit and under none.

    python benchmarks/hooks.py [--only ROW] [--minutes N]

`NAME limit`: what a script needs is watched once with its whole batch and once with a sixteenth of it. Then it runs under an enforced
limit, RLIMIT_DATA set before it starts, as far between the two as SHARE says: alone, where it must die, and with the callback, which is
told the resident memory as far between. Its losses are compared with those of the script that had no limit.

`NAME time`: the script with and without the callback and no limit, in blocks of steps by turns: while one runs the other is stopped.
A block's time is that between two losses that the script prints, over the steps between them: ten, in which what the callback does
every ten steps happens once. Told is the median of the ratios of neighbouring blocks, with quartiles; beside it stands the processor time,
which others on the machine disturb less. Losses, printed with all their digits, must be the same. Four rows take about five minutes.

Lightning and transformers must be installed (the environment that `make bench` uses).
"""

from __future__ import annotations

import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import results_file

SCRIPTS = {
    "lightning": ("lightning_mnist", 1024),
    "transformers": ("transformers_trainer", 128),
}  # rows of a batch under the limit
STEPS_UNDER_LIMIT, REPEATS, SMALL = 4, 3, 16
SHARE = 0.3  # of the way from a small batch to the whole
BLOCKS, STEPS, FIRST = 40, 10, 2  # of each kind; steps timed in one; steps after a change that are not
BOUND_RATIO = 1.03
BOUND_LOSS = 0.02  # relative: dropout draws other numbers for parts than for the whole batch


def command(name: str, *options: str) -> list[str]:
    return [sys.executable, str(results_file.HERE / "scripts" / f"{SCRIPTS[name][0]}.py"), *options]


def environment(threads: int) -> dict[str, str]:
    return {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(threads)}


def is_loss(line: str) -> bool:
    return line.startswith(("loss ", "{'loss'"))


# Under a limit


def watch(options: list[str], limit_bytes: int | None = None) -> dict[str, Any]:
    """A script's end, its last line and the highest data and resident sizes that were seen, bytes."""

    def limited() -> None:
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))

    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            options, stdout=output, stderr=subprocess.STDOUT, env=environment(1), preexec_fn=limited, text=True
        )
        highest = {"VmData": 0, "VmRSS": 0}
        while process.poll() is None:
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except OSError:
                break
            sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.startswith(tuple(highest))}
            highest = {key: max(value, sizes.get(key, 0)) for key, value in highest.items()}
            time.sleep(0.005)
        status = process.wait()
        output.seek(0)
        said = [line for line in output.read().splitlines() if line.strip()]
    splits = sum("instead of" in line for line in said)  # told by the callback
    return {
        "status": status,
        "splits": splits,
        "last": said[-1] if said else "",
        "data_bytes": highest["VmData"],
        "resident_bytes": highest["VmRSS"],
    }


def under_limit(name: str) -> dict[str, Any]:
    """One row: a script under a limit, alone and with the callback."""
    rows = SCRIPTS[name][1]
    steps = ["--steps", str(STEPS_UNDER_LIMIT)]
    whole = watch(command(name, *steps, "--batch-size", str(rows)))
    small = watch(command(name, *steps, "--batch-size", str(rows // SMALL)))
    data, resident = (int(small[key] + SHARE * (whole[key] - small[key])) for key in ("data_bytes", "resident_bytes"))
    row: dict[str, Any] = {"row": f"{name} limit", "rows": rows, "limit_bytes": data, "memory_bytes": resident}
    row |= {"whole": whole, "small": small, "alone": [], "callback": []}
    for _ in range(REPEATS):
        options = command(name, *steps, "--batch-size", str(rows))
        row["alone"].append(watch(options, data))
        row["callback"].append(watch([*options, "--memory", f"{resident}B"], data))
    died = sum(one["status"] != 0 for one in row["alone"])
    done = [one for one in row["callback"] if one["status"] == 0]
    splits = min((one["splits"] for one in done), default=0)
    away = [abs(_number(one["last"]) / _number(whole["last"]) - 1) for one in done]
    return {
        **row,
        "repeats": REPEATS,
        "died_alone": died,
        "finished": len(done),
        "least_splits": splits,
        "loss_away": max(away, default=1.0),
    }


def _number(line: str) -> float:
    return float(line.rpartition(" ")[2])


# Under none


def interleaved(name: str, threads: int) -> dict[str, Any]:
    """One row: a script with and without the callback in blocks by turns."""
    steps = 2 * (BLOCKS * (STEPS + FIRST) + 40)
    sides = {kind: Side(command(name, "--steps", str(steps), *more), threads) for kind, more in KINDS.items()}
    try:
        for side in sides.values():  # loads and warms
            side.block(10)
        seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        cpu: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for block in range(BLOCKS):
            for kind in sorted(KINDS, reverse=bool(block % 2)):
                spent = sides[kind].cpu_seconds()
                seconds[kind].append(sides[kind].block(STEPS))
                cpu[kind].append((sides[kind].cpu_seconds() - spent) / (STEPS + FIRST))
    finally:
        for side in sides.values():
            side.end()
    shared = min(len(side.losses) for side in sides.values())
    same = sides["alone"].losses[:shared] == sides["callback"].losses[:shared]
    ratios, cpu_ratios = (
        [one / other for one, other in zip(kind["callback"], kind["alone"], strict=True)] for kind in (seconds, cpu)
    )
    quartiles = statistics.quantiles(ratios, n=4)
    row = {"row": f"{name} time, {threads} thread{'s' * (threads > 1)}", "threads": threads, "blocks": BLOCKS, "steps": STEPS}
    row |= {"alone_seconds": seconds["alone"], "callback_seconds": seconds["callback"], "ratio": statistics.median(ratios)}
    row |= {
        "alone_cpu_seconds": cpu["alone"],
        "callback_cpu_seconds": cpu["callback"],
        "cpu_ratio": statistics.median(cpu_ratios),
    }
    return {**row, "lower_quartile": quartiles[0], "upper_quartile": quartiles[2], "losses": shared, "same_losses": same}


KINDS = {"alone": (), "callback": ("--memory", "80%")}


class Side:
    """A script that is stopped but for its blocks."""

    def __init__(self, options: list[str], threads: int):
        self.process = subprocess.Popen(
            options, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment(threads)
        )
        self.losses: list[str] = []

    def block(self, steps: int) -> float:
        """Let it make some steps; the mean seconds of one. The first after a stop began before it."""
        self.process.send_signal(signal.SIGCONT)
        times: list[float] = []
        assert self.process.stdout is not None
        while len(times) < steps + FIRST:
            line = self.process.stdout.readline()
            if not line:
                raise SystemExit(f"{' '.join(self.process.args)} ended with status {self.process.wait()}")  # type: ignore[arg-type]
            if is_loss(line):
                times.append(time.perf_counter())
                self.losses.append(line)
        self.process.send_signal(signal.SIGSTOP)
        return (times[-1] - times[FIRST - 1]) / steps

    def cpu_seconds(self) -> float:
        """Processor time of all its threads so far."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/schedstat")
        return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


ROWS = {
    **{f"{name} limit": (under_limit, name) for name in SCRIPTS},
    **{
        f"{name} time, {threads} thread{'s' * (threads > 1)}": (interleaved, name, threads)
        for name in SCRIPTS
        for threads in (1, 2)
    },
}


def bounds_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    bounds = []
    for row in rows:
        name = row["row"]
        if name.endswith("limit"):
            bounds += [
                results_file.bound_at_least(f"{name}: runs that die alone", row["died_alone"], row["repeats"]),
                results_file.bound_at_least(f"{name}: runs that finish with the callback", row["finished"], row["repeats"]),
                results_file.bound_at_least(f"{name}: splits in each", row["least_splits"], 1),
                results_file.bound_at_most(f"{name}: last loss away from that without a limit", row["loss_away"], BOUND_LOSS),
            ]
        else:
            bounds += [
                results_file.bound_at_most(f"{name}: step with the callback over alone", row["ratio"], BOUND_RATIO),
                results_file.bound_at_least(f"{name}: same losses", float(row["same_losses"]), 1.0),
            ]
    return bounds


def show(row: dict[str, Any]) -> None:
    if "ratio" not in row:
        words = (
            f"{row['row']:26} {row['limit_bytes'] / 2**20:6.0f} MiB of data: alone {row['died_alone']} of {row['repeats']} die, with "
            f"the callback {row['finished']} finish, after {row['least_splits']} splits or more; last loss {100 * row['loss_away']:.3f} % away"
        )
    else:
        alone = statistics.median(row["alone_seconds"])
        words = (
            f"{row['row']:26} {1000 * alone:7.2f} ms a step alone, ratio {row['ratio']:.3f} ({row['lower_quartile']:.3f} to "
            f"{row['upper_quartile']:.3f}), of processor time {row['cpu_ratio']:.3f}, losses {'the same' if row['same_losses'] else 'DIFFER'} over {row['losses']} steps"
        )
    print(words, flush=True)


def measure(name: str) -> dict[str, Any]:
    work, *given = ROWS[name]
    return work(*given)  # type: ignore[operator]


def main() -> None:
    options = results_file.read_options(__doc__.splitlines()[0], list(ROWS))
    results_file.fill_table("hooks", list(ROWS), options, measure, bounds_of, show)


if __name__ == "__main__":
    main()
