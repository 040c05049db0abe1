"""What an exported model takes to answer, for the terminal."""

from __future__ import annotations

from delest.records.latency import Latency
from delest.reporting import text, words
from delest.units import format_bytes, format_seconds


def latency_text(latency: Latency) -> str:
    """A verdict line, then one line a batch size, then memory."""
    first = latency.timings[0]
    header = ["rows", "an answer", "spread", "rows a second", "peak memory"]
    rows = [
        [
            f"{timing.rows:,}",
            format_seconds(timing.seconds),
            format_seconds(timing.seconds_spread),
            words.format_number(timing.rows_per_second),
            format_bytes(timing.peak_bytes),
        ]
        for timing in latency.timings
    ]
    memory = [
        ("model on disk", format_bytes(latency.model_bytes)),
        ("loading added", format_bytes(latency.loaded_bytes)),
        ("libraries alone", format_bytes(latency.runtime_bytes)),
        ("peak of the process", format_bytes(latency.peak_bytes)),
        ("runs on", ", ".join(latency.providers)),
    ]
    verdict = f"{format_seconds(first.seconds)} for {first.rows} row{'s' * (first.rows > 1)}, {format_bytes(latency.peak_bytes)} at the peak"
    return text.sections(verdict, ("", text.table(rows, header, right=range(5))), ("memory", text.table(memory)))
