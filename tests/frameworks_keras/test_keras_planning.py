"""What is chosen for a Keras job from what its steps took: parts, bf16, malloc; and what a plan of real steps says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="`make test-keras` runs this test where Keras is installed")

from delest import errors, malloc  # noqa: E402
from delest.hardware import machine  # noqa: E402
from delest.job import Job, Recipe  # noqa: E402
from delest.records.plan import Choice, Plan  # noqa: E402
from delest.training.progress import Progress  # noqa: E402
from delest.verbs import keras_planning  # noqa: E402
from delest.verbs.workplace import Workplace, open_workplace  # noqa: E402

MIB = 1 << 20
FILE = """
import keras
import numpy as np

import delest

random = np.random.default_rng(0)
data = random.normal(size=(400, 16)).astype("float32"), random.integers(0, 3, 400)


def net():
    return keras.Sequential([keras.Input((16,)), keras.layers.Dense(64, activation="relu"), keras.layers.Dense(3)])


job = delest.Job(model=net, data=data, batch_size=128, recipe=delest.Recipe(epochs=2, precision=PRECISION), name="small")
"""


def net() -> Any:
    return keras.Sequential([keras.Input((16,)), keras.layers.Dense(3)])


def place(precision: str = "auto") -> Workplace:
    random = np.random.default_rng(0)
    data = random.normal(size=(400, 16)).astype("float32"), random.integers(0, 3, 400)
    job = Job(model=net, data=data, batch_size=128, recipe=Recipe(epochs=2, precision=precision))
    opened = open_workplace(job, Progress())
    return replace(opened, job=replace(opened.job, origin="small.py:job"))  # as if it were in a file


class Steps:
    """What steps on some rows take: so many bytes a row, the fewer where malloc gives blocks back; half the time in bf16."""

    def __init__(
        self,
        row_bytes: int = 4 * MIB,
        mapped_bytes: int = 2 * MIB,
        statistics: bool = False,
        gain: float | None = 0.5,
        fault: str = "",
    ):
        self.unsuited = {"precision": f"a step in bf16 fails: {fault}"} if fault else {}
        self.idle = machine.resident_bytes() + 8 * MIB
        self.row_bytes, self.mapped_bytes, self.statistics, self.gain = row_bytes, mapped_bytes, statistics, gain
        self.made: list[tuple[str, ...]] = []

    def __call__(
        self,
        place: Any,
        sizes: Sequence[int],
        threads: Any,
        say: Any,
        *,
        choices: Sequence[Choice] = (),
        compared: bool = False,
    ) -> list[dict[str, Any]]:
        names = tuple(choice.method for choice in choices)
        self.made.append(names)
        a_row = self.mapped_bytes if "allocator" in names else self.row_bytes
        share = self.gain if "precision" in names and self.gain is not None else 1.0
        found = []
        for rows in sizes:
            grown = dict.fromkeys(("first_step", "steady_step", "evaluation"), self.idle + rows * a_row)
            footprint = {"batch_size": rows, "runtime_bytes": self.idle, "phases": grown, "step_seconds": 0.01 * rows * share}
            model = {"batch_statistics": self.statistics, "parameters": 51, "largest_bytes": 0, "bytes": {"parameters": 204}}
            tried = {} if not compared or self.gain is None else {"precision": {"plain": 1.0, "with": self.gain}}
            given = {"footprint": footprint, "opened_bytes": 1 << 40, "base_bytes": 0, "model": model, "variants": tried}
            found.append({**given, "unsuited": self.unsuited})
        return found


def plan(monkeypatch: pytest.MonkeyPatch, steps: Steps, rows: float | None, **wishes: Any) -> Plan:
    """The plan within what so many rows take, its margins included."""
    monkeypatch.setattr(keras_planning, "measured", steps)
    memory = None if rows is None else steps.idle + int(rows * steps.row_bytes * 1.1) + 48 * MIB
    told = {"memory": memory, "device": None, "threads": None, "exact": False, "probe": False, **wishes}
    return keras_planning.plan_keras(told.pop("place", None) or place(), say=Progress(), **told)


def methods(plan: Plan) -> list[str]:
    return [choice.method for choice in plan.choices]


def test_parts_and_bf16_are_chosen_by_steps(monkeypatch: pytest.MonkeyPatch):
    steps = Steps()
    found = plan(monkeypatch, steps, 70)
    assert methods(found) == ["precision", "micro_batch"]
    assert found.micro_batch == 64
    assert steps.made[:2] == [(), ("precision",)]  # memory is measured with what was chosen
    assert found.predicted is not None
    assert found.plain is not None
    assert found.plain.step_seconds == pytest.approx(2 * found.predicted.step_seconds)
    assert 'set_dtype_policy("mixed_bfloat16")' in found.code
    assert "gradient_accumulation_steps=2" in found.code
    assert found.made_for["framework"] == f"Keras on {keras.backend.backend()}"


def test_bf16_that_does_not_gain_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch):
    for gain, words in ((0.98, "no gain here"), (None, "bf16 products are slower")):
        steps = Steps(gain=gain)
        found = plan(monkeypatch, steps, 200)
        assert methods(found) == []
        assert steps.made == [()]
        assert words in next(one.why for one in found.rejected if one.method == "precision")


def test_exact_plans_leave_bf16_out(monkeypatch: pytest.MonkeyPatch):
    found = plan(monkeypatch, Steps(), 70, exact=True)
    assert methods(found) == ["micro_batch"]
    assert found.choices[0].keeps == "rounding"


def test_exact_plans_of_a_model_that_normalises_over_its_batch_keep_it_whole(monkeypatch: pytest.MonkeyPatch):
    steps = Steps(statistics=True, mapped_bytes=4 * MIB)
    with pytest.raises(errors.NothingFits, match="with 128 rows at a time"):
        plan(monkeypatch, steps, 70, exact=True)
    assert methods(plan(monkeypatch, Steps(statistics=True), 300, exact=True)) == []
    assert methods(plan(monkeypatch, Steps(statistics=True), None, exact=True, probe=True)) == []


def test_a_plan_of_the_smallest_budget_is_told_as_keras_has_it(monkeypatch: pytest.MonkeyPatch):
    steps = Steps(mapped_bytes=4 * MIB)
    with pytest.raises(errors.NothingFits) as caught:
        plan(monkeypatch, steps, -0.2)
    assert caught.value.plan is not None
    assert 'set_dtype_policy("mixed_bfloat16")' in caught.value.plan["code"]
    assert "torch" not in caught.value.plan["code"]


def test_bf16_that_a_model_cannot_compute_in_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch):
    steps = Steps(gain=None, fault="TypeError: no bf16 here")
    (found,) = [one for one in plan(monkeypatch, steps, 200).rejected if one.method == "precision"]
    assert found.why == "a step in bf16 fails: TypeError: no bf16 here"


def test_what_parts_do_to_statistics_is_said_without_ways_that_only_torch_jobs_have(monkeypatch: pytest.MonkeyPatch):
    (said,) = [note for note in plan(monkeypatch, Steps(statistics=True), 70).notes if "normalises over the batch" in note]
    assert "--exact" not in said


def test_a_recipe_s_bf16_is_in_every_plan(monkeypatch: pytest.MonkeyPatch):
    steps = Steps(gain=None)
    for rows, names in ((None, ["precision"]), (70, ["precision", "micro_batch"])):
        assert methods(plan(monkeypatch, steps, rows, place=place("bf16"))) == names


@pytest.mark.skipif(
    not malloc.is_glibc() or malloc.started_with() != "glibc", reason="another malloc is tried beside glibc's own"
)
def test_another_malloc_is_tried_where_nothing_fits(monkeypatch: pytest.MonkeyPatch):
    steps = Steps(row_bytes=100 * MIB, mapped_bytes=MIB, gain=None)
    found = plan(monkeypatch, steps, 0.5)
    assert methods(found)[0] == "allocator"
    assert "MALLOC_MMAP_THRESHOLD_" in found.code
    assert steps.made == [(), ("allocator",)]
    with pytest.raises(errors.NothingFits) as caught:
        plan(monkeypatch, steps, -0.2)
    assert caught.value.smallest_bytes < steps.idle + 60 * MIB  # with the other malloc


@pytest.mark.skipif(
    not malloc.is_glibc() or malloc.started_with() != "glibc", reason="another malloc is tried beside glibc's own"
)
def test_on_tensorflow_another_malloc_is_tried_before_parts(monkeypatch: pytest.MonkeyPatch):
    steps = Steps(mapped_bytes=MIB, gain=None)
    scatters = keras.backend.backend() == "tensorflow"
    found = plan(monkeypatch, steps, 70)
    assert methods(found) == (["allocator"] if scatters else ["micro_batch"])
    assert steps.made == ([(), ("allocator",)] if scatters else [()])
    found = plan(monkeypatch, steps := Steps(mapped_bytes=4 * MIB, gain=None), 70)  # where it takes no less
    assert methods(found) == ["micro_batch"]
    assert plan(monkeypatch, steps, 200).choices == ()


def test_without_a_budget_a_probe_compares_too(monkeypatch: pytest.MonkeyPatch):
    found = plan(monkeypatch, Steps(), None, probe=True)
    assert methods(found) == ["precision"]
    assert (found.memory_bytes, found.micro_batch) == (None, 128)
    assert "no other methods" in found.notes[-1]


def command(folder: Path, *arguments: str, status: int = 0) -> Any:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "DELEST_CACHE": str(folder / "cache"), "TMPDIR": str(folder)}
    words = [sys.executable, "-m", "delest", *arguments, "--json"]
    done = subprocess.run(words, cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return json.loads(done.stdout)


def test_a_probe_of_real_steps_takes_bf16_or_says_why_not(tmp_path: Path):
    (tmp_path / "small.py").write_text(FILE.replace("PRECISION", "'auto'"))
    found = command(tmp_path, "plan", "small.py", "--probe")
    named = [one["method"] for one in (*found["choices"], *found["rejected"]) if one["method"] == "precision"]
    assert named == ["precision"]
    assert found["predicted"]["step_seconds"] > 0


def test_a_recipe_in_bf16_runs_to_a_bundle_in_fp32(tmp_path: Path):
    (tmp_path / "small.py").write_text(FILE.replace("PRECISION", "'bf16'"))
    command(tmp_path, "run", "small.py", "--out", "run", "--max-drop", "0.5")
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [one["method"] for one in run["plan"]["choices"]] == ["precision"]
    shrunk = json.loads((tmp_path / "run" / "shrunk" / "shrink.json").read_text())
    assert next(one for one in shrunk["candidates"] if one["name"] == "fp32")["parity"] < 1e-3
