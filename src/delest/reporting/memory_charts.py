"""Where memory goes, drawn: live bytes along two steps, and the tree of modules by size."""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterator, Sequence

from delest.records.footprint import Footprint, ModuleShare, Timeline
from delest.reporting import categories, marks, modules
from delest.reporting.charts import Figure
from delest.reporting.footprint import format_flops, share_words
from delest.units import format_bytes, format_seconds

TILES = 600  # of the tree: more cannot be told apart on a screen
LETTER = 0.011  # of the chart's width that a letter of a phase's name needs
DARK = "#14181f"  # of letters on a tile: the tiles' colours are the same in light and dark
INKS = {"@page": "@ink", "@parameters": "#ffffff"}
STEPS = {"1": "first step", "2": "steady step"}


def timeline_chart(
    timeline: Timeline, *, reach_bytes: int | None = None, label: str = "Live bytes through two steps"
) -> Figure:
    """Stacked areas by category, phases shaded and named, the peak marked; `reach_bytes` is the axis's end where charts compare."""
    totals = live_bytes(timeline)
    unit, power = marks.byte_unit(reach_bytes or max(totals))
    data = [
        _area(categories.look(name), timeline.position, [size / power for size in timeline.categories[name]])
        for name in categories.ordered(timeline.categories)
        if any(timeline.categories[name])
    ]
    heights = [total / power for total in totals]
    data.append(_outline(timeline.position, heights, list(_hovers(timeline, totals))))
    layout = marks.layout(330, label, hovermode="x")
    layout["margin"] = {"l": 52, "r": 12, "t": 44, "b": 12}
    layout["xaxis"] = marks.axis(
        range=[timeline.position[0], timeline.position[-1]], showticklabels=False, showgrid=False, ticks=""
    )
    layout["yaxis"] = marks.axis(range=[0, 1.15 * (reach_bytes or max(totals)) / power], nticks=6, title=marks.title(unit))
    layout["shapes"], layout["annotations"] = _phase_marks(timeline)
    layout["annotations"].append(_peak_mark(timeline, totals, heights))
    return {"data": data, "layout": layout}


def live_bytes(timeline: Timeline) -> list[int]:
    """The sum over categories at each point."""
    return [sum(column) for column in zip(*timeline.categories.values(), strict=True)]


def step_and_phase(phase: str) -> tuple[str, str]:
    """ "1 forward" as ("first step", "forward"); any other wording stays whole."""
    number, _, name = phase.partition(" ")
    return (STEPS[number], name) if number in STEPS and name else ("", phase)


def module_chart(footprint: Footprint, label: str = "Modules by memory") -> Figure | None:
    """The module tree as nested tiles sized by bytes and coloured by what most of them are; None where no module has any.

    What a module takes beside those inside it is a tile of its own among them, so that sizes add up at every level.
    """
    ranked = sorted(modules.without_wrappers(footprint.modules), key=modules.weight, reverse=True)
    if not ranked:
        return None
    shares = ranked[:TILES]
    aside = "itself, without the modules inside" if shares == ranked else "itself and modules too small to show"
    outer = modules.parents(shares)
    tops = [share for share in shares if outer[share.name] is None]
    whole = sum(map(modules.weight, tops))
    if len(tops) > 1:  # Plotly draws one tree: modules without a common one get the model around them
        shares.append(ModuleShare(name="", kind="model", peak_bytes=whole))
        outer = modules.parents(shares)
    holders = set(outer.values())
    tiles: list[tuple[str, str, str, int, str, str]] = []  # id, the id around it, label, value, colour, hover
    for share, own in zip(shares, modules.own_shares(shares), strict=True):
        around, color = outer[share.name], f"@{modules.mostly(own)}"
        tile = (_tile_id(share.name), "" if around is None else _tile_id(around), _tile_name(share, around))
        if share.name not in holders:
            tiles.append((*tile, modules.weight(own), color, _module_words(share, whole)))
            continue
        tiles.append((*tile, 0, "@page", _module_words(share, whole)))
        if own_bytes := modules.weight(own):
            tiles.append((f"={share.name}", tile[0], "itself", own_bytes, color, _module_words(own, whole, aside)))
    layout = marks.layout(440, label, margin={"l": 0, "r": 0, "t": 0, "b": 0})
    return {"data": [_treemap(tiles)], "layout": layout}


def _area(look: categories.Look, positions: Sequence[float], heights: Sequence[float]) -> Figure:
    return {
        "type": "scatter",
        "name": look.words,
        "x": list(positions),
        "y": list(heights),
        "mode": "lines",
        "stackgroup": "live",
        "line": {"color": "@surface", "width": 0.5, "shape": "hv"},  # bytes stay as they are until the next operator
        "fillcolor": look.color,
        "hoverinfo": "skip",
    }


def _outline(positions: Sequence[float], heights: Sequence[float], hovers: Sequence[str]) -> Figure:
    """The upper edge of the stack, which carries what is said of a point."""
    return {
        "type": "scatter",
        "name": "live",
        "x": list(positions),
        "y": list(heights),
        "mode": "lines",
        "line": {"color": "@ink", "width": 1, "shape": "hv"},
        "hovertext": list(hovers),
        "hoverinfo": "text",
        "showlegend": False,
    }


def _hovers(timeline: Timeline, totals: Sequence[int]) -> Iterator[str]:
    """What is said of each point: module, phase, sum, and the categories from the top of the stack down."""
    order = categories.ordered(timeline.categories)[::-1]
    for k, total in enumerate(totals):
        module = timeline.module[k] if k < len(timeline.module) else ""
        lines = [f"<b>{html.escape(modules.short_name(module, 48), quote=False)}</b>"] if module else []
        lines.append(html.escape(": ".join(part for part in step_and_phase(timeline.phase[k]) if part), quote=False))
        lines.append(f"{format_bytes(total)} live")
        lines += [
            f"{categories.look(name).words} {format_bytes(timeline.categories[name][k])}"
            for name in order
            if timeline.categories[name][k]
        ]
        yield "<br>".join(lines)


def _phase_marks(timeline: Timeline) -> tuple[list[Figure], list[Figure]]:
    """Every other phase shaded, with names above the plot and the step's name above those of its phases."""
    first, last = timeline.position[0], timeline.position[-1]
    starts = [k for k, phase in enumerate(timeline.phase) if k == 0 or phase != timeline.phase[k - 1]]
    shapes: list[Figure] = []
    notes: list[Figure] = []
    said = ""
    for shaded, (start, end) in zip(
        itertools.cycle((True, False)), itertools.pairwise([*starts, len(timeline.position) - 1]), strict=False
    ):
        left, right = timeline.position[start], timeline.position[end]
        step, name = step_and_phase(timeline.phase[start])
        if shaded:
            shapes.append(marks.band(left, right, "@wash"))
        room = (right - left) / ((last - first) or 1)
        place: Figure = {"yref": "paper", "yanchor": "bottom"}
        if room >= LETTER * len(name):
            notes.append(marks.note((left + right) / 2, 1, html.escape(name, quote=False), xanchor="center", **place))
        if step and step != said:
            notes.append(marks.note(left, 1, f"<b>{step}</b>", xanchor="left", yshift=18, **place))
            if start:
                shapes.append(marks.line(x=left, color="@ink3", dash="solid"))
            said = step
    return shapes, notes


def _peak_mark(timeline: Timeline, totals: Sequence[int], heights: Sequence[float]) -> Figure:
    """An arrow onto the highest point; its words lie on the side where there is room."""
    k = timeline.peak
    first, last = timeline.position[0], timeline.position[-1]
    late = timeline.position[k] - first > (last - first) / 2
    module = timeline.module[k] if k < len(timeline.module) else ""
    where = f" in {html.escape(modules.short_name(module, marks.LONGEST), quote=False)}" if module else ""
    return marks.note(
        timeline.position[k],
        heights[k],
        f"<b>peak {format_bytes(totals[k])}</b>{where}",
        showarrow=True,
        arrowhead=2,
        arrowcolor="@ink",
        arrowwidth=1.5,
        ax=-28 if late else 28,
        ay=-16,
        xanchor="right" if late else "left",
        bgcolor="@surface",
        font={"size": 12, "color": "@ink"},
    )


def _treemap(tiles: Sequence[tuple[str, str, str, int, str, str]]) -> Figure:
    ids, around, names, sizes, colors, hovers = map(list, zip(*tiles, strict=True))
    return {
        "type": "treemap",
        "ids": ids,
        "parents": around,
        "labels": names,
        "values": sizes,
        "branchvalues": "remainder",  # a holder's tile is what its tiles sum to: no two figures can contradict each other
        "text": [format_bytes(size) if size else "" for size in sizes],
        "textinfo": "label+text",
        "textfont": {"color": [INKS.get(color, DARK) for color in colors]},
        "hovertext": hovers,
        "hoverinfo": "text",
        "marker": {"colors": colors, "line": {"color": "@surface", "width": 1}, "pad": {"t": 20, "l": 2, "r": 2, "b": 2}},
        "tiling": {"pad": 1},
        "pathbar": {"thickness": 24},
    }


def _tile_id(name: str) -> str:
    """Plotly takes an empty id for none."""
    return f"/{name}"


def _tile_name(share: ModuleShare, outer: str | None) -> str:
    """The part of the name that the tile around it does not have."""
    inner = share.name[len(outer) + 1 :] if outer else share.name
    return marks.label(inner or share.kind)


def _module_words(share: ModuleShare, whole: int, aside: str = "") -> str:
    size = modules.weight(share)
    parts = (
        ("parameters", share.parameter_bytes),
        ("gradients, optimizer state", share.state_bytes),
        ("activations", share.activation_bytes),
    )
    name = html.escape(modules.short_name(share.name, 64) or "the whole model", quote=False)
    lines = [f"<b>{name}</b> ({html.escape(share.kind, quote=False)})", *([aside] if aside else [])]
    lines.append(f"{format_bytes(size)}, {share_words(size, whole)}")
    lines += [f"{what} {format_bytes(amount)}" for what, amount in parts if amount]
    if share.seconds is not None:
        lines.append(f"{format_seconds(share.seconds)} of a step")
    if share.flops is not None:
        lines.append(f"{format_flops(share.flops)} of a step")
    return "<br>".join(lines)
