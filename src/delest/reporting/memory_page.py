"""A footprint as a page of its own: one HTML file with everything in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from delest import storage
from delest.records.footprint import Footprint
from delest.reporting import footprint as texts, memory, modules, page, words
from delest.units import format_bytes, format_seconds

MANY = 10  # modules in the table; the tree shows the others


def write_footprint_page(path: Path, footprint: Footprint, *, budget_bytes: int | None = None, name: str = "") -> None:
    """Write a footprint's page into a file, atomically; `name` is what was estimated or measured.

    The page is self-contained: it opens without a network and fetches nothing. Raises `DiskFull`.
    """
    storage.write_atomic(path, render_footprint(footprint, budget_bytes=budget_bytes, name=name))


def render_footprint(footprint: Footprint, *, budget_bytes: int | None = None, name: str = "") -> str:
    """The page as text. All that comes from records is escaped."""
    views = [("estimated" if footprint.basis == "estimate" else "measured", footprint)]
    verdict = texts.verdict(footprint, budget_bytes=budget_bytes)
    shares = modules.hungriest(footprint)
    whole = sum(map(modules.weight, shares))
    return page.fill(
        "footprint.html.j2",
        memory.figures(views),
        title=f"{name}: {verdict}" if name else verdict,
        name=name,
        badge=_badge(footprint, budget_bytes),
        headline=page.unbroken(words.opened(verdict) + "."),
        lead="",
        cards=[_peak_card(footprint, budget_bytes), _step_card(footprint), _batch_card(footprint), _tensor_card(footprint)],
        phases=texts.phase_bytes(footprint),
        known=texts.facts(footprint),
        notes=footprint.notes,
        many=page.MANY,
        places=memory.places(views),
        hungriest=[
            {
                "share": share,
                "bytes": modules.weight(share),
                "part": texts.share_words(modules.weight(share), whole),
                "mostly": modules.PARTS[modules.mostly(share)],
            }
            for share in shares[:MANY]
        ],
    )


def _badge(footprint: Footprint, budget_bytes: int | None) -> tuple[str, str]:
    if budget_bytes is None:
        return (words.opened(footprint.basis), "calm")
    if texts.fits(footprint, budget_bytes):
        return ("Fits", "good")
    return ("Does not fit", "bad") if footprint.peak_bytes > budget_bytes else ("May not fit", "warn")


def _peak_card(footprint: Footprint, budget_bytes: int | None) -> dict[str, Any]:
    interval = texts.interval_words(footprint) if footprint.low_bytes < footprint.high_bytes else None
    budget = f"of {format_bytes(budget_bytes)} allowed" if budget_bytes is not None else None
    return page.card("Peak memory", format_bytes(footprint.peak_bytes), interval, budget)


def _step_card(footprint: Footprint) -> dict[str, Any]:
    seconds = footprint.step_seconds
    if not seconds:
        return page.card("A step", "–", "not timed")
    pace = f"{words.format_number(footprint.batch_size / seconds)} rows a second"
    return page.card("A step", format_seconds(seconds), pace, footprint.bound_by and f"bound by {footprint.bound_by}")


def _batch_card(footprint: Footprint) -> dict[str, Any]:
    parts = -(-footprint.batch_size // footprint.micro_batch)
    split = f"in {parts:,} parts of {footprint.micro_batch:,}" if parts > 1 else None
    return page.card("Batch", words.format_count(footprint.batch_size, "row"), split, footprint.device)


def _tensor_card(footprint: Footprint) -> dict[str, Any]:
    live = footprint.allocated_bytes
    runtime = f"{format_bytes(footprint.runtime_bytes)} of runtime besides"
    return page.card("Live tensors", "–" if live is None else format_bytes(live), runtime)
