"""What `measure --` says about a script."""

from __future__ import annotations

from dataclasses import replace

from delest.records.script import OptimizerUse, Remedy, ScriptMeasurement
from delest.reporting.script import script_text

MIB = 1 << 20
MEASURED = ScriptMeasurement(
    command=("python", "train.py"),
    status=0,
    seconds=75.0,
    peak_bytes=900 * MIB,
    steady_peak_bytes=800 * MIB,
    runtime_bytes=300 * MIB,
    breakdown={"parameters": 100 * MIB, "activations": 400 * MIB, "buffers": 0, "runtime": 300 * MIB},
    steps=1200,
    step_seconds=0.05,
    step_seconds_spread=0.002,
    waiting_seconds=0.01,
    backward_seconds=0.025,
    optimizers=(
        OptimizerUse(
            name="AdamW",
            steps=1200,
            parameter_bytes=100 * MIB,
            state_bytes=200 * MIB,
            implementation="loop",
            seconds=0.008,
        ),
    ),
    parameters=26_000_000,
    batch_rows=64,
    micro_batch=32,
    remedies=(
        Remedy(what="activations take 400 MiB", saved_bytes=200 * MIB, code="for part in inputs.chunk(2):\n    ..."),
        Remedy(what="one after another", saved_seconds=0.005, code="AdamW(..., fused=True)"),
    ),
    notes=("a note",),
)


def test_the_whole_text() -> None:
    assert script_text(MEASURED).splitlines() == [
        "900 MiB at the peak, 50 ms a step, 20 % of it waiting for data",
        "",
        "  steps        1,200 in 1 min 15 s from start to end",
        "  steady peak  800 MiB in steps after warm-up",
        "  runtime      300 MiB of libraries and of data the script holds, included",
        "  step         50 ms (middle half within 2 ms), backward 25 ms, waiting for data 10 ms",
        "  parameters   26 million",
        "  batch        64 rows a step, at most 32 at a time",
        "  optimizer    AdamW (loop): state 200 MiB, 8 ms a step",
        "",
        "at the steady peak",
        f"  runtime      300 MiB  38 %  {'█' * 22}",
        f"  parameters   100 MiB  12 %  {'█' * 8}",
        f"  activations  400 MiB  50 %  {'█' * 30}",
        "",
        "what would help most (estimated)",
        "  - saves 200 MiB: activations take 400 MiB",
        "      for part in inputs.chunk(2):",
        "          ...",
        "  - saves 5 ms a step: one after another",
        "      AdamW(..., fused=True)",
        "",
        "notes",
        "  - a note",
    ]


def test_a_failed_script_without_steps_says_so_first() -> None:
    bare = ScriptMeasurement(command=("make",), status=143, seconds=2.0, peak_bytes=30 * MIB, notes=("no torch",))
    assert script_text(bare).splitlines() == [
        "the script ended with status 143: 30 MiB at the peak",
        "",
        "  steps  0 in 2 s from start to end",
        "",
        "notes",
        "  - no torch",
    ]


def test_a_gpu_is_told_apart_from_the_process_beside_it() -> None:
    text = script_text(replace(MEASURED, device="cuda", resident_peak_bytes=2048 * MIB, allocated_bytes=700 * MIB))
    assert "2 GiB resident at the peak, beside the GPU" in text
    assert "at most 700 MiB live at once" in text
    assert "runtime      300 MiB of libraries" not in text


def test_control_characters_of_a_users_names_do_not_reach_the_terminal() -> None:
    use = replace(MEASURED.optimizers[0], name="Evil\x1b[31m")
    assert "\x1b" not in script_text(replace(MEASURED, optimizers=(use,)))
