"""The part of a page that shows where memory goes: bars and a table by category, the course of two steps, the module tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from delest.records.footprint import Footprint, Timeline
from delest.reporting import categories, memory_charts, modules, words
from delest.reporting.charts import Figure
from delest.reporting.footprint import share_words
from delest.units import format_bytes

View = tuple[str, Footprint]  # with how it was come by: "predicted", "measured"


def figures(views: Sequence[View]) -> dict[str, Figure]:
    """Charts by the id of the element that they are drawn in; timelines share one scale, so that they compare."""
    lines = _timelines(views)
    reach = max((max(memory_charts.live_bytes(line)) for _, line, _ in lines), default=0)
    found = {
        f"timeline-{name}": memory_charts.timeline_chart(line, reach_bytes=reach, label=f"Live bytes through two steps, {name}")
        for name, line, _ in lines
    }
    shown = _with_modules(views)
    tiles = memory_charts.module_chart(shown[1]) if shown else None
    return {**found, **({"modules": tiles} if tiles else {})}


def places(views: Sequence[View]) -> dict[str, Any] | None:
    """What `memory.html.j2` shows of one footprint or of several side by side; None where none was taken apart."""
    found = {"bars": _bars(views), "rows": _rows(views), "timelines": _timeline_words(views), "modules": _module_words(views)}
    return found if any(found.values()) else None


def _bars(views: Sequence[View]) -> list[dict[str, Any]]:
    """A stack of categories for each view, as wide as its share of the largest."""
    apart = [(name, footprint.breakdown, sum(footprint.breakdown.values())) for name, footprint in views if footprint.breakdown]
    most = max((whole for *_, whole in apart), default=0) or 1
    return [
        {
            "name": name,
            "bytes": whole,
            "width": 100 * whole / most,
            "parts": [
                {**_look(category), "bytes": breakdown[category], "width": 100 * breakdown[category] / (whole or 1)}
                for category in categories.ordered(breakdown)
                if breakdown[category]
            ],
        }
        for name, breakdown, whole in apart
    ]


def _rows(views: Sequence[View]) -> list[dict[str, Any]]:
    """Categories with bytes and share in each view that was taken apart."""
    apart = [footprint.breakdown for _, footprint in views if footprint.breakdown]
    known = {category for breakdown in apart for category, size in breakdown.items() if size}
    return [
        {
            **_look(category),
            "cells": [
                (breakdown.get(category), share_words(breakdown.get(category, 0), sum(breakdown.values())))
                for breakdown in apart
            ],
        }
        for category in categories.ordered(known)
    ]


def _look(category: str) -> dict[str, str]:
    look = categories.look(category)
    return {"words": words.opened(look.words), "color": look.color.removeprefix("@")}


def _timelines(views: Sequence[View]) -> list[tuple[str, Timeline, Footprint]]:
    return [
        (name, footprint.timeline, footprint)
        for name, footprint in views
        if footprint.timeline is not None and footprint.timeline.position
    ]


def _timeline_words(views: Sequence[View]) -> list[dict[str, Any]]:
    lines = _timelines(views)
    return [
        {
            "chart": f"timeline-{name}",
            "title": f"Through two steps, {name}",
            "words": _peak_words(line, footprint),
            "key": [_look(name) for name in categories.ordered(line.categories) if any(line.categories[name])],
        }
        for name, line, footprint in lines
    ]


def _peak_words(line: Timeline, footprint: Footprint) -> str:
    """Where the highest point is, and what lies between it and the peak of the process."""
    live = memory_charts.live_bytes(line)[line.peak]
    module = line.module[line.peak] if line.peak < len(line.module) else ""
    step, phase = memory_charts.step_and_phase(line.phase[line.peak])
    when = f"the {phase} of the {step}" if step else phase
    sentence = f"Highest in {when}{f', in {module}' if module else ''}: {format_bytes(live)} live."
    runtime = 0 if "runtime" in line.categories else footprint.runtime_bytes
    held = footprint.peak_bytes - live - runtime
    added = [f"{format_bytes(runtime)} of runtime"] if runtime else []
    if held > 0.01 * footprint.peak_bytes:
        added.append(f"{format_bytes(held)} that the allocator and kernels hold besides")
    return f"{sentence} With {' and '.join(added)} that is {format_bytes(footprint.peak_bytes)}." if added else sentence


def _with_modules(views: Sequence[View]) -> View | None:
    """The last view that knows its modules: a measurement where there is one."""
    return next((view for view in reversed(views) if any(map(modules.weight, view[1].modules))), None)


def _module_words(views: Sequence[View]) -> dict[str, Any] | None:
    shown = _with_modules(views)
    if shown is None:
        return None
    taken = "bytes at the peak" if any(share.peak_bytes for share in shown[1].modules) else "bytes"
    used = {modules.mostly(share) for share in modules.hungriest(shown[1])}
    return {
        "words": f"Tiles are as large as a module's {taken}, {shown[0]}; their colour is what most of them are. Click one to look inside.",
        "key": [{"color": part, "words": words.opened(name)} for part, name in modules.PARTS.items() if part in used],
    }
