"""Records as plain text for the terminal: a verdict line, then tables at most 100 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from delest.records.footprint import Footprint
from delest.records.hardware import Diagnosis, Hardware, Roofline
from delest.records.plan import Choice, Option, Plan
from delest.records.run import Run, Summary
from delest.records.shrunk import RESTLESS, Shrunk
from delest.reporting import words
from delest.units import format_bytes, format_seconds

WIDTH = 100
CELL = 28  # longest cell of any column but the last, which wraps
MANY = 12  # rows of a list of columns or classes before the rest is counted


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = (), right: Sequence[int] = ()) -> str:
    """Aligned columns, two spaces apart; `right` columns are flush right; the last column wraps within the width."""
    cells = [
        [_short(words.clean(cell)) for cell in row[:-1]] + [words.clean(row[-1])]
        for row in ([header] if header else []) + [*rows]
    ]
    widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]))]
    left = 2 + sum(width + 2 for width in widths[:-1])
    widths[-1] = min(widths[-1], max(20, WIDTH - left))
    lines = []
    for row in cells:
        *front, last = [
            cell.rjust(width) if k in right else cell.ljust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        wrapped = textwrap.wrap(last.rstrip(), widths[-1]) if len(last) > widths[-1] else [last]
        lines.append("  " + "".join(cell + "  " for cell in front) + (wrapped[0] if wrapped else ""))
        lines.extend(" " * left + line for line in wrapped[1:])
    return "\n".join(line.rstrip() for line in lines)


def sections(verdict: str, *parts: tuple[str, Any]) -> str:
    """A verdict and, below it, the parts that have a body, each under its title."""
    texts = [f"{title}\n{body}" if title else body for title, body in parts if body]
    return "\n\n".join([verdict, *texts])


def bullets(lines: Sequence[str]) -> str:
    """Sentences as a wrapped list, the first `MANY` of them."""
    shown = [*lines[:MANY], *([f"and {len(lines) - MANY:,} more"] if len(lines) > MANY else [])]
    return "\n".join(textwrap.fill(words.clean(line), WIDTH, initial_indent="  - ", subsequent_indent="    ") for line in shown)


def summary_text(summary: Summary) -> str:
    """What `inspect` saw: rows, splits, columns, classes, notes."""
    what = {"images": "rows of images", "table": "rows of a table", "arrays": "rows of arrays", "text": "windows of text"}[
        summary.kind
    ]
    target = (
        f", {len(summary.classes)} classes"
        if summary.classes
        else f", target {summary.target}"
        if summary.target
        else ", no target"
    )
    problems = f", {len(summary.left_out):,} left out" if summary.left_out else ""
    facts = [
        ("source", summary.source),
        ("splits", ", ".join(f"{role} {count:,}" for role, count in summary.splits.items())),
        ("one row", f"{format_bytes(summary.row_bytes)} as the model receives it"),
        *(
            (f"baseline {words.metric_words(name)}", words.format_metric(name, value))
            for name, value in summary.baseline.items()
        ),
    ]
    return sections(
        words.clean(f"usable: {summary.rows:,} {what}{target}{problems}"),
        ("", table(facts)),
        ("columns", _columns(summary)),
        ("classes", _counts(summary.classes)),
        ("notes", bullets(summary.notes)),
        ("left out", bullets(summary.left_out)),
    )


def plan_text(plan: Plan) -> str:
    """What `train` would do, what it saves and costs, and what was turned down."""
    parts = -(-plan.batch_size // plan.micro_batch)
    split = f" in {parts} parts of {plan.micro_batch:,}" if parts > 1 else ""
    facts = [("batch", f"{words.format_count(plan.batch_size, 'row')}{split}"), ("device", _device(plan))]
    for name, footprint in (("predicted peak", plan.predicted), ("without methods", plan.plain)):
        if footprint is not None:
            facts.append((name, _footprint(footprint)))
    choices = [
        (
            choice.method,
            _or_blank(format_bytes, choice.saved_bytes),
            _or_blank(format_seconds, choice.cost_seconds),
            choice.keeps,
            _reason(choice),
        )
        for choice in plan.choices
    ]
    return sections(
        words.fit_words(plan),
        ("", table(facts)),
        ("note", "\n".join(textwrap.fill(note, 118, initial_indent="  ", subsequent_indent="  ") for note in plan.notes)),
        ("methods", choices and table(choices, ("method", "saves", "costs a step", "results", "why"), right=(1, 2))),
        ("turned down", plan.rejected and table([(item.method, item.why) for item in plan.rejected])),
        ("real steps", _real_steps(plan)),
        ("runners-up", table(_options(plan, plan.considered[1:]), _OPTION_HEADER, right=(0, 1)) if plan.considered[1:] else ""),
        (
            "least memory to shortest step",
            table(_options(plan, plan.frontier), _OPTION_HEADER, right=(0, 1)) if plan.frontier else "",
        ),
        ("", words.more_memory_words(plan)),
        ("in a script of your own", textwrap.indent(plan.code.rstrip(), "  ")),
    )


def _real_steps(plan: Plan) -> str:
    """What was measured of the plan and the fastest others, beside what was expected."""
    rows = [
        (
            format_bytes(one.measured_bytes),
            format_bytes(one.peak_bytes),
            format_seconds(one.measured_seconds),
            format_seconds(one.step_seconds),
            words.option_words(plan, one),
        )
        for one in plan.considered
        if one.measured_bytes is not None and one.measured_seconds is not None
    ]
    return table(rows, ("peak", "expected", "a step", "expected", "how"), right=(0, 1, 2, 3)) if rows else ""


def explained_text(plan: Plan, method: str, about: str) -> str:
    """One method: what it is, what was decided about it for this plan and why, what it does to the results."""
    choice = next((one for one in plan.choices if one.method == method), None)
    against = [one.why for one in plan.rejected if one.method == method]
    verdict = f"{method}: chosen" if choice else f"{method}: not chosen"
    figures = [
        ("why", choice.why if choice else "; ".join(against) or _unconsidered(plan)),
        *([("settings", words.pairs_words(choice.config))] if choice and choice.config else []),
        *([("saves", format_bytes(choice.saved_bytes))] if choice and choice.saved_bytes is not None else []),
        *([("costs a step", format_seconds(choice.cost_seconds))] if choice and choice.cost_seconds is not None else []),
        *([("results", choice.keeps)] if choice else []),
    ]
    return sections(verdict, ("", table(figures)), ("what it is", textwrap.indent(about, "  ")))


def _unconsidered(plan: Plan) -> str:
    if plan.micro_batch < plan.batch_size:
        return "it was not considered: the step is short, and a batch in parts fits"
    return "it was not needed: the plain step fits"


_OPTION_HEADER = ("peak", "a step", "results", "how")


def _options(plan: Plan, options: Sequence[Option]) -> list[tuple[str, str, str, str]]:
    return [
        (format_bytes(one.peak_bytes), format_seconds(one.step_seconds), one.keeps, words.option_words(plan, one))
        for one in options
    ]


def run_text(run: Run) -> str:
    """How a run ended, what it took, and where its files are."""
    facts = [("parameters", words.format_parameters(run.parameters)), ("trained", _trained(run))]
    if run.best is not None:
        score = words.format_metric(run.metric, run.best.score)
        facts.append(
            ("best", f"epoch {run.best.epoch:.4g}, step {run.best.step:,}: validation {words.metric_words(run.metric)} {score}")
        )
    facts.extend(
        (split, words.scores_words(scores)) for split, scores in (("validation", run.validation), ("test", run.test)) if scores
    )
    if run.seconds:
        stages = ", ".join(f"{stage} {format_seconds(seconds)}" for stage, seconds in run.seconds.items() if stage != "wall")
        facts.append(("time", f"{format_seconds(words.whole_seconds(run))}: {stages}"))
    if preview := words.preview_words(run):
        facts.append(("preview", preview))
    if run.plan is not None and run.plan.predicted is not None:
        facts.append(("predicted peak", _footprint(run.plan.predicted)))
    if run.measured is not None:
        facts.append(("measured peak", _footprint(run.measured)))
    facts.extend(("decision", words.decision_words(row)) for row in run.decisions)
    facts.append(("files", str(run.path)))
    return sections(words.run_verdict(run), ("", table(facts)))


def shrunk_text(shrunk: Shrunk) -> str:
    """The candidates side by side, which ships, and why the others do not."""
    batches = sorted({batch for candidate in shrunk.candidates for batch in candidate.latency_seconds})
    header = (
        "form",
        "size",
        *(f"batch {batch}" for batch in batches),
        words.metric_words(shrunk.metric),
        "drop at most",
        "kept",
    )
    rows = [
        (
            candidate.name,
            format_bytes(words.stored_bytes(candidate)),
            *(_or_blank(format_seconds, candidate.latency_seconds.get(batch)) for batch in batches),
            words.format_metric(shrunk.metric, candidate.selection.get(shrunk.metric), 2),
            "" if candidate.bound is None else words.upper_words(shrunk.metric, candidate.bound),
            "ships" if candidate.name == shrunk.shipped else "yes" if candidate.kept else "no",
        )
        for candidate in shrunk.candidates
    ]
    reasons = [(candidate.name, candidate.why) for candidate in shrunk.candidates if candidate.why]
    rows_used = next((candidate.bound.rows for candidate in shrunk.candidates if candidate.bound), None)
    reasons += [(stage.name, f"taken back: {stage.why}") for stage in shrunk.stages if not stage.accepted]
    facts = [
        ("fastest", shrunk.fast if shrunk.fast != shrunk.shipped else ""),
        ("smallest", shrunk.small if shrunk.small != shrunk.shipped else ""),
        ("test", words.scores_words(shrunk.test)),
        ("threads", str(shrunk.threads)),
        ("proof", f"95 % paired bound on {rows_used:,} {shrunk.judged_on} rows" if rows_used else ""),
        (
            "timing",
            f"restless: answers vary by {shrunk.spread:.0%}, measure again on a quiet machine"
            if shrunk.spread > RESTLESS
            else "",
        ),
        ("files", str(shrunk.path)),
    ]
    return sections(
        words.shrunk_verdict(shrunk),
        ("", table(rows, header, right=range(1, len(header) - 1))),
        ("", table(reasons) if reasons else ""),
        ("", table([fact for fact in facts if fact[1]])),
    )


def diagnosis_text(diagnosis: Diagnosis) -> str:
    """The checks of `doctor`, what to do where one does not hold, and the machine."""
    failed = [check for check in diagnosis.checks if not check.ok]
    count = len(diagnosis.checks)
    verdict = (
        f"{len(failed)} of {words.format_count(count, 'check')} failed"
        if failed
        else f"ready: {words.format_count(count, 'check')} passed"
    )
    checks = []
    for check in diagnosis.checks:
        checks.append(("ok" if check.ok else "FAILED", check.name, check.detail))
        if not check.ok and check.remedy:
            checks.append(("", "", f"remedy: {check.remedy}"))
    extras = [
        (name, "installed" if there else f"not installed (pip install 'delest[{name}]')")
        for name, there in diagnosis.extras.items()
    ]
    machine = [*words.machine_facts(diagnosis.hardware), *_memory_beside(diagnosis.hardware)]
    cleared = "" if diagnosis.cleared_bytes is None else f"the cache was emptied: {format_bytes(diagnosis.cleared_bytes)} freed"
    return sections(
        verdict,
        ("", cleared),
        ("", checks and table(checks)),
        ("machine", table(machine)),
        ("reached", diagnosis.roofline and table(_roofline_facts(diagnosis.roofline))),
        ("versions", diagnosis.versions and table(list(diagnosis.versions.items()))),
        ("extras", extras and table(extras)),
    )


def _memory_beside(hardware: Hardware) -> list[tuple[str, str]]:
    """Caches and swap space, where there are any."""
    caches = ", ".join(f"{level} {format_bytes(size)}" for level, size in hardware.cache_bytes.items())
    swap = format_bytes(hardware.swap_bytes) if hardware.swap_bytes else ""
    return [fact for fact in (("caches", caches), ("swap", swap)) if fact[1]]


def _roofline_facts(roofline: Roofline) -> list[tuple[str, str]]:
    """What kernels and memory reach: a row for each kind, its formats side by side."""
    rates: dict[str, list[str]] = {}
    for name, flops in roofline.flops.items():
        kind, _, precision = name.rpartition(".")
        rates.setdefault(kind, []).append(f"{precision} {_rate(flops)}FLOP/s")
    memory = (("reused", roofline.reused_bytes), ("fresh", roofline.fresh_bytes), ("in the cache", roofline.cached_bytes))
    facts = [(kind, ", ".join(by_format)) for kind, by_format in rates.items()]
    facts.append(("memory", ", ".join(f"{name} {_rate(speed)}B/s" for name, speed in memory)))
    if roofline.host_to_device_bytes is not None:
        facts.append(("host to device", f"{_rate(roofline.host_to_device_bytes)}B/s"))
    facts.append(("small operator", format_seconds(roofline.overhead_seconds)))
    threads = "" if roofline.threads is None else f", {words.format_count(roofline.threads, 'thread')}"
    return [*facts, ("source", f"{roofline.basis}{threads}: {roofline.source}")]


def _rate(amount: float) -> str:
    """An amount a second, three digits, with the letter of its power of a thousand."""
    for letter in ("", "k", "M", "G"):
        if amount < 999.5:
            return f"{amount:.3g} {letter}"
        amount /= 1000
    return f"{amount:.3g} T"


def _short(cell: str) -> str:
    return cell if len(cell) <= CELL else cell[: CELL - 1] + "…"


def _columns(summary: Summary) -> str:
    if not summary.columns:
        return ""
    rows = [
        (
            str(column["name"]),
            str(column.get("kind", "")),
            " x ".join(str(side) for side in column.get("shape") or ()),
            str(column.get("dtype", "")),
            f"{column.get('missing') or 0:,}",
            ", ".join(
                f"{key} {words.format_number(column[key])}"
                for key in ("mean", "std", "low", "high")
                if isinstance(column.get(key), int | float)
            ),
        )
        for column in summary.columns[:MANY]
    ]
    more = len(summary.columns) - MANY
    return table(rows, ("name", "kind", "shape", "dtype", "missing", "values"), right=(4,)) + (
        f"\n  and {more:,} more" if more > 0 else ""
    )


def _counts(classes: dict[str, int] | None) -> str:
    if not classes:
        return ""
    total, most = sum(classes.values()) or 1, max(classes.values()) or 1
    rows = [
        (name, f"{count:,}", f"{100 * count / total:.1f} %", "#" * round(30 * count / most)) for name, count in classes.items()
    ]
    more = len(rows) - MANY
    return table(rows[:MANY], right=(1, 2)) + (f"\n  and {more:,} more" if more > 0 else "")


def _device(plan: Plan) -> str:
    return plan.device if plan.threads is None else f"{plan.device}, {words.format_count(plan.threads, 'thread')}"


def _footprint(footprint: Footprint) -> str:
    text = format_bytes(footprint.peak_bytes)
    if footprint.low_bytes != footprint.high_bytes:
        text += f" ({words.interval_words(footprint.low_bytes, footprint.high_bytes)})"
    pace = "" if footprint.step_seconds is None else f", {format_seconds(footprint.step_seconds)} a step"
    return f"{text}{pace}"


def _or_blank(form: Callable[[float], str], value: float | None) -> str:
    return "" if value is None else form(value)


def _reason(choice: Choice) -> str:
    return f"{words.pairs_words(choice.config)}: {choice.why}" if choice.config else choice.why


def _trained(run: Run) -> str:
    reason = words.stop_words(run)
    return f"{words.format_count(run.epochs, 'epoch')}, {words.format_count(run.steps, 'step')}" + (
        f"; ended because {reason}" if reason else ""
    )
