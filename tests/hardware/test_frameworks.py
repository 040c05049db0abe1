"""Frameworks proven by a training step: judged without them, and torch's for real."""

from __future__ import annotations

import pytest

from delest.hardware import frameworks
from delest.records.hardware import Accelerator, Hardware

HERE = Hardware(
    processor="x", cores=2, instruction_sets=(), memory_bytes=1 << 30, memory_limit_bytes=None, available_bytes=1 << 30
)
WITH_GPU = Hardware(**{**vars(HERE), "accelerators": (Accelerator(name="T4", memory_bytes=1 << 34),)})


def proof(**changes):
    return {"cuda": None, "capabilities": [], "devices": {"cpu": None}, **changes}


@pytest.mark.parametrize(
    ("found", "here", "ok", "words"),
    [
        (proof(), HERE, True, "built for processors alone, or sees no GPU; a training step works on cpu"),
        (
            proof(cuda="12.5", capabilities=["sm_75"], devices={"cpu": None, "cuda:0": None}),
            WITH_GPU,
            True,
            "CUDA 12.5 (sm_75); a training step works on cpu, cuda:0",
        ),
        (proof(), WITH_GPU, False, "does not use T4"),
        (proof(devices={"cpu": None, "cuda:0": "no kernel image"}), WITH_GPU, False, "not on cuda:0: no kernel image"),
        ("its process ended with signal 4", HERE, False, "signal 4"),
    ],
)
def test_what_a_step_did_is_told_with_a_remedy(found, here, ok, words):
    check = frameworks._judge("jax", found, here)
    assert (check.ok, words in check.detail) == (ok, True), check.detail
    assert (check.remedy is None) == ok


def test_torch_trains_here_and_what_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setattr(frameworks, "_SCRIPTS", {"torch": frameworks._SCRIPTS["torch"], "no_such_framework": ""})
    (check,) = frameworks.check_frameworks(HERE)
    assert check.ok, check
    assert "a training step works on cpu" in check.detail


def test_a_process_that_dies_is_told():
    assert "status 3" in frameworks._proof("import os; os._exit(3)", 60.0)
    assert "did not end" in frameworks._proof("import time; time.sleep(9)", 0.2)
