"""The README's table of results, made from the results files; a test holds that the README shows it as it is.

python benchmarks/table.py --write
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from shrink import BATCHES, best_rival, latency

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- results: python benchmarks/table.py --write -->", "<!-- end of results -->"


def read(name: str) -> dict[str, Any]:
    return json.loads((HERE / "results" / f"{name}.json").read_text())


def render() -> str:
    """The table in Markdown, with the machine and versions above it."""
    digits, run, startup = read("digits"), read("run"), read("startup")
    machine, versions = digits["machine"], digits["versions"]
    lines = [
        f"{machine['processor']}, {machine['cores']} cores ({', '.join(machine['instruction_sets'])}), "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, no GPU; Python {versions['python']}, torch {versions['torch']}, "
        f"ONNX Runtime {versions['onnxruntime']}, Lightning {versions.get('lightning', 'none')}. Rows marked * on another: "
        f"{', '.join(name for name in read('footprint')['machine']['instruction_sets'] if name not in machine['instruction_sets'])} besides.",
        "",
        "| what | baseline | delest | reproduce by |",
        "|---|---|---|---|",
        *_digits(digits["rows"]),
        *_run({row["row"]: row for row in run["rows"]}),
        *_footprint(read("footprint")["rows"]),
        *_step_time(read("step_time")["bounds"]),
        *_scripts(read("measure_scripts")["rows"]),
        _published(read("published")["bounds"]),
        *_shrinking(read("shrink")["rows"]),
        *_smallest({row["row"]: row for row in read("smallest_budget")["rows"]}),
        _startup({row["row"]: row for row in startup["rows"]}),
    ]
    return "\n".join(lines)


def _digits(rows: list[dict[str, Any]]) -> list[str]:
    by: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        by.setdefault(row["rival"], {})[row["seed"]] = row
    ours = by["delest train"]
    lines = []
    for peer, name in (
        ("plain", "plain PyTorch loop"),
        ("lightning", "Lightning"),
        ("plain with delest's recipe", "plain loop, delest's recipe"),
    ):
        theirs = by[peer]
        ratio = statistics.median(theirs[seed]["seconds"] / ours[seed]["seconds"] for seed in ours)
        lines.append(
            f"| official MNIST example's network, 8,000 digits, against {name} | {_seconds(theirs)}, {_accuracy(theirs)} | "
            f"**{_seconds(ours)}, {_accuracy(ours)}** ({ratio:.1f}x) | `python benchmarks/digits.py` |"
        )
    return lines


def _run(rows: dict[str, dict[str, Any]]) -> list[str]:
    digits, photos = rows["digits"], rows["cifar10"]
    torch, int8 = digits["forms"]["torch"], digits["forms"]["int8"]
    return [
        f"| `make demo`: data to trained, smaller, reported model | | **{digits['seconds']:.0f} s, {100 * digits['test_accuracy']:.1f} %**, "
        f"{digits['resident_bytes'] / 2**20:.0f} MiB resident | `python benchmarks/run.py` |",
        f"| its model's size, int8 | {torch['weights_bytes'] / 1024:.0f} KiB (fp32 weights) | **{int8['file_bytes'] / 1024:.0f} KiB** "
        f"({digits['times_smaller']:.1f}x), drop at most {100 * max(0.0, int8['bound']['upper']):.1f} points | `python benchmarks/run.py` |",
        f"| its latency, one image | {1e6 * torch['latency_seconds']['1']:.0f} µs (PyTorch eager) | **{1e6 * int8['latency_seconds']['1']:.0f} µs** "
        f"| `python benchmarks/run.py` |",
        f"| CIFAR-10, 5,000 photographs, whole run | | **{photos['resident_bytes'] / 2**20:.0f} MiB resident**, {photos['seconds']:.0f} s "
        f"| `python benchmarks/run.py --cifar10 FOLDER` |",
    ]


def _footprint(rows: list[dict[str, Any]]) -> list[str]:
    """Median and worst error of the peak under a fixed mmap threshold, delest's and MemTracker's, which is the best of the peers."""
    ours, theirs, seconds, raised = [], [], [], 0
    for row in rows:
        if row.get("precision") != "fp32" or "mmap" not in row.get("measured", {}) or "mmap" not in (row["estimate"] or {}):
            continue
        real = row["measured"]["mmap"]["peak_bytes"]
        ours.append(abs(row["estimate"]["mmap"]["peak_bytes"] / real - 1))
        seconds.append(row["estimate"]["mmap"]["seconds"])
        said = row["peers"]["answers"]["MemTracker"]
        raised += "raised" in said
        if "raised" not in said:
            theirs.append(abs(said["bytes"] / real - 1))
    return [
        f"| * peak memory of {len(ours)} trainings (CPU, fixed mmap threshold), estimated before they run: error, median and worst | {_errors(theirs)} (MemTracker; {raised} raise) "
        f"| **{_errors(ours)}**, in {statistics.median(seconds):.1f} s | `python benchmarks/footprint.py` |"
    ]


def _errors(errors: list[float]) -> str:
    return f"{100 * statistics.median(errors):.1f} %, {100 * max(errors):.0f} %"


def _step_time(bounds: list[dict[str, Any]]) -> list[str]:
    values = {bound["name"]: bound["value"] for bound in bounds}
    if not values:
        return []
    alone, probed = (values[f"{how}, all cases: median error"] for how in ("roofline alone", "one probe"))
    return [
        f"| * step time of the same trainings: median error, from rates alone and from one probe of another configuration | "
        f"| **{100 * alone:.0f} %, {100 * probed:.0f} %** | `python benchmarks/step_time.py` |"
    ]


def _scripts(rows: list[dict[str, Any]]) -> list[str]:
    """What `delest measure -- python` costs scripts of others."""
    ratios = ", ".join(f"{row['row'].partition('_')[0]} {100 * (row['ratio'] - 1):+.1f} %" for row in rows)
    return [f"| * step time of scripts that are being measured | | **{ratios}** | `python benchmarks/measure_scripts.py` |"]


def _published(bounds: list[dict[str, Any]]) -> str:
    values = {bound["name"]: bound["value"] for bound in bounds}
    median, worst = (values[f"memory, training rows, {name}"] for name in ("median of 17", "worst"))
    return (
        f"| * peak memory of 17 published GPU trainings, without a GPU: error, median and worst | | **{100 * median:.1f} %, {100 * worst:.0f} %** "
        f"| `python benchmarks/published.py --data CSV` |"
    )


def _shrinking(rows: list[dict[str, Any]]) -> list[str]:
    """What ships beside the start, and what others make of it."""
    lines = []
    for row in rows:
        start, ships = row["forms"]["start"], row["forms"][f"delest {row['ships']}"]
        rival = best_rival(row)
        other = f"; best other: {rival['name']}, {_form(rival)}" if rival else ""
        times = " and ".join(f"{latency(start, batch) / latency(ships, batch):.1f}x" for batch in BATCHES)
        lines.append(
            f"| * `delest shrink`, {row['row']}, {row['allowed']:.2g} of {row['metric']} may be lost | {_form(start)}{other} "
            f"| **{_form(ships)}** ({start['bytes'] / ships['bytes']:.1f}x; {times} as fast) | `python benchmarks/shrink.py --only {row['row']}` |"
        )
    return lines


def _form(form: dict[str, Any]) -> str:
    """Its size, and the latency of one row and of 32."""
    times = (f"{1e6 * latency(form, batch):,.0f} µs" for batch in BATCHES)
    return f"{form['bytes'] / 1024:,.0f} KiB, {' and '.join(times)}"


def _smallest(rows: dict[str, dict[str, Any]]) -> list[str]:
    """From the class of networks that gains most to the one that gains least."""
    names = {
        "vit": "vision transformer, 32 images",
        "gpt": "language model, 8 x 256 tokens of 50,257 words",
        "resnet18": "ResNet-18, 32 small images",
    }
    lines = []
    for name, words in names.items():
        row = rows[name]
        exact, free = (f"{row[how]['peak_bytes'] / 2**20:,.0f} MiB ({row[how]['factor']:.1f}x)" for how in ("exact", "any"))
        times = ", ".join(f"{row[how]['time_ratio']:.2f}" for how in ("exact", "any"))
        lines.append(
            f"| * least memory above the idle process, same effective batch: {words} | {row['plain_peak_bytes'] / 2**20:,.0f} MiB (plain, AdamW) "
            f"| **{exact} exact, {free} {_state(row['any']['methods'])}**, {times} of the time | `python benchmarks/smallest_budget.py` |"
        )
    return lines


def _state(methods: dict[str, Any]) -> str:
    if "factored_state" in methods:
        return "with a factored second moment"
    return f"with {methods['optimizer_state']['bits']}-bit moments" if "optimizer_state" in methods else "with any method"


def _startup(rows: dict[str, dict[str, Any]]) -> str:
    bare, ours = rows["bare interpreter"]["median_seconds"], rows["delest --help"]["median_seconds"]
    return f"| `delest --help` | {bare:.2f} s (bare interpreter) | **{ours:.2f} s** | `python benchmarks/startup.py` |"


def _seconds(rows: dict[int, dict[str, Any]]) -> str:
    return f"{statistics.median(row['seconds'] for row in rows.values()):.0f} s"


def _accuracy(rows: dict[int, dict[str, Any]]) -> str:
    return f"{100 * statistics.mean(row['accuracy'] for row in rows.values()):.2f} %"


def main() -> None:
    table = f"{BEGIN}\n{render()}\n{END}"
    if "--write" in sys.argv:
        text = README.read_text()
        README.write_text(text[: text.index(BEGIN)] + table + text[text.index(END) + len(END) :])
    print(table)


if __name__ == "__main__":
    main()
