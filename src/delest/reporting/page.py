"""The report: one HTML file with everything in it, made from the records of a run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from delest import storage
from delest.records.footprint import PHASES
from delest.records.form import to_plain
from delest.records.hardware import Hardware
from delest.records.run import Run
from delest.records.shrunk import Candidate, Shrunk
from delest.reporting import charts, memory, plan_charts, recipe, words
from delest.units import format_bytes, format_seconds

TEMPLATES = Path(__file__).parent / "templates"
MANY = 30  # classes, columns or rows left out that are shown before the rest is counted


def write_report(folder: Path, run: Run, *, metrics: list[dict[str, Any]], shrunk: Shrunk | None, hardware: Hardware) -> Path:
    """Write `report.html` into a folder, atomically, and return its path.

    `metrics` are the rows of `metrics.jsonl`. The page is self-contained: it opens without a network and fetches
    nothing. Raises `DiskFull`.
    """
    path = folder / "report.html"
    storage.write_atomic(path, render(run, metrics=metrics, shrunk=shrunk, hardware=hardware))
    return path


def render(run: Run, *, metrics: list[dict[str, Any]], shrunk: Shrunk | None, hardware: Hardware) -> str:
    """The page as text. All that comes from records is escaped."""
    settings = recipe.settings(run)
    threads = [("threads", str(run.plan.threads))] if run.plan is not None and run.plan.threads else []
    return fill(
        "report.html.j2",
        _figures(run, metrics, shrunk),
        run=run,
        title=f"{run.name}: {words.score_words(run)}",
        badge=_badge(run),
        headline=unbroken(_headline(run, shrunk)),
        lead=unbroken(_lead(run, shrunk)),
        cards=[_score_card(run), _time_card(run), _memory_card(run), _size_card(run, shrunk)],
        settings=[
            ("parameters", words.format_parameters(run.parameters), ""),
            *(row for row in settings if row[2] != "default"),
        ],
        defaults=[row[:2] for row in settings if row[2] == "default"],
        machine=[*words.machine_facts(hardware), *threads],
        data=run.data,
        splits=[(role, words.format_count(count, "row")) for role, count in run.data.splits.items()] if run.data else [],
        turned_down=[(item.method, item.why) for item in run.plan.rejected] if run.plan else [],
        many=MANY,
        memory=_memory_rows(run),
        places=memory.places(_views(run)),
        interval=_interval_words(run),
        curve=_curve_words(run, metrics),
        shrunk=shrunk,
        batches=sorted({batch for candidate in shrunk.candidates for batch in candidate.latency_seconds}) if shrunk else [],
        forms=[_form(shrunk, candidate) for candidate in shrunk.candidates] if shrunk else [],
        drop_unit=" points" if words.is_share(run.metric) else "",
        decisions=[_decision(row) for row in run.decisions],
        usage=recipe.usage(run, shrunk),
        command=recipe.command(run, shrunk),
    )


def fill(template: str, figures: dict[str, charts.Figure], **values: Any) -> str:
    """A template with its values, its charts and the code that draws them. All values are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": "{:,}".format,
        "figure": lambda value: words.format_number(value) if isinstance(value, int | float) else "–",
        "size": format_bytes,
        "time": format_seconds,
        "words": words.metric_words,
        "opened": words.opened,
        "scores": words.scores_words,
    }
    return environment.get_template(template).render(
        **values,
        figures=figures,
        # "<" cannot end the script element that holds the figures, whatever a user's names contain
        figures_json=Markup(json.dumps(to_plain(figures)).replace("<", "\\u003c")),
        plotly=Markup(get_plotlyjs()),
    )


def _figures(run: Run, metrics: list[dict[str, Any]], shrunk: Shrunk | None) -> dict[str, charts.Figure]:
    """Charts by the id of the element that they are drawn in; those without data are left out."""
    found: dict[str, charts.Figure | None] = {"memory": charts.memory_chart(run), "curve": charts.curve_chart(run, metrics)}
    found |= {"waterfall": plan_charts.waterfall_chart(run), "frontier": plan_charts.frontier_chart(run.plan)}
    found |= memory.figures(_views(run))
    if shrunk is not None:
        found["size"] = charts.size_chart(shrunk)
        for batch in sorted({batch for candidate in shrunk.candidates for batch in candidate.latency_seconds}):
            found[f"latency-{batch}"] = charts.latency_chart(shrunk, batch)
        found["drop"] = charts.drop_chart(shrunk)
    return {name: figure for name, figure in found.items() if figure is not None}


def _views(run: Run) -> list[memory.View]:
    """The run's memory as it was predicted and as it was measured, those of the two that are there."""
    return [(name, footprint) for name, footprint in words.footprints(run)[1:] if footprint is not None]


def _badge(run: Run) -> tuple[str, str]:
    return (run.status.capitalize(), {"done": "good", "running": "calm", "interrupted": "warn"}.get(run.status, "bad"))


def _headline(run: Run, shrunk: Shrunk | None) -> str:
    """The verdict in one sentence: quality, time, and what shrinking gained."""
    headline = words.headline_score(run)
    parts = [] if headline is None else [words.judged_words(run.metric, headline[1])]
    seconds = words.training_seconds(run)
    if seconds is not None:
        parts.append(f"trained in {format_seconds(seconds)}")
    status = words.status_words(run)
    sentence = ": ".join(part for part in (status, ", ".join(parts)) if part) or run.status
    if shrunk is not None and (gains := words.gain_words(shrunk)):
        sentence += f"; {shrunk.shipped} ships, {' and '.join(gains)}"
    return words.opened(sentence) + "."


def _lead(run: Run, shrunk: Shrunk | None) -> str:
    """What the verdict rests on."""
    sentences = []
    headline = words.headline_score(run)
    if headline is not None:
        split = headline[0]
        count = words.split_rows(run, split)
        rows = f"{count:,} {split} rows" if count else f"the {split} rows"
        decided = "which decided nothing" if split == "test" else "which decided when to stop; there are no test rows"
        sentences.append(f"Measured on {rows}, {decided}.")
    if run.data is not None and run.metric in run.data.baseline:
        base = words.format_metric(run.metric, run.data.baseline[run.metric])
        always = "the most frequent class" if run.data.classes else "the mean"
        if run.data.kind == "text":
            always = "how often each token occurs"
        sentences.append(f"Always answering {always} would score {base}.")
    if shrunk is not None:
        after, bound = words.shipped(shrunk), words.bound_words(shrunk)
        sure = ", at 95 % confidence" if after and after.bound and words.differs(after.bound) else ""
        sentences.append(f"What ships keeps {bound}{sure}." if bound else "No smaller form was kept.")
    return " ".join(sentences)


def unbroken(text: str) -> str:
    """The text with no line break between a number and its unit."""
    return re.sub(r"(?<=\d) ", "\N{NO-BREAK SPACE}", text)


def card(label: str, value: str, *notes: str | None) -> dict[str, Any]:
    return {"label": label, "value": value, "notes": [note for note in notes if note]}


def _score_card(run: Run) -> dict[str, Any]:
    headline = words.headline_score(run)
    if headline is None:
        return card(words.opened(words.metric_words(run.metric)), "–", "nothing evaluated yet")
    split, score = headline
    validation = run.validation.get(run.metric)
    beside = f"validation {words.format_metric(run.metric, validation)}" if split == "test" and validation is not None else None
    return card(words.opened(f"{split} {words.metric_words(run.metric)}"), words.format_metric(run.metric, score), beside)


def _time_card(run: Run) -> dict[str, Any]:
    seconds = words.training_seconds(run)
    whole = f"{format_seconds(words.whole_seconds(run))} with everything else" if len(run.seconds) > 1 else None
    return card(
        "Training time", "–" if seconds is None else format_seconds(seconds), words.format_count(run.epochs, "epoch"), whole
    )


def _memory_card(run: Run) -> dict[str, Any]:
    plan = run.plan
    budget = f"of {format_bytes(plan.memory_bytes)} allowed" if plan is not None and plan.memory_bytes is not None else None
    predicted = (
        f"{format_bytes(plan.predicted.peak_bytes)} predicted" if plan is not None and plan.predicted is not None else None
    )
    return card("Peak memory", "–" if run.measured is None else format_bytes(run.measured.peak_bytes), budget, predicted)


def _size_card(run: Run, shrunk: Shrunk | None) -> dict[str, Any]:
    after = shrunk and words.shipped(shrunk)
    if not after:
        return card("Parameters", words.format_parameters(run.parameters), "not shrunk")
    smallest = min(after.latency_seconds, default=None)
    pace = f"{format_seconds(after.latency_seconds[smallest])} at batch {smallest}" if smallest is not None else None
    return card(f"{after.name} ships", format_bytes(words.stored_bytes(after)), pace, after.runtime)


def _memory_rows(run: Run) -> list[tuple[str, list[int | None]]]:
    """Peak and phases in bytes: without methods, predicted, measured."""
    footprints = [footprint for _, footprint in words.footprints(run)]
    if not any(footprints):
        return []

    known = {phase for footprint in footprints if footprint for phase in footprint.phases}
    phases = [phase for phase in PHASES if phase in known] + sorted(known - set(PHASES))
    views = [
        {"peak": footprint.peak_bytes, "of which runtime": footprint.runtime_bytes, **footprint.phases} if footprint else {}
        for footprint in footprints
    ]
    return [(name.replace("_", " "), [view.get(name) for view in views]) for name in ("peak", "of which runtime", *phases)]


def _interval_words(run: Run) -> str | None:
    """How the measured peak lies to the predicted interval."""
    predicted = run.plan and run.plan.predicted
    if not predicted or run.measured is None:
        return None
    peak, share = run.measured.peak_bytes, run.measured.peak_bytes / predicted.peak_bytes - 1
    where = "below" if peak < predicted.low_bytes else "above" if peak > predicted.high_bytes else "inside"
    interval = words.interval_words(predicted.low_bytes, predicted.high_bytes)
    return f"The measured peak lies {where} the predicted interval ({interval}), {100 * share:+.1f} % from the prediction."


def _curve_words(run: Run, metrics: list[dict[str, Any]]) -> str:
    sentences = []
    if run.best is not None:
        score = words.format_metric(run.metric, run.best.score)
        sentences.append(
            f"Best at epoch {run.best.epoch:.4g}: validation {words.metric_words(run.metric)} {score}. These weights are kept."
        )
    reason = words.stop_words(run)
    decay = charts.decay_epoch(metrics)
    if reason and run.stopped_by != "epochs" and decay is not None:
        sentences.append(
            f"After epoch {decay:.3g} {reason}, so the learning rate went down to zero; training ended at epoch {run.epochs:.4g}."
        )
    elif reason:
        sentences.append(f"Training ended at epoch {run.epochs:.4g}: {reason}.")
    if preview := words.preview_words(run):
        sentences.append(words.opened(f"{preview} for the whole run."))
    return " ".join(sentences)


def _form(shrunk: Shrunk, candidate: Candidate) -> dict[str, Any]:
    ships = candidate.name == shrunk.shipped
    return {
        "candidate": candidate,
        "bytes": words.stored_bytes(candidate),
        "score": words.format_metric(shrunk.metric, candidate.selection.get(shrunk.metric), 2),
        "upper": _upper(shrunk, candidate),
        "outcome": "ships" if ships else "kept" if candidate.kept else "rejected",
    }


def _upper(shrunk: Shrunk, candidate: Candidate) -> tuple[str, str] | None:
    """How much worse a form can be, and what that rests on."""
    bound = candidate.bound
    if bound is None:
        return None
    if not words.differs(bound):
        return words.upper_words(shrunk.metric, bound), f"of {bound.rows:,}"
    unit = " points" if words.is_share(shrunk.metric) else ""
    return words.upper_words(shrunk.metric, bound) + unit, f"{words.format_drop(shrunk.metric, bound.drop)} on average"


def _decision(row: dict[str, Any]) -> dict[str, str]:
    """A row of `decisions.jsonl`: when, what, why, and the rest as it is."""
    rest = {
        key: format_bytes(value) if key == "bytes_per_step" and isinstance(value, int) else value
        for key, value in row.items()
        if key not in ("format", "kind", "at", "why") and value is not None
    }
    return {
        "step": f"{row['at']:,}" if isinstance(row.get("at"), int) else "",
        "what": words.clean(row.get("kind", "decision")),
        "why": words.clean(row.get("why", "")),
        "rest": words.pairs_words(rest).replace("_", " "),
    }
