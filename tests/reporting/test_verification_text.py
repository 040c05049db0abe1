from __future__ import annotations

from dataclasses import replace

import pytest

from delest.records.plan import Plan
from delest.records.verification import MethodCheck, ResumeCheck, Verification
from delest.reporting.verification import verification_text

KEPT = MethodCheck(
    name="micro_batch",
    keeps="rounding",
    ok=True,
    why="within 1e-09 over 20 steps in fp64.",
    steps=20,
    precision="fp64",
    tolerance=1e-9,
    loss_difference=0.0,
    gradient_difference=3.4e-16,
    weight_difference=2e-12,
)
CHANGED = replace(KEPT, name="precision", keeps="changed", why="changed: not judged", tolerance=None, loss_difference=0.0123)
BROKEN = MethodCheck(name="memory_format", keeps="bitwise", ok=False, why="steps with it fail: ZeroDivisionError.")
RESUMED = ResumeCheck(ok=True, why="the same.", steps=8, killed_at=6, resumed_from=5, sha256="a" * 64, resumed_sha256="a" * 64)
FOUND = Verification(
    ok=True, plan=Plan(batch_size=128, micro_batch=32, threads=2), methods=(KEPT, CHANGED), resume=RESUMED, rows=128
)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (
            FOUND,
            "verified: 1 comparison within tolerance; 1 comparison reported and not judged by difference; a killed run goes on bit for bit",
        ),
        (replace(FOUND, methods=()), "verified: nothing to compare, the plan has no methods; a killed run goes on bit for bit"),
        (
            replace(FOUND, methods=(KEPT,), resume=ResumeCheck(ok=None, why="not tried: no file")),
            "verified: 1 comparison within tolerance; resuming was not tried",
        ),
        (replace(FOUND, ok=False, methods=(KEPT, BROKEN)), "1 of 3 checks failed: memory_format"),
        (
            replace(FOUND, ok=False, methods=(BROKEN,), resume=replace(RESUMED, ok=False)),
            "2 of 2 checks failed: memory_format, kill and resume",
        ),
    ],
)
def test_the_verdict_is_the_first_line(found, verdict):
    assert verification_text(found).splitlines()[0] == verdict


def test_differences_stand_in_a_table():
    lines = verification_text(replace(FOUND, methods=(KEPT, CHANGED, BROKEN), rows=64)).splitlines()
    kept, changed, broken = (
        next(line for line in lines if f" {name} " in line) for name in ("micro_batch", "precision", "memory_format")
    )
    assert kept.split()[:9] == ["ok", "micro_batch", "rounding", "0", "3e-16", "2e-12", "1e-09", "20", "in"]
    assert changed.split()[:6] == ["ok", "precision", "changed", "0.012", "3e-16", "2e-12"]
    assert broken.split()[:6] == ["FAILED", "memory_format", "bitwise", "-", "-", "-"]
    assert "64 rows of 128, for which the plain step fits" in verification_text(replace(FOUND, rows=64))
    assert "  memory_format  steps with it fail: ZeroDivisionError." in lines
    assert max(map(len, lines[1:])) <= 100


def test_the_run_that_was_killed_is_told():
    told = " ".join(verification_text(FOUND).split())
    assert "ok killed at step 6 of 8, resumed from step 5: the same. SHA-256 aaaaaaaaaaaa and aaaaaaaaaaaa" in told
