"""The forty cases of the benchmark on memory, and the figures that are made of them."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmark_files import load

zoo, footprint = load("zoo"), load("footprint")
CASES = zoo.load_cases()
OWN = [case for case in CASES if not case.needs_transformers]


def test_forty_cases_of_which_ten_are_held_out() -> None:
    assert len({case.name for case in CASES}) == len(CASES) == 40
    held_out = [case for case in CASES if case.held_out]
    assert len(held_out) == 10
    assert len({case.kind for case in held_out} - {case.kind for case in CASES if not case.held_out}) >= 5
    assert len({case.fingerprint() for case in CASES}) == 40


def test_every_kind_to_tune_on_is_there_at_two_batch_sizes_and_every_optimizer_in_every_implementation() -> None:
    sizes: dict[str, set[int]] = {}
    for case in CASES:
        sizes.setdefault(case.kind, set()).add(case.batch_size)
    tuned = {case.kind for case in CASES if not case.held_out}
    assert len(tuned) == 16
    assert all(len(sizes[kind]) >= 2 for kind in tuned)
    combinations = set(itertools.product(("sgd", "adamw"), ("loop", "foreach", "fused")))
    assert {(case.optimizer_name, case.implementation) for case in CASES} == combinations


def test_forty_are_fp32_and_bf16_is_extra() -> None:
    assert {case.precision for case in CASES} == {"fp32"}
    extra = zoo.load_cases(extra=True)
    assert "bf16" in {case.precision for case in extra}
    assert not any(case.held_out for case in extra)


@pytest.mark.parametrize("case", OWN, ids=lambda case: case.name)
def test_outputs_and_targets_fit_the_loss(case: Any) -> None:
    with torch.device("meta"):
        model = case.model()
        inputs, targets = case.inputs(2)
        loss = case.loss(zoo.apply(model, inputs), targets)
    assert loss.shape == ()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["recommender-256", "cnn-32", "lstm-16"])
def test_a_step_trains_and_is_the_same_each_time(name: str) -> None:
    case = zoo.find_case(name)
    results = []
    for _ in range(2):
        model = case.model()
        start = [parameter.detach().clone() for parameter in model.parameters()]
        inputs, targets = case.inputs(2)
        case.step(model, case.optimizer(model.parameters()), inputs, targets)
        results.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
        assert not any(torch.equal(before, after) for before, after in zip(start, model.parameters(), strict=True))
    assert torch.equal(*results)


def test_models_of_transformers_return_their_loss() -> None:
    pytest.importorskip("transformers")
    for case in CASES:
        if case.needs_transformers:
            inputs, targets = case.inputs(2)
            assert targets is None
            assert case.loss is None
            assert inputs["labels"].shape[0] == 2
    case = zoo.find_case("llama-2")
    model = case.model()
    case.step(model, case.optimizer(model.parameters()), *case.inputs(1))
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_sparse_gradients_and_layouts_are_what_the_case_says() -> None:
    case = zoo.find_case("recommender-256")
    model = case.model()
    case.step(model, case.optimizer(model.parameters()), *case.inputs(4))
    assert {table.weight.grad.is_sparse for table in model.tables} == {True}
    case = zoo.find_case("resnet18-16-channels-last")
    assert case.inputs(2)[0].is_contiguous(memory_format=torch.channels_last)
    assert case.model()[0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("implementation", ["loop", "foreach", "fused"])
def test_optimizers_take_the_implementation_that_was_asked_for(implementation: str) -> None:
    case = next(case for case in CASES if case.implementation == implementation)
    (group,) = case.optimizer([torch.nn.Parameter(torch.zeros(2))]).param_groups
    assert (group["foreach"], group["fused"]) == (implementation == "foreach", implementation == "fused")


def test_an_unknown_case_is_an_error() -> None:
    with pytest.raises(KeyError):
        zoo.find_case("nothing")


# What is made of the rows.


def make_row(name: str, error: float, *, allocated: float = 0.0, glibc: int = 1100) -> dict[str, Any]:
    """A complete row with a measured peak of 1,000 bytes, and 1,000 to 1,200 as the interval under default glibc."""
    allocator = {"seconds": 2.0, "peak_bytes": 1000 * (1 + error), "allocated_bytes": 900 * (1 + allocated)}
    interval = {"low_bytes": 1000, "high_bytes": 1200}
    return {
        "row": name,
        "held_out": False,
        "measured": {
            "key": "k",
            "mmap": {"peak_bytes": 1000},
            "events": {"allocated_peak_bytes": 900},
            "glibc": [{"peak_bytes": glibc + spread} for spread in (-500, -1, 0, 1, 500)],
        },
        "peers": {"key": "k"},
        "estimate": {"mmap": allocator, "exact": allocator, "glibc": {**allocator, **interval}},
    }


def test_errors_are_relative_to_what_was_measured_and_bounds_know_both_signs() -> None:
    rows = [
        make_row(f"r{index}", error)
        for index, error in enumerate([0.0, 0.01, -0.01, 0.02, 0.02, 0.03, 0.03, 0.03, 0.05, -0.10])
    ]
    found = {bound["name"]: bound for bound in footprint.bounds_of(rows, "g")}
    assert found["g: error of the peak, median"]["value"] == pytest.approx(0.025)
    assert found["g: error of the peak, 90th percentile"]["value"] == pytest.approx(0.05)
    assert found["g: error of the peak, worst"]["value"] == pytest.approx(0.10)
    assert found["g: peak, lowest"]["value"] == pytest.approx(-0.10)
    kept = {name.removeprefix("g: "): bound["ok"] for name, bound in found.items()}
    assert not kept["error of the peak, median"]
    assert kept["error of the peak, worst"]
    assert not kept["peak, lowest"]
    assert kept["seconds to estimate, median"]


def test_the_interval_is_held_against_the_median_of_the_processes() -> None:
    assert footprint.glibc_of(make_row("a", 0.0)) == {"inside": True, "width": pytest.approx(200 / 1100)}
    assert not footprint.glibc_of(make_row("a", 0.0, glibc=1201))["inside"]
    rows = [make_row(f"r{index}", 0.0, glibc=1100 if index < 9 else 1300) for index in range(10)]
    (inside,) = (bound for bound in footprint.bounds_of(rows, "g") if "inside" in bound["name"])
    assert (inside["value"], inside["bound"], inside["ok"]) == (9, 9, True)


def test_no_bound_while_a_part_is_missing() -> None:
    row = make_row("a", 0.0)
    del row["measured"]["glibc"][0]
    assert footprint.bounds_of([row, make_row("b", 0.0)], "g") == []
    assert footprint.bounds_of([], "g") == []
    assert footprint.errors_of({**row, "estimate": None}) is None


def test_an_estimate_that_raised_breaks_the_bounds() -> None:
    row = {**make_row("a", 0.0), "estimate": {"raised": "ValueError: no"}}
    assert footprint.errors_of(row) == {"peak": math.inf, "allocated": math.inf}
    (bound,) = footprint.bounds_of([row, make_row("b", 0.0)], "g")
    assert (bound["value"], bound["ok"]) == (1, False)


def test_measurements_are_kept_while_their_key_is_the_same() -> None:
    measured = {"key": "k", "mmap": {"peak_bytes": 1}}
    assert footprint._still(measured, "k") is measured
    assert footprint._still(measured, "other") == {"key": "other"}
    assert footprint._still(None, "k") == {"key": "k"}


def test_what_another_invocation_has_filled_is_taken_over() -> None:
    mine, theirs = make_row("a", 0.0), {**make_row("a", 0.1), "commit": "c", "date": "d"}
    mine["estimate"] = None
    del mine["measured"]["events"], mine["measured"]["glibc"][1:]
    mine["measured"]["mmap"] = {"peak_bytes": 5}
    taken = mine["measured"]["glibc"]
    footprint.adopt({"a": mine}, {"a": theirs, "b": make_row("b", 0.0)})
    assert mine["measured"] == {**theirs["measured"], "mmap": {"peak_bytes": 5}}
    assert mine["measured"]["glibc"] is taken
    assert (mine["estimate"], mine["commit"]) == (theirs["estimate"], "c")
    other = make_row("a", 0.0)
    del other["measured"]["events"]
    footprint.adopt({"a": other}, {"a": {**theirs, "measured": {**theirs["measured"], "key": "other code"}}})
    assert "events" not in other["measured"]


def test_a_child_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "HERE", tmp_path)
    (tmp_path / "child.py").write_text(
        "import sys\nprint('noise')\nprint('{\"a\": 1}') if sys.argv[1] == 'good' else sys.exit('why')\n"
    )
    assert footprint.run_child("child.py", "good") == {"a": 1}
    assert footprint.run_child("child.py", "bad") == {"raised": "why"}


def test_jobs_fill_what_is_missing_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[0]
    row = make_row(case.name, 0.0)
    del row["measured"]["events"], row["measured"]["glibc"][1:]
    row["estimate"] = None
    done: list[str] = []

    def answer(script: str, *words: str) -> dict[str, Any]:
        done.append(" ".join((script, *words[1:])))
        return {"mmap": {"seconds": 1.0}, "peak_bytes": 7}

    monkeypatch.setattr(footprint, "run_child", answer)
    jobs = footprint.list_jobs({case.name: row}, [case], ["measured", "estimate"], llama=False)
    footprint.run_jobs(jobs, 1, math.inf, lambda: None)
    estimates = ["footprint_estimate.py mmap", "footprint_estimate.py mmap glibc exact"]
    assert done == ["footprint_child.py events", *estimates, *4 * ["footprint_child.py glibc"]]
    assert len(row["measured"]["glibc"]) == 5
    assert row["estimate"]["first_seconds"] == 1.0
    assert list(footprint.list_jobs({case.name: row}, [case], ["measured", "estimate"], llama=False)) == []


def test_no_job_is_begun_after_the_time() -> None:
    begun: list[int] = []
    footprint.run_jobs(iter([lambda: begun.append(1)]), 1, -math.inf, lambda: None)
    assert begun == []


# The measuring child, for real.


@pytest.mark.slow
def test_a_real_measurement_and_what_the_peers_say() -> None:
    resident = footprint.run_child("footprint_child.py", "recommender-256", "mmap")
    events = footprint.run_child("footprint_child.py", "recommender-256", "events")
    weights = 4 * sum(parameter.numel() for parameter in zoo.find_case("recommender-256").model().parameters())
    assert weights < events["allocated_peak_bytes"] < resident["peak_bytes"] * 1.02
    assert resident["steady_peak_bytes"] <= resident["peak_bytes"] < 1.3 * weights
    assert len(resident["step_cpu_seconds"]) == 2
    answers = footprint.run_child("footprint_peers.py", "recommender-256")
    assert answers["weights times four"] == {"bytes": 4 * weights}
    assert "Sparse" in answers["MemTracker"]["raised"]
