"""Times that are written as text, in one of the common forms."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from delest import errors

if TYPE_CHECKING:
    import polars as pl
    from numpy.typing import NDArray

_LIKE_A_DATE = re.compile(
    r"\s*(\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.](\d{4}|\d{2})"
    r"|(\d{1,2}\.? +)?(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.? +(\d{1,2}, *)?\d{4})([ T]+\d{1,2}:\d{2}.*)?\s*",
    re.IGNORECASE,
)
_MOST = 0.9  # of the values: the others may be slips
_DAYS = (
    *("%Y-%m-%d", "%Y/%m/%d", "%Y.%m.%d", "%d.%m.%Y", "%d.%m.%y", "%b %d, %Y", "%d %b %Y"),
    *("%m/%d/%Y", "%d/%m/%Y", "%m/%d/%y", "%d/%m/%y", "%m-%d-%Y", "%d-%m-%Y", "%m-%d-%y", "%d-%m-%y"),
)
_CLOCKS = ("", " %H:%M", " %H:%M:%S", " %H:%M:%S%.f", "T%H:%M", "T%H:%M:%S", "T%H:%M:%S%.f", " %I:%M %p", " %I:%M:%S %p")


def look_like_dates(texts: NDArray) -> bool:
    """Whether nearly all of the distinct values of texts [N] are shaped like dates."""
    distinct = np.unique(texts).tolist()
    return sum(bool(_LIKE_A_DATE.fullmatch(text)) for text in distinct) >= _MOST * len(distinct) > 0


def read_times(name: str, texts: NDArray) -> NDArray:
    """Texts [N] of the column `name` as datetime64 [N].

    Raises `BadInput` where no form fits every value, or where the day may be the month.
    """
    import polars as pl

    distinct, places = np.unique(texts, return_inverse=True)
    series = pl.Series(distinct.tolist(), dtype=pl.String).str.strip_chars()
    found = []
    for form in (day + clock for day in _DAYS for clock in _CLOCKS):
        if _parsed(series.head(20), form).null_count() == 0:
            times = _parsed(series, form)
            if times.null_count() == 0:
                found.append(times)
    advice = "Write dates as 2023-03-14, or say with --split-kind group that each value is a group."
    if not found:
        shown = next((text for text in series.to_list() if not _LIKE_A_DATE.fullmatch(text)), series[0])
        raise errors.BadInput(
            f"split by {name!r}: the dates are in no one form that is known here, {shown!r} for one. {advice}"
        )
    if any(not times.equals(found[0]) for times in found[1:]):
        raise errors.BadInput(f"split by {name!r}: in {series[0]!r} the day may be the month, and no value tells. {advice}")
    return found[0].to_numpy()[places]


def _parsed(series: pl.Series, form: str) -> pl.Series:
    """Times, null where a text has another form; a year of two digits is none of four."""
    times = series.str.to_datetime(form, strict=False, time_unit="us")
    return times.set(times.dt.year() < 1000, None)
