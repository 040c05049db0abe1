"""What training takes, as plain text: a verdict, where the bytes are, when, in which modules, and how that is known."""

from __future__ import annotations

from collections.abc import Sequence

from delest.records.footprint import PHASES, Footprint
from delest.reporting import categories, modules, text, words
from delest.units import format_bytes, format_seconds

BAR = 78  # blocks, behind two spaces
MANY = 10  # modules that are listed before the rest is summed up
NAME = 44  # characters of a module's name

HOW = {
    "trace": "from a trace of two steps without memory",
    "replay": "from a trace of two steps, replayed through the allocator",
    "probe": "from small trial steps in a child process",
    "run": "of real steps",
}


def fits(footprint: Footprint, budget_bytes: int) -> bool:
    """Whether even the upper end of the interval keeps within a budget."""
    return footprint.high_bytes <= budget_bytes


def verdict(footprint: Footprint, *, budget_bytes: int | None = None) -> str:
    """ "fits: 1.4 GiB of 2 GiB, 0.31 s a step, bound by compute"; without a budget the peak with its interval."""
    size = format_bytes(footprint.peak_bytes)
    interval = f" ({interval_words(footprint)})" if footprint.low_bytes < footprint.high_bytes else ""
    if budget_bytes is None:
        said = f"{size}{interval} at the peak"
    elif fits(footprint, budget_bytes):
        said = f"fits: {size} of {format_bytes(budget_bytes)}"
    else:
        sure = "does not fit" if footprint.peak_bytes > budget_bytes else "may not fit"
        said = f"{sure}: {size}{interval} of {format_bytes(budget_bytes)}"
    pace = [] if footprint.step_seconds is None else [f"{format_seconds(footprint.step_seconds)} a step"]
    bound = [] if footprint.bound_by is None else [f"bound by {footprint.bound_by}"]
    return words.clean(", ".join([said, *pace, *bound]))


def interval_words(footprint: Footprint) -> str:
    """ "1.3 to 1.5 GiB": the unit once where both ends have it."""
    low, high = format_bytes(footprint.low_bytes), format_bytes(footprint.high_bytes)
    if low == high:
        return low
    amount, unit = low.split()
    return f"{amount if unit == high.split()[1] else low} to {high}"


def footprint_text(footprint: Footprint, *, budget_bytes: int | None = None) -> str:
    """The whole footprint for the terminal; the first line says whether it fits, or what it takes."""
    bar = breakdown_bar(footprint)
    return text.sections(
        verdict(footprint, budget_bytes=budget_bytes),
        ("at the peak", bar and f"  {bar}\n{_legend(footprint)}"),
        ("by phase", _phases(footprint)),
        ("hungriest modules, each without those inside it", _modules(footprint)),
        ("how this is known", text.table(facts(footprint))),
        ("", text.bullets(footprint.notes)),
    )


def sweep_text(footprints: Sequence[Footprint], *, budget_bytes: int | None = None) -> str:
    """One footprint a row, by batch size, and which of them keep within a budget."""
    if not footprints:
        return "no batch size was tried"
    ranked = sorted(footprints, key=lambda footprint: (footprint.batch_size, footprint.micro_batch))
    header = ["batch", "peak", "interval", "a step", "rows a second"]
    rows = [
        [
            f"{footprint.batch_size:,}",
            format_bytes(footprint.peak_bytes),
            interval_words(footprint) if footprint.low_bytes < footprint.high_bytes else "",
            "" if footprint.step_seconds is None else format_seconds(footprint.step_seconds),
            "" if not footprint.step_seconds else words.format_number(footprint.batch_size / footprint.step_seconds),
        ]
        for footprint in ranked
    ]
    if budget_bytes is not None:
        header.append("fits")
        for row, footprint in zip(rows, ranked, strict=True):
            row.append("yes" if fits(footprint, budget_bytes) else "no" if footprint.peak_bytes > budget_bytes else "perhaps")
    return text.sections(
        _sweep_verdict(ranked, budget_bytes),
        ("", text.table(rows, header, right=range(5))),
        ("", text.bullets(_shared_notes(ranked))),
    )


def breakdown_bar(footprint: Footprint) -> str:
    """The bytes at the peak as `BAR` blocks, a pattern for each category; "" where they were not taken apart."""
    total = sum(footprint.breakdown.values())
    bar, reached = "", 0
    for category in categories.ordered(footprint.breakdown):
        reached += footprint.breakdown[category]
        bar += categories.look(category).block * (round(BAR * reached / total) - len(bar) if total else 0)
    return bar


def facts(footprint: Footprint) -> list[tuple[str, str]]:
    """How the figures were come by, as names and values; what is not known is left out."""
    parts = -(-footprint.batch_size // footprint.micro_batch)
    split = f" in {parts:,} parts of {footprint.micro_batch:,}" if parts > 1 else ""
    where = "" if footprint.isolated else ", in this process rather than one of its own"
    found = [
        ("basis", f"{footprint.basis} {HOW[footprint.how]}{where}"),
        ("batch", f"{words.format_count(footprint.batch_size, 'row')}{split}"),
        ("device", f"{footprint.device}, allocator {footprint.allocator}"),
        ("runtime", f"{format_bytes(footprint.runtime_bytes)} of a warm idle process, included"),
    ]
    if footprint.allocated_bytes is not None:
        found.append(("tensors", f"at most {format_bytes(footprint.allocated_bytes)} live at once"))
    if step := _step_words(footprint):
        found.append(("step", step))
    if footprint.basis == "estimate":
        found.append(("validated on", ", ".join(footprint.validated_on) or "no device yet"))
    return [(name, words.clean(value)) for name, value in found]


def phase_bytes(footprint: Footprint) -> list[tuple[str, int]]:
    """Phases in the order in which they happen, named as people say them."""
    known = [phase for phase in PHASES if phase in footprint.phases]
    rest = [phase for phase in footprint.phases if phase not in PHASES]
    return [(phase.replace("_", " "), footprint.phases[phase]) for phase in [*known, *rest]]


def share_words(part: float, whole: float) -> str:
    """ "41 %", "0.3 %", "under 0.1 %"."""
    share = 100 * part / whole if whole else 0.0
    if 0 < share < 0.1:
        return "under 0.1 %"
    return f"{share:.1f} %" if share < 9.95 else f"{share:.0f} %"


def _step_words(footprint: Footprint) -> str:
    said = []
    if footprint.step_seconds:
        spread = footprint.step_seconds_spread
        middle = "" if spread is None else f" (middle half within {format_seconds(spread)})"
        said.append(f"{format_seconds(footprint.step_seconds)}{middle}")
        said.append(f"{words.format_number(footprint.batch_size / footprint.step_seconds)} rows a second")
    if footprint.waiting_seconds is not None:
        said.append(f"{format_seconds(footprint.waiting_seconds)} of it waiting for data")
    if footprint.flops is not None:
        said.append(format_flops(footprint.flops))
    if footprint.utilisation is not None:
        said.append(f"{share_words(footprint.utilisation, 1)} of the device's highest rate")
    return ", ".join(said)


def format_flops(flops: float) -> str:
    """ "31 GFLOP": operations of floating point numbers, a multiply-add is 2."""
    for power, letter in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if flops >= 0.9995 * 10**power:
            return f"{flops / 10**power:.3g} {letter}FLOP"
    return f"{flops:.3g} FLOP"


def _legend(footprint: Footprint) -> str:
    total = sum(footprint.breakdown.values())
    rows = [
        (look.block, look.words, format_bytes(size), share_words(size, total))
        for look, size in (
            (categories.look(name), footprint.breakdown[name]) for name in categories.ordered(footprint.breakdown)
        )
        if size
    ]
    return text.table(rows, right=(2,))


def _phases(footprint: Footprint) -> str:
    phases = phase_bytes(footprint)
    most = max((size for _, size in phases), default=0) or 1
    return (
        text.table([(name, format_bytes(size), "█" * round(40 * size / most)) for name, size in phases], right=(1,))
        if phases
        else ""
    )


def _modules(footprint: Footprint) -> str:
    """The first `MANY` and, in one line, the rest."""
    shares = modules.hungriest(footprint)
    if not shares:
        return ""
    whole = sum(modules.weight(share) for share in shares)
    timed = any(share.seconds for share in shares)
    rows = [
        (
            format_bytes(modules.weight(share)),
            share_words(modules.weight(share), whole),
            modules.PARTS[modules.mostly(share)],
            *(("" if share.seconds is None else format_seconds(share.seconds),) if timed else ()),
            f"{modules.short_name(share.name, NAME) or 'the model itself'} ({share.kind})",
        )
        for share in shares[:MANY]
    ]
    header = ("bytes", "share", "mostly", *(("a step",) if timed else ()), "module")
    rest = shares[MANY:]
    more = f"\n  and {words.format_count(len(rest), 'more module')}, together {format_bytes(sum(map(modules.weight, rest)))}"
    return text.table(rows, header, right=(0, 1, 3) if timed else (0, 1)) + (more if rest else "")


def _sweep_verdict(ranked: Sequence[Footprint], budget_bytes: int | None) -> str:
    if budget_bytes is None:
        sizes = words.interval_words(*(ends(footprint.peak_bytes for footprint in ranked) for ends in (min, max)))
        return f"{words.format_count(len(ranked), 'batch size')}: {sizes} at the peak"
    fitting = [footprint for footprint in ranked if fits(footprint, budget_bytes)]
    if not fitting:
        least = min(ranked, key=lambda footprint: footprint.high_bytes)
        upper = format_bytes(least.high_bytes)
        return f"does not fit: batch {least.batch_size:,} already takes up to {upper} of {format_bytes(budget_bytes)}"
    largest = fitting[-1]
    return f"fits up to batch {largest.batch_size:,}{verdict(largest, budget_bytes=budget_bytes).removeprefix('fits')}"


def _shared_notes(ranked: Sequence[Footprint]) -> list[str]:
    """Notes of all rows, each once."""
    return list(dict.fromkeys(note for footprint in ranked for note in footprint.notes))
