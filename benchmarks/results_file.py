"""What every benchmark shares: its options, the machine and versions it ran on, and its results file.

`benchmarks/results/NAME.json` holds `machine`, `versions`, `rows` and `bounds`. A row is written when it is done, with its
commit and date, and is kept by later invocations while the code and the machine stay as they were, so that a long table can
be filled in several sittings. Bounds are computed by the benchmark from complete tables only.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from delest import storage
from delest.hardware import doctor, machine
from delest.records.form import FORMAT, to_plain

HERE = Path(__file__).parent
RESULTS = HERE / "results"
_CODE = ("src", "benchmarks/*.py", "examples", "constraints.txt")  # what a figure may depend on


def read_options(about: str, rows: Sequence[str], **more: str) -> argparse.Namespace:
    """`--only ROW` (may be repeated; all by default) and `--minutes N`, after which no further row is begun; `more` are
    further options that take a text, by name with their help."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--only", action="append", choices=rows, help="measure this row only; may be repeated")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further row after this time")
    for name, text in more.items():
        parser.add_argument(f"--{name}", help=text)
    options = parser.parse_args()
    options.only = options.only or list(rows)
    return options


def describe_machine() -> dict[str, Any]:
    """Processor, instruction sets, cores and memory, without what changes from minute to minute."""
    described = to_plain(machine.describe())
    return {name: value for name, value in described.items() if name not in ("available_bytes", "accelerators")}


def kept_rows(name: str) -> list[dict[str, Any]]:
    """Rows of an earlier invocation that still hold: same machine, and no code changed since their commit."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return []
    earlier = json.loads(path.read_text())
    return (
        [row for row in earlier["rows"] if _is_unchanged_since(row["commit"])]
        if earlier["machine"] == describe_machine()
        else []
    )


def write_results(name: str, rows: Sequence[dict[str, Any]], bounds: Sequence[dict[str, Any]]) -> Path:
    """Write `results/NAME.json`. Each row has a `row`, its name, and gets `commit` and `date` where it is new.

    Bounds are `{"name", "value", "bound", "ok"}`, also those that fall short; none while rows are missing.
    """
    stamp = {"commit": _commit(), "date": datetime.date.today().isoformat()}
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    content = {
        "format": FORMAT,
        "machine": describe_machine(),
        "versions": doctor.find_versions(),
        "rows": [{**stamp, **to_plain(row)} for row in rows],
        "bounds": [to_plain(bound) for bound in bounds],
    }
    storage.write_atomic(path, json.dumps(content, indent=2) + "\n")
    return path


def fill_table(
    name: str,
    order: Sequence[str],
    options: argparse.Namespace,
    measure: Callable[[str], dict[str, Any]],
    bounds_of: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
    show: Callable[[dict[str, Any]], None] = lambda row: None,
) -> None:
    """Measure and show the rows of `order` that were asked for and are not kept, write each when it is done, and tell the bounds once all are there."""
    rows, started = {row["row"]: row for row in kept_rows(name)}, time.monotonic()
    for one in options.only:
        if one not in rows and time.monotonic() - started < 60 * options.minutes:
            rows[one] = measure(one)
            write_results(name, [rows[other] for other in order if other in rows], [])
            show(rows[one])
    complete = [rows[one] for one in order if one in rows]
    bounds = bounds_of(complete) if len(complete) == len(order) else []
    for bound in bounds:
        print(f"{bound['name']}: {bound['value']:.4g}, bound {bound['bound']:g}: {'kept' if bound['ok'] else 'NOT KEPT'}")
    print(f"written to {write_results(name, complete, bounds)}")


def bound_at_most(name: str, value: float, bound: float) -> dict[str, Any]:
    """A promised figure that must not be exceeded."""
    return {"name": name, "value": value, "bound": bound, "ok": value <= bound}


def bound_at_least(name: str, value: float, bound: float) -> dict[str, Any]:
    """A promised figure that must be reached."""
    return {"name": name, "value": value, "bound": bound, "ok": value >= bound}


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=HERE.parent, capture_output=True, text=True)


def _commit() -> str:
    """The commit that the code is at; `+` behind it where files differ from it."""
    commit = _git("rev-parse", "--short=12", "HEAD").stdout.strip() or "none"
    return commit + ("+" if _git("status", "--porcelain", "--", *_CODE).stdout else "")


def _is_unchanged_since(commit: str) -> bool:
    """Never for rows of code that was not committed: nobody can tell what it was."""
    return not commit.endswith("+") and _git("diff", "--quiet", commit, "--", *_CODE).returncode == 0
