"""Which remedies follow from what was seen, with what estimated saving, in which order."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest

from delest.footprint.remedies import find_remedies
from delest.records.script import OptimizerUse, Remedy, ScriptMeasurement

MIB = 1 << 20
PLAIN = ScriptMeasurement(
    command=("python", "train.py"),
    status=0,
    seconds=60.0,
    peak_bytes=1000 * MIB,
    steady_peak_bytes=1000 * MIB,
    runtime_bytes=300 * MIB,
    breakdown={
        "parameters": 100 * MIB,
        "buffers": 0,
        "gradients": 100 * MIB,
        "optimizer": 0,
        "activations": 0,
        "temporaries": 490 * MIB,
        "data": 10 * MIB,
        "runtime": 300 * MIB,
    },
    steps=100,
    step_seconds=1.0,
    waiting_seconds=0.0,
    optimizers=(OptimizerUse(name="AdamW", steps=100, parameter_bytes=100 * MIB, state_bytes=0, implementation="fused"),),
    micro_batch=32,
    batch_rows=32,
)
LOADER = {"dataset": "Images", "workers": 0, "batches": 100, "rows": 32, "bytes": 10 * MIB, "dtypes": ["float32"]}
ROOT = {
    "name": "Net",
    "parameters": 25 * MIB,
    "buffer_bytes": 0,
    "leaves": 10,
    "batch_statistics": False,
    "can_checkpoint": False,
    "checkpoints": False,
    "compiled": False,
}
REPORT: dict[str, Any] = {
    "training": [LOADER],
    "evaluation": [],
    "roots": [ROOT],
    "optimizers": [{"dtypes": ["float32"]}],
    "samples": [],
    "frameworks": [],
    "gradients_kept": False,
    "evaluates_with_gradients": False,
}


def with_bytes(**sizes: int) -> ScriptMeasurement:
    """`PLAIN` with other categories, their difference taken from temporaries."""
    breakdown = {**PLAIN.breakdown, **sizes}
    breakdown["temporaries"] += sum(PLAIN.breakdown.values()) - sum(breakdown.values())
    return replace(PLAIN, breakdown=breakdown)


def only(measured: ScriptMeasurement, **report: Any) -> Remedy:
    (remedy,) = find_remedies(measured, {**REPORT, **report})
    return remedy


def test_a_script_with_nothing_amiss_gets_no_remedy() -> None:
    assert find_remedies(PLAIN, REPORT) == ()


def test_waiting_is_hidden_by_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(3)))
    remedy = only(replace(PLAIN, waiting_seconds=0.8))
    assert remedy.saved_seconds == pytest.approx(0.6)  # two workers need 0.4 s a batch, of which 0.2 s are hidden
    assert "num_workers=2" in remedy.code
    remedy = only(replace(PLAIN, waiting_seconds=0.4), frameworks=["transformers.trainer"])
    assert remedy.saved_seconds == pytest.approx(0.4)
    assert "dataloader_num_workers=2" in remedy.code


@pytest.mark.parametrize(
    ("cores", "changed", "code"),
    [(1, {}, "mmap_mode"), (8, {"workers": 4}, "mmap_mode"), (8, {"dataset": "TensorDataset"}, "torch.randperm")],
)
def test_waiting_where_workers_are_not_the_answer(
    cores: int, changed: dict[str, Any], code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    remedy = only(replace(PLAIN, waiting_seconds=0.5), training=[{**LOADER, **changed}])
    assert code in remedy.code
    assert remedy.saved_seconds is not None
    assert 0.2 < remedy.saved_seconds < 0.5


def test_a_loop_over_parameters_is_fused() -> None:
    use = replace(PLAIN.optimizers[0], implementation="loop", seconds=0.5)
    remedy = only(replace(PLAIN, optimizers=(use,)))
    assert remedy.saved_seconds == pytest.approx(0.3)
    assert remedy.code == "torch.optim.AdamW(..., fused=True)"
    rare = replace(use, name="NAdam")  # torch has no fused form of it
    assert find_remedies(replace(PLAIN, optimizers=(rare,)), REPORT) == ()


@pytest.mark.parametrize(
    ("frameworks", "code"),
    [
        ([], "inputs.chunk(2)"),
        (["lightning"], "accumulate_grad_batches=2"),
        (["transformers.trainer"], "gradient_accumulation_steps=2"),
    ],
)
def test_large_activations_are_split(frameworks: list[str], code: str) -> None:
    remedy = only(with_bytes(activations=400 * MIB), frameworks=frameworks)
    assert remedy.saved_bytes == 200 * MIB
    assert code in remedy.code
    assert "batch normalisation" not in remedy.what
    warned = only(with_bytes(activations=400 * MIB), frameworks=frameworks, roots=[{**ROOT, "batch_statistics": True}])
    assert "batch normalisation" in warned.what


def test_checkpointing_is_named_where_it_is_offered_or_a_single_row_is_too_much() -> None:
    large = with_bytes(activations=400 * MIB)
    offers = {**ROOT, "can_checkpoint": True}
    codes = [remedy.code for remedy in find_remedies(large, {**REPORT, "roots": [offers]})]
    assert "model.gradient_checkpointing_enable()" in codes
    assert len(find_remedies(large, {**REPORT, "roots": [{**offers, "checkpoints": True}]})) == 1
    assert "checkpoint(block" in only(replace(large, micro_batch=1)).code


@pytest.mark.parametrize(("device", "code"), [("cpu", "Adafactor"), ("cuda", "AdamW8bit")])
def test_large_optimizer_state(device: str, code: str) -> None:
    use = replace(PLAIN.optimizers[0], state_bytes=200 * MIB)
    measured = replace(with_bytes(optimizer=200 * MIB), optimizers=(use,), device=device)
    remedy = only(measured)
    assert code in remedy.code
    assert remedy.saved_bytes is not None
    assert 140 * MIB < remedy.saved_bytes < 200 * MIB


def test_memory_that_the_allocator_keeps() -> None:
    full = {"resident": 900 * MIB, "free": 300 * MIB, "used": 500 * MIB, "gradient_bytes": 0}
    remedy = only(PLAIN, samples=[{"full": full}])
    assert remedy.saved_bytes == 300 * MIB
    assert remedy.code == "MALLOC_MMAP_THRESHOLD_=65536 python train.py"
    assert find_remedies(PLAIN, {**REPORT, "samples": [{"full": {**full, "free": 50 * MIB}}]}) == ()
    assert find_remedies(replace(PLAIN, device="cuda"), {**REPORT, "samples": [{"full": full}]}) == ()


@pytest.mark.parametrize(("activations", "saved"), [(60 * MIB, 60 * MIB), (130 * MIB, 100 * MIB)])
def test_gradients_that_stay(activations: int, saved: int) -> None:
    remedy = only(with_bytes(activations=activations), gradients_kept=True)
    assert remedy.saved_bytes == saved


def test_evaluation_with_gradients_saves_only_what_it_adds_to_the_peak() -> None:
    evaluation = [{**LOADER, "rows": 64}]
    activations = with_bytes(activations=130 * MIB)
    remedy = only(activations, evaluates_with_gradients=True, evaluation=evaluation)
    assert remedy.saved_bytes is None
    higher = replace(activations, peak_bytes=1200 * MIB)
    assert only(higher, evaluates_with_gradients=True, evaluation=evaluation).saved_bytes == 200 * MIB


def test_double_precision_in_the_model_or_in_the_data_alone() -> None:
    remedy = only(PLAIN, optimizers=[{"dtypes": ["float64"]}], training=[{**LOADER, "dtypes": ["float64"]}])
    assert (remedy.saved_bytes, remedy.saved_seconds) == (105 * MIB, 0.5)
    remedy = only(with_bytes(data=80 * MIB), training=[{**LOADER, "dtypes": ["float64"]}])
    assert remedy.saved_bytes == 40 * MIB


def test_steps_too_small_for_their_overhead() -> None:
    remedy = only(replace(PLAIN, step_seconds=0.001))
    assert remedy.saved_seconds == pytest.approx(0.0003)
    assert remedy.code == "DataLoader(..., batch_size=64)"


def test_three_are_shown_and_the_largest_share_comes_first() -> None:
    measured = replace(
        with_bytes(activations=400 * MIB, data=80 * MIB),
        waiting_seconds=0.05,
        optimizers=(replace(PLAIN.optimizers[0], implementation="loop", seconds=0.5),),
    )
    report = {**REPORT, "training": [{**LOADER, "dtypes": ["float64"], "workers": 4}]}
    remedies = find_remedies(measured, report)
    assert [remedy.what.split()[0] for remedy in remedies] == ["AdamW", "activations", "batches"]


def test_what_saves_less_than_repeats_differ_by_is_left_out() -> None:
    assert find_remedies(replace(PLAIN, waiting_seconds=0.005), REPORT) == ()
