"""Frameworks side by side as plain text: which to take, then what the same training took on each."""

from __future__ import annotations

from delest.records.frameworks import FrameworkComparison, FrameworkResult
from delest.reporting import text, words
from delest.units import format_bytes, format_seconds

HEADER = ("framework", "whole run", "a step", "warming up", "starting", "peak", "of it libraries", "score", "first loss")


def frameworks_text(found: FrameworkComparison) -> str:
    """The comparison; the first line says which framework to take."""
    rows = [_row(one, found) for one in found.results if one.ok]
    apart = [f"{one.name}: {_apart(one)}" for one in found.results if one.differs_at is not None]
    faults = [f"{one.name}: {one.fault}" for one in found.results if not one.ok]
    versions = {name: version for one in found.results for name, version in one.versions.items()}
    how = (
        f"{words.format_count(found.epochs, 'epoch')} of {words.format_count(found.steps, 'step')} of {found.batch_size} rows each, from the same weights; "
        f"the whole run is {words.format_count(found.whole_epochs, 'epoch')}"
    )
    facts = [("how", how), ("versions", words.pairs_words(dict(versions)))]
    return text.sections(
        verdict(found),
        ("", rows and text.table(rows, HEADER, right=range(1, 8))),
        ("", text.table(facts)),
        ("results differ", text.bullets(apart)),
        ("not trained", text.bullets(faults)),
        ("", text.bullets(found.notes)),
    )


def verdict(found: FrameworkComparison) -> str:
    """ "take jax: 12 s for 10 epochs, peak 635 MiB; 1.4 times as fast as the next"."""
    best = found.best
    if best is None:
        return f"none to take: {found.why}"
    epochs = words.format_count(found.whole_epochs, "epoch")
    figures = f"{format_seconds(best.whole_seconds or 0.0)} for {epochs}, peak {format_bytes(best.peak_bytes or 0)}"
    return f"take {best.name}: {figures}; {found.why}"


def _row(one: FrameworkResult, found: FrameworkComparison) -> tuple[str, ...]:
    score = one.validation.get(found.metric)
    return (
        one.name,
        format_seconds(one.whole_seconds or 0.0),
        format_seconds(one.step_seconds or 0.0),
        format_seconds(one.compile_seconds or 0.0),
        format_seconds(one.start_seconds or 0.0),
        format_bytes(one.peak_bytes or 0),
        format_bytes(one.runtime_bytes or 0),
        "" if score is None else f"{found.metric} {words.format_metric(found.metric, score)}",
        _agreement(one),
    )


def _agreement(one: FrameworkResult) -> str:
    loss = "" if one.first_loss is None else f"{one.first_loss:.4g}"
    if one.loss_difference is None:
        return loss
    return f"{loss}, another" if one.differs_at is not None else f"{loss}, the same"


def _apart(one: FrameworkResult) -> str:
    return f"the first loss differs by {one.loss_difference:.1%}; the first that gives something else is {one.differs_at}"
