"""Numbers and outcomes in words, alike in the terminal and on the page."""

from __future__ import annotations

import math
from typing import Any

from delest.records.footprint import Footprint
from delest.records.hardware import Hardware
from delest.records.plan import Option, Plan
from delest.records.run import Run
from delest.records.shrunk import FRAMEWORKS, Bound, Candidate, Shrunk
from delest.units import format_bytes, format_seconds

STOPPED = {
    "epochs": "all epochs were run",
    "plateau": "the validation score stopped improving",
    "time": "the time budget was spent",
    "target": "the target was reached",
}
ABBREVIATIONS = {"auc": "AUC", "f1": "F1", "mae": "MAE", "mse": "MSE", "r2": "R²", "rmse": "RMSE"}
SAME = 1.05  # ratios nearer to 1 than this are called equal: a timing repeats no better


def clean(text: object) -> str:
    """One printable line: control characters in a user's names must not reach a terminal."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in str(text))


def is_share(metric: str) -> bool:
    """Whether a metric is a share of rows, shown in per cent."""
    return metric.endswith("accuracy")


def metric_words(metric: str) -> str:
    return ABBREVIATIONS.get(metric) or metric.replace("_", " ") or "score"


def opened(sentence: str) -> str:
    """With a capital at its beginning, the rest as it is."""
    return sentence[:1].upper() + sentence[1:]


def format_metric(metric: str, value: float | None, digits: int = 1) -> str:
    """A metric's value: per cent for shares, four significant digits for all else."""
    if value is None or not math.isfinite(value):
        return "not measured" if value is None else "not finite"
    return f"{100 * value:.{digits}f} %" if is_share(metric) else format_number(value)


def format_number(value: float) -> str:
    """Four significant digits; whole with separators from a thousand on."""
    return f"{value:,.0f}" if 1_000 <= abs(value) < 1e9 else f"{value:.4g}"


def format_drop(metric: str, value: float) -> str:
    """A difference of two values of a metric: percentage points without their unit for shares."""
    if not math.isfinite(value):
        return "unknown"
    return f"{100 * value:.2f}".rstrip("0").rstrip(".") if is_share(metric) else f"{value:.3g}"


def format_count(value: float, noun: str) -> str:
    """ "1 row", "2,000 rows"."""
    return f"{value:,.4g} {noun}" + ("" if value == 1 else "s") if value < 1000 else f"{value:,.0f} {noun}s"


def format_parameters(count: int) -> str:
    for size, unit in ((1e9, "billion"), (1e6, "million")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:,}"


def ratio_words(before: float, after: float, less: str, more: str, same: str) -> str:
    """ "3.9 times smaller", "1.2 times larger" or, within 5 %, the words for equality."""
    if before <= 0 or after <= 0 or 1 / SAME < before / after < SAME:
        return same
    ratio, what = (before / after, less) if before > after else (after / before, more)
    return f"{f'{ratio:.1f}'.removesuffix('.0') if ratio < 9.95 else f'{ratio:,.0f}'} times {what}"


def headline_score(run: Run) -> tuple[str, float] | None:
    """The split that is spoken of, test where there is one, and its score; None before any evaluation."""
    for split, scores in (("test", run.test), ("validation", run.validation)):
        if run.metric in scores:
            return split, scores[run.metric]
    return None


def split_rows(run: Run, split: str) -> int | None:
    return run.data.splits.get(split) if run.data else None


def training_seconds(run: Run) -> float | None:
    return run.seconds.get("training")


def status_words(run: Run) -> str | None:
    """What to say of a run that did not end well or has not ended; None for one that is done."""
    after = f" after {format_count(run.epochs, 'epoch')}"
    return {
        "running": "still training" + after,
        "interrupted": "interrupted" + after + ", resumable",
        "diverged": "diverged" + after,
        "failed": "failed" + after,
    }.get(run.status)


def judged_words(metric: str, value: float) -> str:
    """ "98.2 % accuracy", "rmse 31,250"."""
    shown, name = format_metric(metric, value), metric_words(metric)
    return f"{shown} {name}" if is_share(metric) else f"{name} {shown}"


def score_words(run: Run) -> str:
    """ "98.2 % accuracy on 1,000 test rows"."""
    headline = headline_score(run)
    if headline is None:
        return "nothing evaluated yet"
    split, score = headline
    count = split_rows(run, split)
    where = f"{count:,} {split} rows" if count else f"the {split} rows"
    return f"{judged_words(run.metric, score)} on {where}"


def run_verdict(run: Run) -> str:
    """ "98.2 % accuracy on 1,000 test rows (validation 97.9 %), trained in 41 s, peak 530 MiB"."""
    headline = headline_score(run)
    parts = [score_words(run)]
    if headline is not None and headline[0] == "validation":
        parts[0] += " (no test rows)"
    elif run.metric in run.validation:
        parts[0] += f" (validation {format_metric(run.metric, run.validation[run.metric])})"
    seconds = training_seconds(run)
    if seconds is not None:
        parts.append(f"trained in {format_seconds(seconds)}")
    if run.measured is not None:
        parts.append(f"peak {format_bytes(run.measured.peak_bytes)}")
    status = status_words(run)
    return clean(", ".join([f"{status}: {parts[0]}" if status else parts[0], *parts[1:]]))


def whole_seconds(run: Run) -> float:
    """All stages together; "wall" is a clock over some of them."""
    return sum(seconds for stage, seconds in run.seconds.items() if stage != "wall")


def preview_words(run: Run) -> str | None:
    """What the preview foretold of the full run."""
    if not run.preview:
        return None
    seconds, peak = format_seconds(run.preview["full_seconds"]), format_bytes(run.preview["peak_bytes"])
    return f"a preview on {100 * run.preview['share']:.3g} % of the rows foretold {seconds} and {peak}"


def stop_words(run: Run) -> str | None:
    if run.stopped_by is None:
        return None
    return STOPPED.get(run.stopped_by, clean(run.stopped_by))


def reference(shrunk: Shrunk) -> Candidate | None:
    """The trained model as it was: the candidate that has no bound, since bounds are against it."""
    plain = [candidate for candidate in shrunk.candidates if candidate.bound is None]
    return next((candidate for candidate in plain if candidate.name in FRAMEWORKS), plain[0] if plain else None)


def shipped(shrunk: Shrunk) -> Candidate | None:
    return next((candidate for candidate in shrunk.candidates if candidate.name == shrunk.shipped), None)


def stored_bytes(candidate: Candidate) -> int:
    """What it takes on disk; for the framework its weights."""
    return candidate.weights_bytes if candidate.file_bytes is None else candidate.file_bytes


def gain_words(shrunk: Shrunk) -> list[str]:
    """What shipping changes from the trained model: size and, at the smallest measured batch, speed."""
    before, after = reference(shrunk), shipped(shrunk)
    if before is None or after is None or before is after:
        return []
    gains = [ratio_words(stored_bytes(before), stored_bytes(after), "smaller", "larger", "the same size")]
    shared = sorted(before.latency_seconds.keys() & after.latency_seconds.keys())
    if shared:
        gains.append(f"{_speed_words(before, after, shared[0])} at batch {shared[0]}")
    return gains


def _speed_words(before: Candidate, after: Candidate, batch: int) -> str:
    """The ratio of medians, unless the quartiles overlap: then the machine was too restless to tell them apart."""
    one, other = before.latency_seconds[batch], after.latency_seconds[batch]
    first, second = before.latency_spread.get(batch, (one, one)), after.latency_spread.get(batch, (other, other))
    if first[0] <= second[1] and second[0] <= first[1]:
        return "as fast"
    return ratio_words(one, other, "faster", "slower", "as fast")


def bound_words(shrunk: Shrunk) -> str | None:
    """ "accuracy within 0.3 points (promised 0.5)": the confidence bound of what ships."""
    after = shipped(shrunk)
    if after is None or after.bound is None:
        return None
    metric, promised = metric_words(shrunk.metric), format_drop(shrunk.metric, shrunk.max_drop)
    if not differs(after.bound):
        return f"the same {metric} on all {format_count(after.bound.rows, 'row')}"
    unit = " points" if is_share(shrunk.metric) else ""
    return f"{metric} within {format_drop(shrunk.metric, max(0.0, after.bound.upper))}{unit} (promised {promised})"


def differs(bound: Bound) -> bool:
    """Whether any compared row differs; where none does, the bound is 0 by its formula and proves nothing by itself."""
    return bound.disagreeing > 0 or bound.upper > 0


def upper_words(metric: str, bound: Bound) -> str:
    """The confidence bound, or that there was no difference to compute one from."""
    return format_drop(metric, bound.upper) if differs(bound) else "no row differs"


def shrunk_verdict(shrunk: Shrunk) -> str:
    """ "int8 ships: 3.9 times smaller, 1.3 times faster at batch 1, accuracy within 0.3 points (promised 0.5)"."""
    gains = gain_words(shrunk)
    bound = bound_words(shrunk)
    facts = [*gains, *([bound] if bound else [])]
    if not facts:
        facts = ["the trained model as it is, since nothing else was kept"]
    return clean(f"{shrunk.shipped} ships: {', '.join(facts)}")


def fit_words(plan: Plan) -> str:
    """ "fits: 412 MiB of 2.0 GiB, 0.31 s a step"."""
    predicted = plan.predicted
    if predicted is None:
        return f"{format_count(len(plan.choices), 'method')} chosen; memory was not predicted"
    fits = plan.memory_bytes is None or predicted.peak_bytes <= plan.memory_bytes
    of = "" if plan.memory_bytes is None else f" of {format_bytes(plan.memory_bytes)}"
    pace = "" if predicted.step_seconds is None else f", {format_seconds(predicted.step_seconds)} a step"
    return f"{'fits' if fits else 'does not fit'}: {format_bytes(predicted.peak_bytes)}{of}{pace}"


def option_words(plan: Plan, option: Option) -> str:
    """ "4 parts of 16 rows, 6 blocks recomputed, optimizer in backward"."""
    parts = -(-plan.batch_size // option.micro_batch)
    pieces = [f"{parts} parts of {option.micro_batch:,}"] if parts > 1 else ["the whole batch"]
    if option.blocks:
        pieces.append(f"{format_count(option.blocks, 'block')} recomputed")
    state = f"optimizer state in {option.bits} bits"
    names = [state if name == "optimizer_state" and option.bits else name.replace("_", " ") for name in option.methods]
    pieces += [name for name in names if name != "activation checkpointing"]
    return ", ".join(pieces)


def more_memory_words(plan: Plan) -> str:
    """What the next GiB would buy; nothing where the plan is the fastest there is, or nothing was compared."""
    if plan.predicted is None or not plan.frontier:
        return ""
    room = plan.predicted.peak_bytes + (1 << 30)
    best = min((one for one in plan.frontier if one.peak_bytes <= room), key=lambda one: one.step_seconds, default=None)
    now = plan.predicted.step_seconds
    if best is None or now is None or best.step_seconds >= 0.99 * now:
        return ""
    return f"with 1 GiB more: {format_seconds(best.step_seconds)} a step instead of {format_seconds(now)} ({option_words(plan, best)})"


def footprints(run: Run) -> list[tuple[str, Footprint | None]]:
    """The three views of a run's memory, named; None for those that were not taken."""
    plan = run.plan
    return [
        ("without methods", plan.plain if plan else None),
        ("predicted", plan.predicted if plan else None),
        ("measured", run.measured),
    ]


def interval_words(low: int, high: int) -> str:
    return format_bytes(low) if low == high else f"{format_bytes(low)} to {format_bytes(high)}"


def decision_words(row: dict[str, Any]) -> str:
    """A row of `decisions.jsonl` on one line: "step 12, split: memory ran out in the backward phase, ..."."""
    at = row.get("at")
    where = f"step {at:,}, " if isinstance(at, int) else ""
    return f"{where}{clean(row.get('kind', 'decision'))}: {clean(row.get('why', ''))}"


def pairs_words(mapping: dict[str, object]) -> str:
    """A small mapping on one line: "parts 4, every 2"."""
    return ", ".join(f"{clean(key)} {clean(value)}" for key, value in mapping.items())


def scores_words(scores: dict[str, float]) -> str:
    """Metrics on one line: "accuracy 98.2 %, loss 0.0612"."""
    return ", ".join(f"{metric_words(name)} {format_metric(name, value)}" for name, value in scores.items())


def machine_facts(hardware: Hardware) -> list[tuple[str, str]]:
    """The machine as names and values."""
    facts = [
        ("processor", hardware.processor),
        ("cores", str(hardware.cores)),
        ("instruction sets", ", ".join(hardware.instruction_sets) or "none that matter here"),
        ("memory", f"{format_bytes(hardware.memory_bytes)}, {format_bytes(hardware.available_bytes)} free"),
    ]
    if hardware.memory_limit_bytes is not None:
        facts.append(("memory limit", format_bytes(hardware.memory_limit_bytes)))
    for accelerator in hardware.accelerators:
        usable = "usable" if accelerator.usable else f"not usable: {accelerator.remedy or 'no remedy is known'}"
        if accelerator.usable is None:
            usable = "which torch was not asked about"
        facts.append(("GPU", f"{accelerator.name}, {format_bytes(accelerator.memory_bytes)}, {usable}"))
    return facts
