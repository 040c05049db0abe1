from __future__ import annotations

import math

import pytest
from hypothesis import given, strategies as st

from delest.errors import BadInput
from delest.units import format_bytes, format_seconds, read_seconds, read_share, read_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 << 30),
        ("500MB", 500_000_000),
        ("1.5 gib", 3 << 29),
        ("64kib", 65536),
        ("2TB", 2_000_000_000_000),
        ("100 B", 100),
        ("80%", 800),
        ("100 %", 1000),
        (4096, 4096),
    ],
)
def test_sizes_are_read(text: str | int, size: int) -> None:
    assert read_size(text, 1000) == size


@pytest.mark.parametrize(
    "text", ["", "8", "8G", "GiB", "-1GiB", "0MB", "0%", "101%", "8GiB of RAM", "1e9B", "nan%", "0.1B", "1GiB2", 0, -5]
)
def test_what_is_no_size_is_refused(text: str | int) -> None:
    with pytest.raises(BadInput, match="as in 8GiB, 500MB or 80%"):
        read_size(text, 1000)


def test_a_share_of_nothing_is_no_size() -> None:
    assert read_size("2MB") == 2_000_000
    with pytest.raises(BadInput, match="as in 500kB or 2MB"):
        read_size("80%")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30min", 1800),
        ("90s", 90),
        ("2h", 7200),
        ("1h 30min", 5400),
        ("1h30m", 5400),
        ("0.5 s", 0.5),
        ("90", 90),
        (2.5, 2.5),
        ("1d", 86400),
    ],
)
def test_times_are_read(text: str | float, seconds: float) -> None:
    assert read_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "0s", "-5s", "5 parsecs", "1h 30", "10min!", "x10s", 0, -1.0, math.nan, math.inf])
def test_what_is_no_time_is_refused(text: str | float) -> None:
    with pytest.raises(BadInput, match="as in 90s, 30min or 2h"):
        read_seconds(text)


@pytest.mark.parametrize(("text", "share"), [("5%", 0.05), ("0.05", 0.05), ("100%", 1.0), ("0", 0.0), (0.3, 0.3), (1, 1.0)])
def test_shares_are_read(text: str | float, share: float) -> None:
    assert read_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "5", "101%", "-1%", "half", "5%%", "0.5GiB", 1.5, math.nan])
def test_what_is_no_share_is_refused(text: str | float) -> None:
    with pytest.raises(BadInput, match=r"5% or as 0\.05"):
        read_share(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (17, "17 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1500, "1.5 KiB"),
        ((1 << 20) - 1, "1 MiB"),
        (412 << 20, "412 MiB"),
        (3 << 29, "1.5 GiB"),
        (5 << 50, "5120 TiB"),
        (-2048, "-2 KiB"),
    ],
)
def test_sizes_are_written(size: int, text: str) -> None:
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 µs"),
        (35e-6, "35 µs"),
        (0.001, "1 ms"),
        (0.0123, "12 ms"),
        (0.31, "0.31 s"),
        (0.999, "1 s"),
        (41.6, "42 s"),
        (59.9, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.9, "1 h 00 min"),
        (7800, "2 h 10 min"),
        (-0.002, "-2 ms"),
    ],
)
def test_times_are_written(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@given(st.integers(1, 1 << 52))
def test_a_written_size_reads_back_within_its_digits(size: int) -> None:
    assert read_size(format_bytes(size), 1) == pytest.approx(size, rel=0.06, abs=0.5)


@given(st.floats(1e-3, 1e6).filter(lambda seconds: seconds >= 0.1))
def test_a_written_time_reads_back_within_its_digits(seconds: float) -> None:
    assert read_seconds(format_seconds(seconds)) == pytest.approx(seconds, rel=0.06)
