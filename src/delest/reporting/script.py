"""What a script's training took, as plain text: a verdict, where the bytes are, what would help."""

from __future__ import annotations

import textwrap

from delest.records.script import OptimizerUse, Remedy, ScriptMeasurement
from delest.reporting import categories, text, words
from delest.reporting.footprint import share_words
from delest.units import format_bytes, format_seconds

BAR = 30  # blocks of the longest bar


def script_text(measurement: ScriptMeasurement) -> str:
    """The measurement for the terminal; the first line says the peak, the pace, and how the script ended where it failed."""
    return text.sections(
        _verdict(measurement),
        ("", text.table(_facts(measurement))),
        ("at the steady peak", _breakdown(measurement)),
        ("what would help most (estimated)", "\n".join(map(_remedy, measurement.remedies))),
        ("notes", text.bullets(measurement.notes)),
    )


def _verdict(measurement: ScriptMeasurement) -> str:
    said = [f"{format_bytes(measurement.peak_bytes)} at the peak"]
    if measurement.step_seconds is not None:
        said.append(f"{format_seconds(measurement.step_seconds)} a step")
    if measurement.waiting_seconds and measurement.step_seconds:
        said.append(f"{share_words(measurement.waiting_seconds, measurement.step_seconds)} of it waiting for data")
    verdict = ", ".join(said)
    return verdict if measurement.status == 0 else f"the script ended with status {measurement.status}: {verdict}"


def _facts(measurement: ScriptMeasurement) -> list[tuple[str, str]]:
    facts = [("steps", f"{measurement.steps:,} in {format_seconds(measurement.seconds)} from start to end")]
    if measurement.steady_peak_bytes is not None:
        facts.append(("steady peak", f"{format_bytes(measurement.steady_peak_bytes)} in steps after warm-up"))
    if measurement.runtime_bytes is not None and measurement.device == "cpu":
        facts.append(
            ("runtime", f"{format_bytes(measurement.runtime_bytes)} of libraries and of data the script holds, included")
        )
    if measurement.resident_peak_bytes is not None:
        facts.append(("process", f"{format_bytes(measurement.resident_peak_bytes)} resident at the peak, beside the GPU"))
    if measurement.allocated_bytes is not None:
        facts.append(("tensors", f"at most {format_bytes(measurement.allocated_bytes)} live at once"))
    if measurement.step_seconds is not None:
        facts.append(("step", _pace(measurement)))
    if measurement.parameters is not None:
        facts.append(("parameters", words.format_parameters(measurement.parameters)))
    if measurement.batch_rows is not None:
        facts.append(("batch", _batch(measurement)))
    facts.extend(("optimizer", _optimizer(use)) for use in measurement.optimizers[:3])
    return facts


def _pace(measurement: ScriptMeasurement) -> str:
    parts = [format_seconds(measurement.step_seconds or 0.0)]
    if measurement.step_seconds_spread is not None:
        parts[0] += f" (middle half within {format_seconds(measurement.step_seconds_spread)})"
    if measurement.backward_seconds is not None:
        parts.append(f"backward {format_seconds(measurement.backward_seconds)}")
    if measurement.waiting_seconds is not None:
        parts.append(f"waiting for data {format_seconds(measurement.waiting_seconds)}")
    return ", ".join(parts)


def _batch(measurement: ScriptMeasurement) -> str:
    rows, part = measurement.batch_rows or 0, measurement.micro_batch or 0
    split = f", at most {part:,} at a time" if 0 < part < rows else ""
    return f"{words.format_count(rows, 'row')} a step{split}"


def _optimizer(use: OptimizerUse) -> str:
    form = f" ({use.implementation})" if use.implementation else ""
    seconds = "" if use.seconds is None else f", {format_seconds(use.seconds)} a step"
    return words.clean(f"{use.name}{form}: state {format_bytes(use.state_bytes)}{seconds}")


def _breakdown(measurement: ScriptMeasurement) -> str:
    total, most = sum(measurement.breakdown.values()), max(measurement.breakdown.values(), default=0)
    rows = [
        (categories.look(name).words, format_bytes(size), share_words(size, total), "█" * round(BAR * size / most))
        for name in categories.ordered(measurement.breakdown)
        if (size := measurement.breakdown[name])
    ]
    return text.table(rows, right=(1, 2)) if rows else ""


def _remedy(remedy: Remedy) -> str:
    saved = [format_bytes(remedy.saved_bytes)] if remedy.saved_bytes is not None else []
    saved += [f"{format_seconds(remedy.saved_seconds)} a step"] if remedy.saved_seconds is not None else []
    gain = f"saves {' and '.join(saved)}: " if saved else ""
    said = textwrap.fill(
        words.clean(f"{gain}{remedy.what}"), text.WIDTH, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False
    )
    code = "\n".join(f"      {words.clean(line)}" for line in remedy.code.splitlines())
    return f"{said}\n{code}" if code else said
