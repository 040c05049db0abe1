"""delest against what others offer where memory is short: samples a second under the same enforced limit, in the same invocation.

    python benchmarks/peers.py [--only JOB] [--minutes N]

Peers: Lightning with its batch-size finder (both modes), Accelerate's `find_executable_batch_size`, `torch.utils.checkpoint` on every
block. All train the same model on the same data with AdamW in fp32 at the same effective batch, on as many threads; delest also as it
comes, which computes in bf16 where that gains. When a process has
loaded its libraries and data (and delest its plan, whose probes are not under the limit; what they take is in the row), its limit is set
from outside as in benchmarks/plan.py, and cannot be lifted. At the tightest budget, to 3 % the lowest at which a peer works, those that die
as documented are also tried by hand, at the largest micro-batch in powers of two that works: finders do not know every error that
memory ends in. At a generous one, half more than the plain step's own peak, the plain loop runs too.

Those that work make blocks of steps by turns, the others being stopped meanwhile. What a library or delest spends on its search or plan is
no part of the samples a second, and stands beside them.
"""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plan
import results_file
from peers_jobs import BATCH

PEERS = ("checkpoint", "accelerate", "lightning-power", "lightning-binsearch")
OURS = ("delest-fp32", "delest")
BY_HAND = ("checkpoint", "accelerate", "lightning-power")  # which mode does not matter without the search
THREADS = os.cpu_count() or 1
FINER = 0.97  # from one limit that is tried to the next below
GENEROUS = 1.5  # times the plain step's peak
HIGHEST = 1.25  # times the plain step's peak: where the search for the tightest budget begins
EASED = 5  # tries, a step of the limit apart
WORKING = 6  # steps: the first hold all that later ones do, yet at the edge some die after three
BLOCKS, STEPS, FIRST = 5, 4, 1  # by turns; steps timed in one; steps after a stop that are not
LIMIT_SECONDS = 900.0  # of a contestant, pauses included
BOUND_TIGHTEST, BOUND_GENEROUS = 1.3, 0.97


class Contestant:
    """A training in a process of its own, under a limit, stopped but for its blocks; `ended` says in words why it is no more."""

    def __init__(self, how: str, job: str, budget: int, batch: int | str = "find"):
        self.how, self.batch, self.budget = how, batch, budget
        self.found: dict[str, Any] = {}
        self.seconds: list[float] = []  # of a step, by block
        self.cpu_seconds: list[float] = []
        self.ended: str | None = None
        self.ready_bytes = 0  # resident before it trains
        self._words = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [sys.executable, str(results_file.HERE / "peers_child.py"), how, job, str(batch), str(budget)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(THREADS)},
        )
        self._timer = threading.Timer(LIMIT_SECONDS, self.process.kill)
        self._timer.start()
        assert self.process.stdin is not None
        if self._read_until("ready"):
            self.ready_bytes = plan.sizes_of(self.process.pid)["VmRSS"]
            if budget:
                plan.enforce(self.process.pid, budget)
            self.process.stdin.write("go\n")
            self.process.stdin.flush()

    def _read_until(self, beginning: str) -> bool:
        """Read lines up to one that begins so; False where the process ends before."""
        assert self.process.stdout is not None
        if self.ended is not None:
            return False
        for line in self.process.stdout:
            if line.startswith(beginning):
                return True
            if line.startswith("{"):
                self.found |= json.loads(line)
        self._end()
        return False

    def _end(self) -> None:
        status = self.process.wait()
        self._words.seek(0)
        said = [line.strip() for line in self._words.read().splitlines() if line.strip()]
        self.ended = self.found.pop("ended", None) or f"status {status}: {said[-1][:300] if said else ''}"

    def make(self, steps: int) -> bool:
        """Let it make so many steps; False where it does not."""
        return all(self._read_until("loss ") for _ in range(steps))

    def work(self) -> bool:
        """Search and warm up, then stop; False where it does not work."""
        worked = self.make(WORKING)
        if worked:
            self.process.send_signal(signal.SIGSTOP)
        return worked

    def block(self) -> None:
        if self.ended is not None:
            return
        self.process.send_signal(signal.SIGCONT)
        if self.make(FIRST):
            cpu, started = self._cpu_seconds(), time.perf_counter()
            if self.make(STEPS):
                self.seconds.append((time.perf_counter() - started) / STEPS)
                self.cpu_seconds.append((self._cpu_seconds() - cpu) / STEPS)
                self.process.send_signal(signal.SIGSTOP)

    def _cpu_seconds(self) -> float:
        """Processor time of all its threads so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> dict[str, Any]:
        """End it, delest's at the end of its training, and say all that was seen."""
        if self.ended is None:
            self.process.send_signal(signal.SIGCONT)
            if self.how in OURS:
                while self._read_until("loss "):
                    pass
            else:
                self.found["peak_bytes"] = plan.sizes_of(self.process.pid)["VmHWM"]
                self.ended = "works"
        self.kill()
        what = {"how": self.how, "batch": self.batch, "ended": self.ended, **self.found}
        return {**what, "step_seconds": self.seconds, "cpu_step_seconds": self.cpu_seconds}

    def kill(self) -> None:
        self._timer.cancel()
        self.process.kill()
        self.process.wait()
        self._words.close()


def works(how: str, job: str, budget: int, batch: int | str = "find") -> bool:
    one = Contestant(how, job, budget, batch)
    try:
        return one.work()
    finally:
        one.kill()


def find_tightest(job: str, plain_peak: int, idle: int) -> int:
    """How many steps of `FINER` below `HIGHEST` times the plain step's peak the last budget is at which a peer works as documented;
    none does in what the plain script is `idle` with."""
    best = -1
    for how in PEERS:
        if not works(how, job, budget_at(plain_peak, best + 1)):
            continue
        best, fails = best + 1, math.ceil(math.log(idle / (HIGHEST * plain_peak), FINER))
        while fails - best > 1:
            middle = (best + fails) // 2
            if works(how, job, budget_at(plain_peak, middle)):
                best = middle
            else:
                fails = middle
    if best < 0:
        raise SystemExit(f"{job}: no peer works in {budget_at(plain_peak, 0) / 2**20:.0f} MiB")
    return best


def budget_at(plain_peak: int, steps: int) -> int:
    return int(HIGHEST * plain_peak * FINER**steps)


def enter(how: str, job: str, budget: int, *, by_hand: bool) -> list[Contestant]:
    """A contestant, and where it dies, the one at the largest power of two of rows that works without its search."""
    entered = [Contestant(how, job, budget)]
    if entered[0].work() or not by_hand:
        return entered
    for rows in [BATCH[job] >> k for k in range(BATCH[job].bit_length())]:
        one = Contestant(how, job, budget, rows)
        if one.work():
            return [*entered, one]
        one.kill()
    return entered


def race(job: str, budget: int, names: Sequence[str], *, by_hand: bool = False) -> dict[str, Any]:
    """What all make of a job within a budget, in blocks by turns, and how delest stands beside the best of the others."""
    contestants: list[Contestant] = []
    try:
        for how in names:
            contestants += enter(how, job, budget, by_hand=by_hand and how in BY_HAND)
        if all(one.ended for one in contestants if one.batch == "find"):
            return {"budget_bytes": budget, "entries": [one.close() for one in contestants], "best": None}
        for how in OURS:
            contestants += enter(how, job, budget, by_hand=False)
        for block in range(BLOCKS):
            for one in contestants[:: -1 if block % 2 else 1]:
                one.block()
        entries = [one.close() for one in contestants]
    finally:
        for one in contestants:
            one.kill()
    return {"budget_bytes": budget, "entries": entries, **compare(entries)}


def compare(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The fastest of the others, and the samples a second of each of `OURS` over its own: the median of blocks that were made by turns."""
    others = [one for one in entries if one["how"] not in OURS and one["ended"] == "works"]
    if not others:
        return {"best": None}
    best = min(others, key=lambda one: statistics.median(one["step_seconds"]))
    found: dict[str, Any] = {"best": [best["how"], best["batch"]]}
    for ours in [one for one in entries if one["how"] in OURS]:
        found[ours["how"]] = {"ratio": 0.0, "cpu_ratio": 0.0}  # 0: it does not work
        for name, key in (("ratio", "step_seconds"), ("cpu_ratio", "cpu_step_seconds")) if ours["ended"] == "done" else ():
            ratios = (theirs / mine for theirs, mine in zip(best[key], ours[key], strict=True))
            found[ours["how"]][name] = statistics.median(ratios)
    return found


def watch_plain(job: str) -> tuple[int, int]:
    """The plain loop's resident bytes without a limit: at its highest, and before it trains."""
    one = Contestant("plain", job, 0)
    one.work()
    return int(one.close()["peak_bytes"]), one.ready_bytes


def measure(job: str) -> dict[str, Any]:
    """One row: a job at the tightest and at a generous budget."""
    plan.forget_plans()
    plain, idle = watch_plain(job)
    steps = find_tightest(job, plain, idle)
    for eased in range(EASED):  # at the edge a peer may work once and not again
        tightest = race(job, budget_at(plain, steps - eased), PEERS, by_hand=True)
        if any(one["ended"] == "works" and one["batch"] == "find" for one in tightest["entries"]):
            break
    else:
        raise SystemExit(f"{job}: no peer works again up to {tightest['budget_bytes'] / 2**20:.0f} MiB")
    generous = race(job, int(GENEROUS * plain), ("plain", *(how for how in PEERS if how != "lightning-binsearch")))
    return {"row": job, "batch": BATCH[job], "plain_peak_bytes": plain, "tightest": tightest, "generous": generous}


def bounds_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for row in rows:
        for which, bound in (("tightest", BOUND_TIGHTEST), ("generous", BOUND_GENEROUS)):
            for how in OURS:
                words = f"{row['row']}, {which} budget: samples a second of {how} over the best peer's"
                found.append(results_file.bound_at_least(words, row[which].get(how, {"ratio": 0.0})["ratio"], bound))
    raced = [row[which] for row in rows for which in ("tightest", "generous")]
    over = sum(
        one.get("peak_bytes", 0) > each["budget_bytes"] for each in raced for one in each["entries"] if one["how"] in OURS
    )
    return [*found, results_file.bound_at_most("trainings of delest over their budget", over, 0)]


def show(row: dict[str, Any]) -> None:
    for which in ("tightest", "generous"):
        raced = row[which]
        print(
            f"{row['row']}, {which}: {raced['budget_bytes'] / 2**20:.0f} MiB, the plain step's peak {row['plain_peak_bytes'] / 2**20:.0f} MiB"
        )
        for one in raced["entries"]:
            name = one["how"] + ("" if one["batch"] == "find" else ", by hand")
            if one["step_seconds"]:
                speed = row["batch"] / statistics.median(one["step_seconds"])
                print(
                    f"  {name:24} {speed:7.1f} samples/s, {one['micro_batch']:3} rows at a time, peak {one.get('peak_bytes', 0) / 2**20:5.0f} MiB, "
                    f"{one['search_seconds']:5.1f} s before  {', '.join(one.get('methods', ()))} {one['ended']}"
                )
            else:
                print(f"  {name:24} {one['ended'][:150]}")
        for how in [how for how in OURS if how in raced]:
            ratios = raced[how]
            print(
                f"  {how} {ratios['ratio']:.3f} times the best ({raced['best'][0]}), {ratios['cpu_ratio']:.3f} by processor time",
                flush=True,
            )


def main() -> None:
    options = results_file.read_options(__doc__.splitlines()[0], list(BATCH))
    results_file.fill_table("peers", list(BATCH), options, measure, bounds_of, show)


if __name__ == "__main__":
    main()
