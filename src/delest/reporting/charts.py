"""Charts as Plotly figures in plain data. Colours are names ("@accent") that the page turns into its own, light or dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from delest.records.run import Run
from delest.records.shrunk import Candidate, Shrunk
from delest.reporting import marks, words
from delest.units import format_bytes, format_seconds

Figure = dict[str, Any]
POINTS = 300  # of a drawn curve: more cannot be told apart on a screen


def memory_chart(run: Run) -> Figure | None:
    """Peak memory without methods, as planned and as measured, each split into runtime and training, with the budget."""
    bars = [(name, footprint) for name, footprint in reversed(words.footprints(run)) if footprint is not None]
    if not bars:
        return None
    names = [name for name, _ in bars]
    unit, power = marks.byte_unit(max(footprint.peak_bytes for _, footprint in bars))
    peaks = [footprint.peak_bytes / power for _, footprint in bars]
    runtimes = [min(footprint.runtime_bytes, footprint.peak_bytes) / power for _, footprint in bars]
    ends = [max(footprint.peak_bytes, footprint.high_bytes) / power for _, footprint in bars]
    data = [
        marks.bar("runtime", names, runtimes, "@quiet"),
        marks.bar("training", names, [peak - runtime for peak, runtime in zip(peaks, runtimes, strict=True)], "@accent"),
        marks.whiskers(
            names,
            peaks,
            [footprint.low_bytes / power for _, footprint in bars],
            [footprint.high_bytes / power for _, footprint in bars],
        ),
        marks.labels(names, ends, [format_bytes(footprint.peak_bytes) for _, footprint in bars]),
    ]
    reach = max(ends)
    layout = marks.layout(
        86 + 44 * len(bars),
        "Peak memory predicted and measured",
        barmode="stack",
        bargap=0.42,
        legend=marks.legend(),
        showlegend=True,
        margin={"l": 8, "r": 12, "t": 48, "b": 40},
    )
    budget = run.plan.memory_bytes / power if run.plan and run.plan.memory_bytes else None
    if budget is not None and budget <= 2.5 * reach:
        layout["shapes"] = [marks.line(x=budget, color="@warn")]
        layout["annotations"] = [
            marks.note(budget, 1, f"budget {format_bytes(budget * power)}", yref="paper", yanchor="bottom")
        ]
        reach = max(reach, budget)
    layout["xaxis"] = marks.axis(range=[0, 1.25 * reach], title=marks.title(unit), nticks=6)
    layout["yaxis"] = marks.axis(showgrid=False, automargin=True, ticks="")
    return {"data": data, "layout": layout}


def curve_chart(run: Run, metrics: Sequence[dict[str, Any]]) -> Figure | None:
    """Losses, metric and learning rate over epochs, with the best state, the start of the decay and the end marked."""
    train, validation = _of_kind(metrics, "train"), _of_kind(metrics, "validation")
    if not train and not validation:
        return None
    judged = run.metric != "loss" and any(row.get(run.metric) is not None for row in validation)
    data = [
        marks.curve("training loss", _thinned(train, "loss"), "@quiet", width=1.5),
        marks.curve("validation loss", _pairs(validation, "loss"), "@accent", marked=True),
    ]
    if judged:
        scale = 100 if words.is_share(run.metric) else 1
        scores = [(epoch, scale * score) for epoch, score in _pairs(validation, run.metric)]
        data.append(marks.curve(marks.label(words.metric_words(run.metric)), scores, "@good", marked=True, yaxis="y2"))
    data.append(marks.curve("learning rate", _thinned(train, "rate", mean=False), "@ink3", width=1.5, yaxis="y3", fill=True))
    data = [trace for trace in data if trace["x"]]
    losses = [value for trace in data if trace["yaxis"] == "y" for value in trace["y"]]
    end = max([run.epochs, *(epoch for trace in data for epoch in trace["x"])])
    layout = _curve_layout(run, losses, end, decay_epoch(metrics), judged)
    best = _best_point(run, validation, judged)
    if best is not None:
        data.append(best)
    return {"data": data, "layout": layout}


def decay_epoch(metrics: Sequence[dict[str, Any]]) -> float | None:
    """Where the learning rate last was at its highest, None where it ends there or was never recorded."""
    rates = _pairs(_of_kind(metrics, "train"), "rate")
    if not rates:
        return None
    highest = max(rate for _, rate in rates)
    last = max(epoch for epoch, rate in rates if rate >= highest * 0.999)
    return None if last >= rates[-1][0] else last


def size_chart(shrunk: Shrunk) -> Figure:
    sizes = [words.stored_bytes(candidate) for candidate in shrunk.candidates]
    return _comparison(shrunk, shrunk.candidates, sizes, [format_bytes(size) for size in sizes], "Size on disk of each form")


def latency_chart(shrunk: Shrunk, batch: int) -> Figure:
    """Median latency of one batch size, the quartiles as whiskers."""
    timed = [candidate for candidate in shrunk.candidates if batch in candidate.latency_seconds]
    seconds = [candidate.latency_seconds[batch] for candidate in timed]
    spread = [candidate.latency_spread.get(batch, (value, value)) for candidate, value in zip(timed, seconds, strict=True)]
    figure = _comparison(
        shrunk,
        timed,
        seconds,
        [format_seconds(value) for value in seconds],
        f"Latency at batch {batch} of each form",
        [high for _, high in spread],
    )
    lows, highs = [low for low, _ in spread], [high for _, high in spread]
    figure["data"].insert(1, marks.whiskers(_names(timed), seconds, lows, highs))
    return figure


def drop_chart(shrunk: Shrunk) -> Figure | None:
    """How much worse each form is than the trained model: mean and 95 % bound, beside what was promised."""
    bounded = [
        (candidate, candidate.bound)
        for candidate in shrunk.candidates
        if candidate.bound and math.isfinite(candidate.bound.upper)
    ]
    if not bounded:
        return None
    scale = 100 if words.is_share(shrunk.metric) else 1
    names = _names([candidate for candidate, _ in bounded])
    drops = [scale * bound.drop for _, bound in bounded]
    uppers = [scale * bound.upper for _, bound in bounded]
    promised = scale * shrunk.max_drop
    dots = marks.dots(names, drops, _colors(shrunk, [candidate for candidate, _ in bounded]))
    labels = [words.upper_words(shrunk.metric, bound) for _, bound in bounded]
    low, high = min(0.0, *drops), max(0.0, promised, *uppers)
    margin = (high - low or 1.0) * 0.3
    layout = marks.layout(
        56 + 34 * len(names),
        "Drop against the trained model, with its bound and the promise",
        margin={"l": 8, "r": 8, "t": 22, "b": 8},
    )
    layout["shapes"] = [marks.line(x=0, color="@line", dash="solid"), marks.line(x=promised, color="@warn")]
    layout["annotations"] = [
        marks.note(promised, 1, f"promised {words.format_drop(shrunk.metric, shrunk.max_drop)}", yref="paper", yanchor="bottom")
    ]
    layout["xaxis"] = marks.axis(visible=False, range=[low - margin / 2, high + margin])
    layout["yaxis"] = marks.axis(
        showgrid=False, showline=False, automargin=True, autorange="reversed", ticks="", categoryarray=names
    )
    return {"data": [marks.whiskers(names, drops, drops, uppers), dots, marks.labels(names, uppers, labels)], "layout": layout}


def _comparison(
    shrunk: Shrunk,
    candidates: Sequence[Candidate],
    values: Sequence[float],
    texts: Sequence[str],
    label: str,
    ends: Sequence[float] | None = None,
) -> Figure:
    names, ends = _names(candidates), list(ends or values)
    bar = marks.bar("", names, list(values), _colors(shrunk, candidates))
    layout = marks.layout(40 + 34 * len(names), label, bargap=0.38, margin={"l": 8, "r": 8, "t": 6, "b": 8})
    layout["xaxis"] = marks.axis(visible=False, range=[0, 1.35 * max(ends, default=1)])
    layout["yaxis"] = marks.axis(showgrid=False, automargin=True, autorange="reversed", ticks="")
    return {"data": [bar, marks.labels(names, ends, texts)], "layout": layout}


def _names(candidates: Sequence[Candidate]) -> list[str]:
    return [marks.label(candidate.name) for candidate in candidates]


def _colors(shrunk: Shrunk, candidates: Sequence[Candidate]) -> list[str]:
    return ["@accent" if candidate.name == shrunk.shipped else "@quiet" for candidate in candidates]


def _curve_layout(run: Run, losses: Sequence[float], end: float, decay: float | None, judged: bool) -> dict[str, Any]:
    """Panels one above the other (losses, metric, learning rate) over the same epochs."""
    layout = marks.layout(
        460 if judged else 340, "Losses, metric and learning rate by epoch", legend=marks.legend(), showlegend=True
    )
    ticks = marks.ticks_1_2_5(losses) if losses and min(losses) > 0 and max(losses) > 20 * min(losses) else None
    panels = {"yaxis": ("loss, logarithmic" if ticks else "loss", (0.6, 0.96) if judged else (0.3, 0.96))}
    if judged:
        panels["yaxis2"] = (marks.label(words.metric_words(run.metric)), (0.22, 0.5))
    panels["yaxis3"] = ("learning rate, share of its highest", (0.0, 0.1))
    layout["annotations"] = []
    for axis, (title, domain) in panels.items():
        layout[axis] = marks.axis(domain=list(domain), nticks=5)
        place: dict[str, Any] = {"xref": "paper", "yref": "paper", "xanchor": "left", "yanchor": "bottom"}
        layout["annotations"].append(marks.note(0, domain[1], title, **place))
    if ticks:
        layout["yaxis"] |= {"type": "log", "tickvals": ticks, "tickformat": "~g"}
    if judged and words.is_share(run.metric):
        layout["yaxis2"]["ticksuffix"] = " %"
    layout["yaxis3"] |= {"range": [0, 1.1], "tickvals": [0, 1]}
    layout["margin"] = {"l": 52, "r": 20, "t": 40, "b": 44}
    layout["hovermode"] = "x unified"
    step = max(1, math.ceil(end / 10))
    layout["xaxis"] = marks.axis(
        range=[0, end * 1.015 or 1], dtick=step, title=marks.title("epoch"), showgrid=False, anchor="y3"
    )
    _mark_ending(layout, run, end, decay)
    return layout


def _mark_ending(layout: dict[str, Any], run: Run, end: float, decay: float | None) -> None:
    """Lines where training ended, with the reason, and where the decay that led there began."""
    layout["shapes"] = []
    if run.stopped_by is None:
        return
    place: dict[str, Any] = {"yref": "paper", "xanchor": "right", "yanchor": "middle"}
    ended = "all epochs run" if run.stopped_by == "epochs" else f"ended: {marks.label(run.stopped_by)}"
    layout["shapes"].append(marks.line(x=end, color="@ink3"))
    layout["annotations"].append(marks.note(end, 0.92, f"{ended} ", **place))
    if run.stopped_by != "epochs" and decay is not None:
        layout["shapes"].append(marks.line(x=decay, color="@warn"))
        layout["annotations"].append(marks.note(decay, 0.05, "decay starts ", **place))


def _best_point(run: Run, validation: Sequence[dict[str, Any]], judged: bool) -> dict[str, Any] | None:
    if run.best is None or not validation or not math.isfinite(run.best.score):
        return None
    scale = 100 if judged and words.is_share(run.metric) else 1
    return {
        **marks.curve(
            "best", [(run.best.epoch, scale * run.best.score)], "@good" if judged else "@accent", yaxis="y2" if judged else "y"
        ),
        "mode": "markers+text",
        "marker": {"size": 13, "color": "@surface", "line": {"color": "@good" if judged else "@accent", "width": 3}},
        "text": [f"best {words.format_metric(run.metric, run.best.score)}"],
        "textposition": f"{'bottom' if run.higher_is_better else 'top'} {'left' if run.best.epoch > 0.85 * run.epochs else 'center'}",
        "textfont": {"color": "@ink"},
        "cliponaxis": False,
        "hoverinfo": "skip",
    }


def _of_kind(metrics: Sequence[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Rows of one kind, without those of steps that were taken again later, after a resume or a setback."""
    standing: list[dict[str, Any]] = []
    for row in (row for row in metrics if row.get("kind") == kind):
        while standing and standing[-1]["step"] >= row["step"]:
            standing.pop()
        standing.append(row)
    return standing


def _pairs(rows: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """Epoch and value of the rows that have a finite one."""
    return [(row["epoch"], row[key]) for row in rows if row.get(key) is not None and math.isfinite(row[key])]


def _thinned(rows: Sequence[dict[str, Any]], key: str, *, mean: bool = True) -> list[tuple[float, float]]:
    """At most `POINTS` points: means of neighbours, or every so many with the last."""
    pairs = _pairs(rows, key)
    stride = math.ceil(len(pairs) / POINTS) or 1
    groups = [pairs[start : start + stride] for start in range(0, len(pairs), stride)]
    if not mean:
        return [group[-1] for group in groups]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]
