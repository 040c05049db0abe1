"""delest's estimate of memory against forty real trainings, and what its peers say of the same.

    python benchmarks/footprint.py [--cases tuning|held_out] [--parts measured,peers,estimate] [--processes 2]

For each case of `zoo.json`, every part in a process of its own: the resident set with malloc's mmap threshold fixed (one process)
and with the allocator as it is (median of five), the allocator's own events, the peers, and delest's estimate, timed in a
process that finds its probes cached by one before it. bf16 cases run where the processor has it.

A row's estimate holds while all code is as it was at its commit. Its `measured` part holds longer: plain PyTorch does not depend on
delest, so it is kept while the case, zoo.py, zoo_networks.py, footprint_child.py, the versions and the processor are the same, which
`measured.key` says; `peers.key` says the like of footprint_peers.py.
"""

from __future__ import annotations

import ast
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import footprint_estimate
import footprint_peers
import results_file
import zoo

HERE = Path(__file__).parent
NAME = "footprint"
GLIBC_PROCESSES = 5
LIMIT_SECONDS = 900  # of one process
BOUNDS = {"median": 0.02, "90th percentile": 0.06, "worst": 0.12, "lowest": -0.04}
BOUND_ALLOCATED, BOUND_INSIDE, BOUND_WIDTH, BOUND_SECONDS = 0.005, 0.9, 0.25, 3.0
BOUND_LLAMA_SECONDS, BOUND_LLAMA_BYTES = 30.0, 700 * 2**20
Row = dict[str, Any]


# Processes. Each returns what it adds to a row.


def run_child(script: str, *words: str) -> dict[str, Any]:
    """The JSON that a script of this folder prints, or {"raised": its last line of error}."""
    command = [sys.executable, str(HERE / script), *words]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    except subprocess.TimeoutExpired:
        return {"raised": f"not done within {LIMIT_SECONDS} seconds"}
    if done.returncode:
        return {"raised": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:300]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(case: zoo.Case, mode: str) -> dict[str, Any]:
    answer = run_child("footprint_child.py", case.name, mode)
    if "raised" in answer:
        raise SystemExit(f"{case.name}, {mode}: {answer['raised']}")
    return answer


def estimate(name: str) -> dict[str, Any]:
    """In a process that finds in the user's cache what an earlier one has measured of the machine and of the case's operators;
    `first_seconds` is what the earlier one took, however much of that was there already."""
    first = run_child("footprint_estimate.py", name, "mmap")
    if "raised" in first:
        return first
    rest = ("mmap",) if name == footprint_estimate.LLAMA else footprint_estimate.ALLOCATORS
    answer = run_child("footprint_estimate.py", name, *rest)
    return answer if "raised" in answer else {**answer, "first_seconds": first["mmap"]["seconds"]}


# What is missing in a row, as calls that fill it.


def list_jobs(
    rows: dict[str, Row], cases: Sequence[zoo.Case], parts: Sequence[str], llama: bool
) -> Iterator[Callable[[], None]]:
    """In an order in which a table that is cut short still says most: one part of all cases after another."""
    for mode in ("mmap", "events"):
        for case in cases if "measured" in parts else ():
            measured = rows[case.name]["measured"]
            if mode not in measured:
                yield lambda case=case, mode=mode, measured=measured: measured.update({mode: measure(case, mode)})  # type: ignore[misc]
    for case in cases if "peers" in parts else ():
        row = rows[case.name]
        if "answers" not in row["peers"]:
            yield lambda case=case, row=row: row["peers"].update(answers=run_child("footprint_peers.py", case.name))  # type: ignore[misc]
    names = [case.name for case in cases] + ([footprint_estimate.LLAMA] if llama else [])
    for name in names if "estimate" in parts else ():
        if rows[name].get("estimate") is None:
            yield lambda name=name: rows[name].update(estimate=estimate(name))  # type: ignore[misc]
    for turn in range(GLIBC_PROCESSES):
        for case in cases if "measured" in parts else ():
            taken = rows[case.name]["measured"].setdefault("glibc", [])
            if len(taken) <= turn:
                yield lambda case=case, taken=taken: taken.append(measure(case, "glibc"))  # type: ignore[misc]


def run_jobs(jobs: Iterator[Callable[[], None]], processes: int, until: float, done: Callable[[], Any]) -> None:
    """At most `processes` at once; none is begun after `until`; `done` is called after each."""
    with ThreadPoolExecutor(processes) as pool:
        waiting: set[Future[None]] = set()
        while True:
            while len(waiting) < processes and time.monotonic() < until and (job := next(jobs, None)):
                waiting.add(pool.submit(job))
            if not waiting:
                return
            finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in finished:
                future.result()
            done()


# Rows.


def digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def describe_surroundings() -> str:
    """What a measurement of plain PyTorch depends on besides its code: processor, C library, huge pages and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = {line for line in lines if line.startswith(("model name", "flags"))}
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "numpy")]
    huge = pages.read_text().strip() if pages.exists() else "none"
    return digest(*sorted(processor), *platform.libc_ver(), huge, platform.python_version(), *versions)


def read_code(*names: str) -> str:
    """A digest that comments and layout do not change."""
    return digest(*(ast.unparse(ast.parse((HERE / name).read_text())) for name in names))


def prepare_rows(cases: Sequence[zoo.Case]) -> dict[str, Row]:
    """Rows of the results file with what of them still holds, and empty ones for the rest."""
    earlier = read_rows()
    kept = {row["row"] for row in results_file.kept_rows(NAME)}
    surroundings = describe_surroundings()
    plain = read_code("zoo.py", "zoo_networks.py", "footprint_child.py")
    peers = read_code("zoo.py", "zoo_networks.py", "footprint_peers.py")
    tools = [importlib.metadata.version(name) for name in ("accelerate", "torch-kitsune")]
    rows: dict[str, Row] = {}
    for case in cases:
        old = earlier.get(case.name, {})
        described = {"kind": case.kind, "held_out": case.held_out, "precision": case.precision}
        rows[case.name] = {
            "row": case.name,
            **described,
            "measured": _still(old.get("measured"), digest(case.fingerprint(), surroundings, plain)),
            "peers": _still(old.get("peers"), digest(case.fingerprint(), surroundings, peers, *tools)),
            **_estimate_of(old, case.name in kept),
        }
    llama = footprint_estimate.LLAMA
    rows[llama] = {"row": llama, **_estimate_of(earlier.get(llama, {}), llama in kept)}
    return rows


def write_rows(rows: dict[str, Row], bounds: Sequence[dict[str, Any]] = (), *, fresh: bool = False) -> Path:
    """Write the rows that have been begun, and take over what other invocations have filled meanwhile unless `fresh`."""
    results_file.RESULTS.mkdir(exist_ok=True)
    folder = os.open(results_file.RESULTS, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        if not fresh:
            adopt(rows, read_rows())
        begun = [row for row in rows.values() if is_begun(row)]
        return results_file.write_results(NAME, begun, bounds)
    finally:
        os.close(folder)


def read_rows() -> dict[str, Row]:
    path = results_file.RESULTS / f"{NAME}.json"
    return {row["row"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}


def adopt(rows: dict[str, Row], others: dict[str, Row]) -> None:
    """Fill gaps in `rows`, in place since jobs hold on to their parts."""
    for name in rows.keys() & others.keys():
        mine, theirs = rows[name], others[name]
        for part in ("measured", "peers"):
            if part in mine and theirs.get(part, {}).get("key") == mine[part]["key"]:
                for entry, value in theirs[part].items():
                    held = mine[part].setdefault(entry, value)
                    if entry == "glibc":
                        held.extend(value[len(held) :])
        if mine["estimate"] is None and theirs["estimate"] is not None:
            mine.update({key: theirs[key] for key in ("commit", "date", "estimate")})


def _still(part: dict[str, Any] | None, key: str) -> dict[str, Any]:
    return part if part is not None and part["key"] == key else {"key": key}


def _estimate_of(old: Row, kept: bool) -> Row:
    """With the commit that it was made at; without it where it is to be made anew, so that the row is stamped then."""
    return {name: old[name] for name in ("commit", "date", "estimate")} if kept and old.get("estimate") else {"estimate": None}


# Figures.


def errors_of(row: Row) -> dict[str, float] | None:
    """Relative errors of the estimate, None while a part of the row is missing; infinite where delest raised."""
    measured, found = row["measured"], row["estimate"]
    if found is None or not measured.keys() >= {"mmap", "events"}:
        return None
    if "raised" in found:
        return {"peak": math.inf, "allocated": math.inf}
    peak = found["mmap"]["peak_bytes"] / measured["mmap"]["peak_bytes"] - 1
    return {"peak": peak, "allocated": found["exact"]["allocated_bytes"] / measured["events"]["allocated_peak_bytes"] - 1}


def glibc_of(row: Row) -> dict[str, Any] | None:
    """Whether the median of the processes lies in the interval, and the interval's width over its midpoint, above idle."""
    taken, found = row["measured"].get("glibc", []), row["estimate"]
    if found is None or len(taken) < GLIBC_PROCESSES:
        return None
    if "raised" in found:
        return {"inside": False, "width": math.inf}
    low, high = found["glibc"]["low_bytes"], found["glibc"]["high_bytes"]
    measured = statistics.median(answer["peak_bytes"] for answer in taken)
    return {"inside": low <= measured <= high, "width": 2 * (high - low) / (high + low)}


def bounds_of(rows: Sequence[Row], group: str) -> list[dict[str, Any]]:
    """Of rows that are all complete."""
    errors = [error for row in rows if (error := errors_of(row))]
    intervals = [interval for row in rows if (interval := glibc_of(row))]
    if not rows or len(errors) < len(rows) or len(intervals) < len(rows):
        return []
    silent = [row["row"] for row in rows if "raised" in row["estimate"]]
    bounds = [results_file.bound_at_most(f"{group}: cases without an estimate", len(silent), 0)]
    if silent:  # JSON has no infinity: the figures of such a table are no figures
        return bounds
    sizes = sorted(abs(error["peak"]) for error in errors)
    seconds = [row["estimate"]["mmap"]["seconds"] for row in rows]
    ninetieth = sizes[math.ceil(0.9 * len(sizes)) - 1]
    return [
        *bounds,
        results_file.bound_at_most(f"{group}: error of the peak, median", statistics.median(sizes), BOUNDS["median"]),
        results_file.bound_at_most(f"{group}: error of the peak, 90th percentile", ninetieth, BOUNDS["90th percentile"]),
        results_file.bound_at_most(f"{group}: error of the peak, worst", sizes[-1], BOUNDS["worst"]),
        results_file.bound_at_least(f"{group}: peak, lowest", min(error["peak"] for error in errors), BOUNDS["lowest"]),
        results_file.bound_at_most(
            f"{group}: error of the allocator's peak, median",
            statistics.median(abs(error["allocated"]) for error in errors),
            BOUND_ALLOCATED,
        ),
        results_file.bound_at_least(
            f"{group}: inside the interval under default glibc",
            sum(interval["inside"] for interval in intervals),
            round(BOUND_INSIDE * len(rows)),
        ),
        results_file.bound_at_most(
            f"{group}: widest such interval", max(interval["width"] for interval in intervals), BOUND_WIDTH
        ),
        results_file.bound_at_most(f"{group}: seconds to estimate, median", statistics.median(seconds), BOUND_SECONDS),
    ]


def llama_bounds_of(row: Row) -> list[dict[str, Any]]:
    found = row["estimate"]
    if found is None or "raised" in found:
        return []
    name, seconds = footprint_estimate.LLAMA, found["mmap"]["seconds"]
    return [
        results_file.bound_at_most(f"{name}: seconds to estimate", seconds, BOUND_LLAMA_SECONDS),
        results_file.bound_at_most(f"{name}: resident bytes of that process", found["resident_bytes"], BOUND_LLAMA_BYTES),
    ]


# The table.


def print_table(rows: Sequence[Row]) -> None:
    """MB and relative errors; a peer's error is against the same measured peak, `raises` where it does not answer."""
    peers = list(footprint_peers.PEERS)
    titles = ["measured", "delest", "allocator", "glibc", "interval", "seconds", *peers]
    print(f"{'case':28}" + "".join(f"{title:>{max(11, len(title) + 2)}}" for title in titles))
    for row in rows:
        cells = [cell.rjust(max(11, len(title) + 2)) for title, cell in zip(titles, cells_of(row, peers), strict=True)]
        print(f"{row['row'] + (' *' if row['held_out'] else ''):28}{''.join(cells)}")
    print("* held out: no rule was set by it")


def cells_of(row: Row, peers: Sequence[str]) -> list[str]:
    measured, found, answers = row["measured"], row["estimate"], row["peers"].get("answers", {})
    errors, interval = errors_of(row), glibc_of(row)
    raised = found is not None and "raised" in found
    peak = measured.get("mmap", {}).get("peak_bytes")
    taken = [answer["peak_bytes"] for answer in measured.get("glibc", [])]
    return [
        f"{peak / 1e6:.0f} MB" if peak else "",
        "raises" if raised else f"{100 * errors['peak']:+.1f} %" if errors else "",
        f"{100 * errors['allocated']:+.2f} %" if errors and not raised else "",
        f"{statistics.median(taken) / 1e6:.0f} MB" if taken else "",
        ("in" if interval["inside"] else "OUT") + f" {100 * interval['width']:.0f} %" if interval and not raised else "",
        f"{found['mmap']['seconds']:.1f}" if found and not raised else "",
        *(_peer_cell(answers.get(peer, answers), peak) for peer in peers),
    ]


def _peer_cell(answer: dict[str, Any], peak: int | None) -> str:
    if "raised" in answer:
        return "raises"
    return f"{100 * (answer['bytes'] / peak - 1):+.0f} %" if peak and "bytes" in answer else ""


def print_bounds(bounds: Sequence[dict[str, Any]]) -> None:
    for bound in bounds:
        verdict = "kept" if bound["ok"] else "NOT KEPT"
        print(f"{bound['name']}: {bound['value']:.4g}, bound {bound['bound']:.4g}: {verdict}")


def main() -> None:
    extra = [case for case in zoo.load_cases(extra=True) if case.precision != "bf16" or has_bf16()]
    cases = [*zoo.load_cases(), *extra]
    options = results_file.read_options(
        __doc__.splitlines()[0],
        [*(case.name for case in cases), footprint_estimate.LLAMA],
        cases="tuning or held_out; all by default",
        parts="measured, peers, estimate: some of them, with commas between; all by default",
        processes="how many at once; 2 by default",
    )
    rows = prepare_rows(cases)
    chosen = [case for case in cases if case.name in options.only and is_chosen(case, options.cases)]
    llama = footprint_estimate.LLAMA in options.only and options.cases is None
    parts = (options.parts or "measured,peers,estimate").split(",")

    write_rows(rows, fresh=True)
    jobs = list_jobs(rows, chosen, parts, llama)
    run_jobs(jobs, int(options.processes or 2), time.monotonic() + 60 * options.minutes, lambda: write_rows(rows))
    forty = [rows[case.name] for case in zoo.load_cases()]
    held_out = [row for row in forty if row["held_out"]]
    groups = [
        *bounds_of(forty, "all forty"),
        *bounds_of(held_out, "held out"),
        *llama_bounds_of(rows[footprint_estimate.LLAMA]),
    ]
    whole = {bound["name"].split(":")[0] for bound in groups} == {"all forty", "held out", footprint_estimate.LLAMA}
    path = write_rows(rows, groups if whole else [])
    print_table([rows[case.name] for case in chosen])
    print_bounds(groups if whole else bounds_of([rows[case.name] for case in chosen if case not in extra], "these"))
    print(f"written to {path}")


def is_chosen(case: zoo.Case, group: str | None) -> bool:
    return group is None or case.held_out == (group == "held_out")


def is_begun(row: Row) -> bool:
    return bool(row["estimate"] or len(row.get("measured", {})) > 1 or len(row.get("peers", {})) > 1)


def has_bf16() -> bool:
    """Whether the processor computes in bf16 itself; elsewhere each product is converted, tenfold slower."""
    return any(flag in Path("/proc/cpuinfo").read_text() for flag in ("avx512_bf16", "amx_bf16"))


if __name__ == "__main__":
    main()
