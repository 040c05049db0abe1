"""Devices side by side as plain text: which to take, then each with its plan, time and cost."""

from __future__ import annotations

from delest.records.devices import DeviceComparison, DeviceOption
from delest.reporting import text, words
from delest.units import format_bytes, format_seconds

HEADER = ("device", "how many", "peak", "a step", "whole run", "cost", "how")


def devices_text(found: DeviceComparison) -> str:
    """The comparison; the first line says which device to take."""
    reasons = [(option.name, option.why) for option in found.options]
    return text.sections(
        verdict(found),
        ("", text.table([_row(option) for option in found.options], HEADER, right=range(1, 6))),
        ("why", text.table(reasons)),
        ("", text.bullets(found.notes)),
    )


def verdict(found: DeviceComparison) -> str:
    """ "take t4: 9.1 GiB of 16 GiB, 0.31 s a step, 2 h 10 min for 25,000 steps, cost 0.76; the cheapest of 4"."""
    best = found.best
    if best is None or best.step_seconds is None or best.seconds is None:
        return f"none to take: {found.why}"
    many = f"{best.count} times " if best.count != 1 else ""
    sure = "" if best.basis == "trace" else " (by arithmetic, communication not counted)"
    memory = f"{format_bytes(best.peak_bytes or 0)} of {format_bytes(best.budget_bytes)}"
    pace = f"{format_seconds(best.step_seconds)} a step, {format_seconds(best.seconds)} for {words.format_count(found.steps, 'step')}"
    cost = "" if best.cost is None else f", cost {money(best.cost)}"
    return f"take {many}{best.name}{sure}: {memory}, {pace}{cost}; {found.why}"


def money(amount: float) -> str:
    """In the unit of the prices: hundredths, more digits below a tenth of them."""
    return f"{amount:,.2f}" if amount >= 0.1 else f"{amount:.2g}"


def _row(option: DeviceOption) -> tuple[str, ...]:
    if option.plan is None or option.step_seconds is None or option.seconds is None:
        least = "" if option.high_bytes is None else f"at least {format_bytes(option.high_bytes)}"
        return (option.name, "", least, "", "", "", "does not fit")
    return (
        option.name,
        str(option.count),
        format_bytes(option.peak_bytes or 0),
        format_seconds(option.step_seconds),
        format_seconds(option.seconds),
        "" if option.cost is None else money(option.cost),
        _plan_words(option),
    )


def _plan_words(option: DeviceOption) -> str:
    assert option.plan is not None
    plan = option.plan
    blocks = (plan.config("activation_checkpointing") or {}).get("modules", ())
    share = -(-plan.batch_size // (option.count or 1))
    parts = -(-share // plan.micro_batch)
    pieces = [
        f"{parts} parts of {plan.micro_batch:,}"
        if parts > 1
        else f"{words.format_count(min(share, plan.micro_batch), 'row')} at once"
    ]
    if blocks:
        pieces.append(f"{words.format_count(len(blocks), 'block')} recomputed")
    if option.count != 1:
        pieces.append("states sharded")
    shown = ("micro_batch", "activation_checkpointing")
    return ", ".join(pieces + [choice.method.replace("_", " ") for choice in plan.choices if choice.method not in shown])
