"""A plan drawn: what each choice takes off the plain step's peak, and what memory buys in time."""

from __future__ import annotations

import html

from delest.records.plan import Choice, Plan
from delest.records.run import Run
from delest.reporting import marks, words
from delest.reporting.charts import Figure
from delest.units import format_bytes, format_seconds

LEAST_POINTS = 2  # of a frontier: one point is no curve


def waterfall_chart(run: Run) -> Figure | None:
    """From the plain step's peak down to the plan's, a bar for each choice that saves memory; then what was measured.

    None where no choice saves any.
    """
    plan = run.plan
    saving = [] if plan is None else [choice for choice in plan.choices if choice.saved_bytes]
    if plan is None or plan.plain is None or plan.predicted is None or not saving:
        return None
    measured = run.measured.peak_bytes if run.measured else None
    unit, power = marks.byte_unit(max(plan.plain.peak_bytes, measured or 0))
    rows: list[tuple[str, float, float, str, str]] = [  # name, start, end, colour, words
        ("without methods", 0.0, plan.plain.peak_bytes, "@quiet", format_bytes(plan.plain.peak_bytes))
    ]
    at = float(plan.plain.peak_bytes)
    for choice in saving:
        saved = float(choice.saved_bytes or 0)
        low, high = sorted((at, at - saved))
        rows.append(
            (words.clean(choice.method).replace("_", " "), low, high, "@good" if saved > 0 else "@warn", _change(choice))
        )
        at -= saved
    rows.append(("predicted", 0.0, plan.predicted.peak_bytes, "@accent", format_bytes(plan.predicted.peak_bytes)))
    if measured is not None:
        rows.append(("measured", 0.0, measured, "@accent", format_bytes(measured)))
    names = [marks.label(name) for name, *_ in rows]
    bar = marks.bar("", names, [(end - start) / power for _, start, end, *_ in rows], [color for *_, color, _ in rows])
    bar["base"] = [start / power for _, start, *_ in rows]
    ends = [end / power for _, _, end, *_ in rows]
    layout = marks.layout(
        60 + 34 * len(rows), "Peak memory, choice by choice", bargap=0.38, margin={"l": 8, "r": 8, "t": 6, "b": 40}
    )
    layout["xaxis"] = marks.axis(range=[0, 1.4 * max(ends)], title=marks.title(unit), nticks=6)
    layout["yaxis"] = marks.axis(showgrid=False, automargin=True, autorange="reversed", ticks="")
    return {"data": [bar, marks.labels(names, ends, [text for *_, text in rows])], "layout": layout}


def frontier_chart(plan: Plan | None) -> Figure | None:
    """Peak memory against the time of a step for combinations that no other beats in both, with the budget and the choice; None where
    nothing was compared."""
    if plan is None or plan.predicted is None or len(plan.frontier) < LEAST_POINTS:
        return None
    chosen = plan.predicted
    unit, power = marks.byte_unit(max(option.peak_bytes for option in plan.frontier))
    points = [(option.peak_bytes / power, option.step_seconds) for option in plan.frontier]
    line = marks.curve("frontier", points, "@quiet", width=1.5, marked=True)
    line |= {
        "mode": "lines+markers",
        "line": {"color": "@quiet", "width": 1.5, "shape": "hv"},
        "hoverinfo": "text",
        "hovertext": [
            f"{html.escape(words.option_words(plan, option), quote=False)}<br>{format_bytes(option.peak_bytes)}, "
            f"{format_seconds(option.step_seconds)} a step"
            for option in plan.frontier
        ],
    }
    del line["hovertemplate"]
    seconds = chosen.step_seconds or 0.0
    here = marks.curve("the plan", [(chosen.peak_bytes / power, seconds)], "@accent")
    here |= {"mode": "markers", "marker": {"size": 13, "color": "@accent"}, "hoverinfo": "skip"}
    del here["hovertemplate"]
    layout = marks.layout(320, "Memory against time of a step", margin={"l": 64, "r": 12, "t": 30, "b": 44})
    layout["xaxis"] = marks.axis(title=marks.title(f"peak memory, {unit}"), nticks=6, rangemode="tozero")
    layout["yaxis"] = marks.axis(title=marks.title("seconds a step"), nticks=6, rangemode="tozero")
    layout["annotations"] = [marks.note(chosen.peak_bytes / power, seconds, "  the plan", xanchor="left", yanchor="bottom")]
    if plan.memory_bytes is not None and plan.memory_bytes / power <= 1.5 * max(x for x, _ in points):
        layout["shapes"] = [marks.line(x=plan.memory_bytes / power, color="@warn")]
        budget = f"budget {format_bytes(plan.memory_bytes)}"
        layout["annotations"].append(marks.note(plan.memory_bytes / power, 1, budget, yref="paper", yanchor="bottom"))
    return {"data": [line, here], "layout": layout}


def _change(choice: Choice) -> str:
    saved = choice.saved_bytes or 0
    size = f"{'−' if saved > 0 else '+'}{format_bytes(abs(saved))}"
    cost = choice.cost_seconds
    if cost is None or abs(cost) < 1e-4:
        return size
    return f"{size}, {'+' if cost > 0 else '−'}{format_seconds(abs(cost))} a step"
