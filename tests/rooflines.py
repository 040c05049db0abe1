"""Rates of a machine that is not here, the same for every test of plans."""

from __future__ import annotations

from delest.records.hardware import Roofline

ROOFLINE = Roofline(
    device="here",
    basis="measured",
    source="by hand",
    threads=1,
    flops={"matmul.fp32": 5e10},
    reused_bytes=1e10,
    fresh_bytes=4e9,
    cached_bytes=4e10,
    overhead_seconds=5e-6,
)
