"""Published measurements on single GPUs beside what is predicted for them, without a GPU.

    python benchmarks/published.py --data published_gpu_training.csv

The table is of 210 published measurements; here are those on one GPU that are graded A or A- for memory (training steps, and
single operators as a second group) or for step time. Each row is built with its model's dimensions, traced on fake tensors within
`as_cuda`, replayed and timed (docs/methods/published.md says what is assumed). What a number includes differs: `max_memory_allocated`, or
all that the driver shows. Step times are predicted at a device's efficiency, set from its first two rows in file order; those are
listed apart and not counted. Rows that lack a field are listed with it. A complete table is also written there.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import re
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import published_rows
import results_file
from published_rows import Row, RowLoop

from delest import storage
from delest.backends.torch.as_cuda import as_cuda
from delest.backends.torch.trace import trace_loop
from delest.footprint import cuda
from delest.footprint.replay import replay
from delest.footprint.time import STEADY, operator_seconds
from delest.hardware.catalogue import find_device, roofline_of
from delest.records.hardware import Device, Roofline
from delest.records.trace import Trace

GOOD = ("A", "A-")
FIRST = 2  # rows of a device that set its factor
LEAST_ROWS = 3  # that are traced: one row alone takes other paths through the framework
MEDIAN_BYTES, WORST_BYTES, MEDIAN_SECONDS = 0.08, 0.20, 0.30
PAGE = Path(__file__).parent.parent / "docs" / "methods" / "published.md"
BEGIN, END = "<!-- published: begin -->", "<!-- published: end -->"  # the table between them is written anew
_NOT_IN_A_TRACE = ("row", "batch_per_gpu", "grad_accum", "compile", "notes", "source_path", "source_date", "framework")


def main() -> None:
    options = results_file.read_options(str(__doc__).splitlines()[0], [], data="the table of measurements, a CSV file")
    if not options.data:
        sys.exit("published: no --data: give the path of published_gpu_training.csv.")
    table = read_table(Path(options.data))
    considered = [row for row in table if is_considered(row)]
    rows = {row["row"]: row for row in results_file.kept_rows("published")}
    started = time.monotonic()
    for row in considered:
        if name_of(row) in rows:
            continue
        if time.monotonic() - started > 60 * options.minutes:
            break
        rows[name_of(row)] = predict(row, considered)
        results_file.write_results("published", list(rows.values()), [])
    in_order = [rows[name_of(row)] for row in considered if name_of(row) in rows]
    in_order = apply_factors(in_order)
    bounds = bounds_of(in_order) if len(in_order) == len(considered) else []
    path = results_file.write_results("published", in_order, bounds)
    show(in_order, bounds)
    if bounds:
        write_table(in_order)
    print(f"written to {path}")


def read_table(path: Path) -> list[Row]:
    """Its rows, each with `row`: the line that it has in the file."""
    with path.open(newline="") as file:
        return [{"row": str(line), **row} for line, row in enumerate(csv.DictReader(file), start=2)]


def is_considered(row: Row) -> bool:
    return row["n_gpus"] == "1" and (counts_for_memory(row) or row["time_grade"] in GOOD)


def counts_for_memory(row: Row) -> bool:
    return row["mem_grade"] in GOOD or published_rows.is_operator(row)


def name_of(row: Row) -> str:
    return f"line {row['row']}: {row['model'].removeprefix('OPERATOR ')}, {row['precision']}, batch {row['batch_per_gpu']}"


def predict(row: Row, considered: Sequence[Row]) -> dict[str, Any]:
    """What is published of a row and what is predicted, before a device's factor; or the fields that it lacks."""
    told = {
        "row": name_of(row),
        "line": int(row["row"]),
        "device": row["gpu"],
        "group": "operator" if published_rows.is_operator(row) else "training",
        "optimizer": row["optimizer"],
        "checkpoints": row["act_ckpt"],
        "form": row["compile"],
    }
    missing = published_rows.missing_fields(row)
    if missing:
        return {**told, "missing": missing}
    alike = [other for other in considered if _key(other) == _key(row)]
    trace = _trace(_key(row), max(int(other["batch_per_gpu"]) for other in alike), row)
    device, count = find_device(row["gpu"]), int(row["batch_per_gpu"])
    if counts_for_memory(row):
        told |= _compare("bytes", predicted_bytes(row, trace, device, count), float(row["mem_gib"]) * 2**30)
        told["counted_as"] = row["mem_kind"]
    if row["time_grade"] in GOOD:
        told |= {"plain_seconds": predicted_seconds(row, trace, device, count), "published_seconds": float(row["step_time_s"])}
    return told


def _compare(unit: str, predicted: float, published: float) -> dict[str, float]:
    return {f"predicted_{unit}": predicted, f"published_{unit}": published, f"{unit}_error": predicted / published - 1}


def _key(row: Row) -> tuple[tuple[str, str], ...]:
    """What a trace depends on, whatever the batch."""
    numbers = ("mem", "step", "throughput", "time", "oom", "params", "gpu_")
    kept = {name: text for name, text in row.items() if name not in _NOT_IN_A_TRACE and not name.startswith(numbers)}
    kept["optimizer"] = row["optimizer"].partition(";")[0]
    kept["version"] = str(published_rows.torch_version(row))
    kept["last"] = str("NHWC" in row["compile"])
    return tuple(sorted(kept.items()))


_row_of_key: dict[tuple[tuple[str, str], ...], Row] = {}


def _trace(key: tuple[tuple[str, str], ...], count: int, row: Row) -> Trace:
    _row_of_key[key] = row
    return _trace_of(key, max(count, LEAST_ROWS))


@functools.lru_cache(maxsize=3)
def _trace_of(key: tuple[tuple[str, str], ...], count: int) -> Trace:
    row = _row_of_key[key]
    setup, version = published_rows.setup_of(row), published_rows.torch_version(row)
    with as_cuda(find_device(row["gpu"]).capability, version):
        return trace_loop(lambda mode: RowLoop(setup), count, scratch=cuda.scratch)


def predicted_bytes(row: Row, trace: Trace, device: Device, count: int) -> int:
    """What the row's own measure would show: allocated, or the whole device with the context that the row states."""
    version, products = published_rows.torch_version(row), "matmul" in trace.operators.kind
    workspaces = cuda.workspace_bytes(device.capability, torch_version=version) if products else 0
    driver = "NVML" in row["mem_kind"]
    phases = replay(trace, rows=count, allocator="cuda" if driver else "exact").phases
    found = max(phases["first_step"], phases["steady_step"]) + workspaces
    if driver:
        stated = re.search(r"(\d+) MiB before model", row["mem_kind"])
        found += int(stated[1]) << 20 if stated else cuda.context_bytes(device.capability, torch_version=version)
    return found


def predicted_seconds(row: Row, trace: Trace, device: Device, count: int) -> float:
    """Of the part of a step that the row timed, at the default efficiencies.

    Scratch is written and read once besides, by kernels of its own.
    """
    roofline, operators = _roofline(row, device), trace.operators
    seconds = operator_seconds(trace, roofline, rows=count, allocator="cuda")
    shares = {"forward": 1.0, "backward": 1.0, "update": published_rows.updates_in_step(row)}
    return sum(
        shares[phase] * (own + 2 * scratch / roofline.reused_bytes)
        for own, scratch, phase, step in zip(
            seconds, operators.scratch_bytes(count), operators.phase, operators.step, strict=True
        )
        if step == STEADY
    )


def _roofline(row: Row, device: Device) -> Roofline:
    if row["precision"] == "TF32":
        device = dataclasses.replace(device, flops={**device.flops, "fp32": device.flops["tf32"]})
    return roofline_of(device)


def apply_factors(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Correct predicted seconds by their device's factor: the geometric mean of published over predicted in its first rows."""
    timed: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "plain_seconds" in row:
            timed.setdefault(row["device"], []).append(row)
    found = []
    for row in rows:
        if "plain_seconds" in row:
            first = timed[row["device"]][:FIRST]
            factor = statistics.geometric_mean(one["published_seconds"] / one["plain_seconds"] for one in first)
            row = {**row, "factor": factor, "sets_the_factor": any(row is one for one in first)} | _compare(
                "seconds", factor * row["plain_seconds"], row["published_seconds"]
            )
        found.append(row)
    return found


def bounds_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    bounds = []
    for group in ("training", "operator"):
        errors = [abs(row["bytes_error"]) for row in rows if row["group"] == group and "bytes_error" in row]
        bounds += [
            results_file.bound_at_most(
                f"memory, {group} rows, median of {len(errors)}", statistics.median(errors), MEDIAN_BYTES
            ),
            results_file.bound_at_most(f"memory, {group} rows, worst", max(errors), WORST_BYTES),
        ]
    errors = [abs(row["seconds_error"]) for row in rows if "seconds_error" in row and not row["sets_the_factor"]]
    name = f"step time, median of {len(errors)} rows that set no factor"
    return [*bounds, results_file.bound_at_most(name, statistics.median(errors), MEDIAN_SECONDS)]


def write_table(rows: Sequence[dict[str, Any]], path: Path = PAGE) -> None:
    """Put every row into the document, between its two marks."""
    lines = ["| line | measured | device | GiB predicted | published | | s predicted | published | |", "|---" * 9 + "|"]
    for row in rows:
        what = row["row"].partition(": ")[2]
        what += "".join(f", {row[name]}" for name in ("optimizer", "form") if row["group"] == "training" and row[name])
        what += ", activation checkpoints" if row["checkpoints"] not in ("", "none") else ""
        if "missing" in row:
            lines.append(f"| {row['line']} | {what} | {row['device']} | left out: no {', '.join(row['missing'])} |||||")
            continue
        cells = ["", "", "", "", "", ""]
        if "bytes_error" in row:
            cells[:3] = [f"{row[f'{which}_bytes'] / 2**30:.2f}" for which in ("predicted", "published")] + [
                f"{row['bytes_error']:+.1%}"
            ]
        if "seconds_error" in row:
            error = "sets the factor" if row["sets_the_factor"] else f"{row['seconds_error']:+.1%}"
            cells[3:] = [f"{row[f'{which}_seconds']:.4f}" for which in ("predicted", "published")] + [error]
        lines.append(f"| {row['line']} | {what} | {row['device']} | " + " | ".join(cells) + " |")
    before, _, rest = path.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    storage.write_atomic(path, before + BEGIN + "\n" + "\n".join(lines) + "\n" + END + after)


def show(rows: Sequence[dict[str, Any]], bounds: Sequence[dict[str, Any]]) -> None:
    print(f"{'':76}{'GiB predicted':>14}{'published':>11}{'':>8}{'s predicted':>13}{'published':>11}")
    for row in rows:
        line = f"{row['row'][:60]:62}{row['device'][:14]:14}"
        if "missing" in row:
            print(f"{line} left out, has no {', '.join(row['missing'])}")
            continue
        memory = [row[f"{which}_bytes"] / 2**30 for which in ("predicted", "published")] if "bytes_error" in row else None
        line += f"{memory[0]:14.2f}{memory[1]:11.2f}{row['bytes_error']:+8.1%}" if memory else " " * 33
        if "seconds_error" in row:
            line += f"{row['predicted_seconds']:13.4f}{row['published_seconds']:11.4f}{row['seconds_error']:+8.1%}"
            line += " sets the factor" if row["sets_the_factor"] else ""
        print(line)
    for bound in bounds:
        print(f"{bound['name']}: {bound['value']:.1%}, at most {bound['bound']:.0%}: {'kept' if bound['ok'] else 'NOT KEPT'}")


if __name__ == "__main__":
    main()
