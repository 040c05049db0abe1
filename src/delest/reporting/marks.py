"""What charts are made of: Plotly traces, axes and notes in plain data, in the page's colours and type."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

FONT = '-apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
LONGEST = 24  # characters of a name in a chart


def curve(
    name: str,
    pairs: Sequence[tuple[float, float]],
    color: str,
    *,
    width: float = 2.5,
    marked: bool = False,
    yaxis: str = "y",
    fill: bool = False,
) -> dict[str, Any]:
    trace: dict[str, Any] = {
        "type": "scatter",
        "name": name,
        "x": [epoch for epoch, _ in pairs],
        "y": [value for _, value in pairs],
        "mode": "lines+markers" if marked else "lines",
        "line": {"color": color, "width": width},
        "marker": {"size": 6, "color": color},
        "xaxis": "x",
        "yaxis": yaxis,
        "showlegend": yaxis == "y" and name != "best",
        "hovertemplate": "%{y:.4~g}",
    }
    return trace | ({"fill": "tozeroy", "fillcolor": "@wash"} if fill else {})


def bar(name: str, names: Sequence[str], values: Sequence[float], color: str | list[str]) -> dict[str, Any]:
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "y": list(names),
        "x": list(values),
        "marker": {"color": color},
        "hoverinfo": "skip",
    }


def whiskers(names: Sequence[str], values: Sequence[float], lows: Sequence[float], highs: Sequence[float]) -> dict[str, Any]:
    """Spreads from low to high around values, none drawn where both are the value."""
    spread = [item for item in zip(names, values, lows, highs, strict=True) if item[2] < item[1] or item[3] > item[1]]
    bars: dict[str, Any] = {"type": "data", "symmetric": False, "color": "@ink", "thickness": 1.5, "width": 5}
    bars["array"] = [max(0.0, high - value) for _, value, _, high in spread]
    bars["arrayminus"] = [max(0.0, value - low) for _, value, low, _ in spread]
    return dots([name for name, *_ in spread], [value for _, value, *_ in spread], "@ink", size=1) | {"error_x": bars}


def dots(names: Sequence[str], values: Sequence[float], color: str | list[str], size: int = 10) -> dict[str, Any]:
    base = {"type": "scatter", "mode": "markers", "y": list(names), "x": list(values), "showlegend": False, "hoverinfo": "skip"}
    return base | {"marker": {"size": size, "color": color}}


def label(text: str) -> str:
    """A name as Plotly takes it, which reads tags; long ones are cut so that the chart keeps its room."""
    return html.escape(text if len(text) <= LONGEST else text[: LONGEST - 1] + "…", quote=False)


def labels(names: Sequence[str], ends: Sequence[float], texts: Sequence[str]) -> dict[str, Any]:
    base = {
        "type": "scatter",
        "mode": "text",
        "y": list(names),
        "x": list(ends),
        "showlegend": False,
        "hoverinfo": "skip",
        "cliponaxis": False,
    }
    return base | {"text": [f"\u2002{text}" for text in texts], "textposition": "middle right", "textfont": {"color": "@ink"}}


def layout(height: int, label: str, **more: Any) -> dict[str, Any]:
    return {
        "height": height,
        "meta": {"label": label},
        "autosize": True,
        "margin": {"l": 8, "r": 12, "t": 26, "b": 40},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": FONT, "size": 13, "color": "@ink2"},
        "hoverlabel": {"bgcolor": "@surface", "bordercolor": "@line", "font": {"color": "@ink"}},
        "dragmode": False,
        "showlegend": False,
        **more,
    }


def axis(**more: Any) -> dict[str, Any]:
    return {"fixedrange": True, "gridcolor": "@line", "linecolor": "@line", "zeroline": False, "tickcolor": "@line", **more}


def title(text: str) -> dict[str, Any]:
    return {"text": text, "standoff": 6, "font": {"size": 13}}


def legend() -> dict[str, Any]:
    """At the top right of the chart, above notes that stand on the plot."""
    place = {"x": 1, "xanchor": "right", "y": 1, "yref": "container", "yanchor": "top"}
    return {"orientation": "h", "traceorder": "normal", "itemclick": False, "itemdoubleclick": False, **place}


def line(*, x: float, color: str, dash: str = "dash") -> dict[str, Any]:
    return {
        "type": "line",
        "x0": x,
        "x1": x,
        "yref": "paper",
        "y0": 0,
        "y1": 1,
        "line": {"color": color, "width": 1.5, "dash": dash},
        "layer": "below",
    }


def band(left: float, right: float, color: str) -> dict[str, Any]:
    """A shaded span over the whole height."""
    edges = {"x0": left, "x1": right, "yref": "paper", "y0": 0, "y1": 1}
    return {"type": "rect", **edges, "fillcolor": color, "line": {"width": 0}, "layer": "below"}


def byte_unit(highest: float) -> tuple[str, int]:
    """The unit of an axis of bytes that ends there, and how many bytes it is."""
    return ("GiB", 2**30) if highest >= 2**30 else ("MiB", 2**20) if highest >= 2**20 else ("KiB", 2**10)


def note(x: float, y: float, text: str, **more: Any) -> dict[str, Any]:
    return {"x": x, "y": y, "text": text, "showarrow": False, "font": {"size": 12, "color": "@ink2"}, **more}


def ticks_1_2_5(values: Sequence[float]) -> list[float]:
    """Ticks of a logarithmic axis around positive values: powers of ten, with 2 and 5 times them where few would remain."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    factors = (1, 2, 5) if high - low <= 2 else (1,)
    return [factor * 10.0**power for power in range(low, high + 1) for factor in factors]
