"""Sizes, times and shares as people write them, read and written in one place."""

from __future__ import annotations

import math
import re

from delest import errors

_BYTES = {
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)},
}
_SECONDS = {"": 1.0, "ms": 1e-3, "s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-z%]*)\s*")


def read_size(text: str | int, whole_bytes: int | None = None) -> int:
    """Bytes of `8GiB` (powers of 1024), `500MB` (powers of 1000) or `80%` of `whole_bytes` (None: there is nothing to be a share of); an int is bytes already.

    Raises `BadInput` where it is none of these, has no unit or is not above zero.
    """
    if isinstance(text, int):
        amount, unit = float(text), "b"
    else:
        amount, unit = _only_part(text) or (0.0, "")
    if unit == "%" and 0 < amount <= 100 and whole_bytes is not None:
        return int(whole_bytes * amount / 100)
    if unit in _BYTES and amount * _BYTES[unit] >= 1:
        return int(amount * _BYTES[unit])
    examples = "500kB or 2MB" if whole_bytes is None else "8GiB, 500MB or 80%"
    raise errors.BadInput(f"{text!r} is not a size: write a number above zero with its unit, as in {examples}.")


def read_seconds(text: str | float) -> float:
    """Seconds of `5ms`, `90s`, `30min`, `2h` or `1h 30min`; a number without a unit is seconds.

    Raises `BadInput` where it is none of these or not above zero.
    """
    if isinstance(text, (int, float)):
        seconds = float(text)
    else:
        parts = _PART.findall(text.strip().lower())
        known = bool(parts) and _PART.sub("", text.strip().lower()) == "" and all(unit in _SECONDS for _, unit in parts)
        bare = sum(not unit for _, unit in parts)
        clear = known and (not bare or len(parts) == 1)
        seconds = sum(float(amount) * _SECONDS[unit] for amount, unit in parts) if clear else 0.0
    if not (math.isfinite(seconds) and seconds > 0):
        raise errors.BadInput(
            f"{text!r} is not a length of time: write a number above zero with its unit, as in 90s, 30min or 2h."
        )
    return seconds


def read_share(text: str | float) -> float:
    """A fraction in [0, 1] of `5%` or `0.05`. Raises `BadInput` where it is neither or lies outside."""
    share = float(text) if isinstance(text, (int, float)) else math.nan
    if isinstance(text, str) and (part := _only_part(text)) and part[1] in ("", "%"):
        share = part[0] / 100 if part[1] else part[0]
    if not 0 <= share <= 1:
        raise errors.BadInput(f"{text!r} is not a share: write it as 5% or as 0.05, from 0 to 1.")
    return share


def format_bytes(size: float) -> str:
    """Three significant digits in powers of 1024: `412 MiB`, `1.4 GiB`, `17 B`."""
    if size < 0:
        return "-" + format_bytes(-size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if round(size, 1 if size < 9.95 else 0) < 1024:
            return f"{_short(size)} {unit}"
        size /= 1024
    return f"{_short(size)} TiB"


def format_seconds(seconds: float) -> str:
    """`35 µs`, `12 ms`, `0.31 s`, `42 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 0:
        return "-" + format_seconds(-seconds)
    if seconds < 0.9995e-3:
        return f"{_short(seconds * 1e6)} µs"
    if seconds < 0.0995:
        return f"{_short(seconds * 1e3)} ms"
    if seconds < 59.5:
        return f"{seconds:.2f} s" if seconds < 0.995 else f"{_short(seconds)} s"
    if seconds < 3599.5:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def _short(amount: float) -> str:
    """One decimal below ten, none above, no trailing `.0`."""
    return f"{amount:.1f}".removesuffix(".0") if amount < 9.95 else f"{amount:.0f}"


def _only_part(text: str) -> tuple[float, str] | None:
    """The number and the unit that a text consists of, None where it is anything else."""
    match = _PART.fullmatch(text.strip().lower())
    return (float(match[1]), match[2]) if match else None
