"""Lightning's and transformers' own loops, watched: same output, and figures that fit what the script does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from delest.footprint.script import measure_script
from delest.records.script import ScriptMeasurement

SCRIPTS = Path(__file__).parents[2] / "benchmarks" / "scripts"
STEPS = 12


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def measure_beside_a_plain_run(name: str, batch: int, capfd: pytest.CaptureFixture[str], timeline: bool) -> ScriptMeasurement:
    command = [sys.executable, str(SCRIPTS / name), "--steps", str(STEPS), "--batch-size", str(batch)]
    subprocess.run(command, check=True)
    alone = capfd.readouterr().out
    measured = measure_script(command, timeline=timeline)
    assert capfd.readouterr().out == alone
    assert alone.count("loss") > STEPS
    assert (measured.status, measured.steps, measured.notes) == (0, STEPS, ())
    assert sum(measured.breakdown.values()) == measured.steady_peak_bytes
    assert min(measured.breakdown.values()) >= 0
    assert (measured.batch_rows, measured.micro_batch) == (batch, batch)
    assert measured.step_seconds is not None
    assert measured.waiting_seconds is not None
    assert 0 < measured.waiting_seconds < measured.step_seconds
    return measured


@pytest.mark.parametrize("installed", ["lightning"], indirect=True)
@pytest.mark.parametrize("timeline", [False, True])
def test_lightning(installed: str, timeline: bool, capfd: pytest.CaptureFixture[str]) -> None:
    measured = measure_beside_a_plain_run("lightning_mnist.py", 32, capfd, timeline)
    weights = 16 * (9 + 1) + 32 * (16 * 9 + 1) + 128 * (32 * 144 + 1) + 10 * (128 + 1)
    assert measured.parameters == weights
    assert measured.breakdown["parameters"] == measured.breakdown["gradients"] == 4 * weights
    # Both convolutions' outputs after their ReLU, the pooled ones with the places they came from, in single precision.
    kept = 32 * 4 * (16 * 26 * 26 + 32 * 24 * 24 + 32 * 12 * 12 * (1 + 2))
    assert measured.breakdown["activations"] == pytest.approx(kept, rel=0.15)
    (use,) = measured.optimizers
    assert (use.name, use.implementation) == ("Adam", "loop")
    assert use.seconds is not None
    assert measured.step_seconds is not None
    assert use.seconds < measured.step_seconds / 2  # Lightning runs forward and backward inside the optimizer's step
    assert (measured.timeline is not None) == timeline


@pytest.mark.parametrize("installed", ["transformers"], indirect=True)
def test_trainer(installed: str, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("accelerate")
    measured = measure_beside_a_plain_run("transformers_trainer.py", 4, capfd, False)
    assert measured.breakdown["data"] == 2 * 4 * 64 * 8  # words and labels, 64 a row, as 64-bit integers
    (use,) = measured.optimizers
    assert (use.name, use.implementation) == ("AdamW", "fused")
    assert any("TrainingArguments" in remedy.code for remedy in measured.remedies)
