"""The grid that a plan's throughput is held against, the figures made of it, and jobs of the zoo as planning gets them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmark_files import load
from delest.hardware import probes
from delest.job import Job, Recipe
from delest.records.batch import Batch

throughput, child, jobs = load("throughput"), load("throughput_child"), load("throughput_jobs")
planning_time, planning_jobs = load("planning_time"), load("planning_jobs")


def small_job() -> tuple[Job, Batch]:
    """Eight small images, and a network of one block that "checkpoints" may wrap."""
    random = np.random.default_rng(0)
    images, labels = random.standard_normal((8, 3, 6, 6), np.float32), np.arange(8) % 3

    def model() -> nn.Module:
        torch.manual_seed(0)
        block = jobs.Residual(nn.Conv2d(3, 3, 3, padding=1), nn.Identity(), nn.ReLU())
        return nn.Sequential(block, nn.Flatten(), nn.Linear(108, 3))

    job = Job(model=model, data=(images, labels), batch_size=8, recipe=Recipe(label_smoothing=0.0))
    return job, Batch(images, labels, np.arange(8), 0, 8)


@pytest.mark.parametrize(("bf16", "count"), [(0.5, 64), (2.0, 32)])
def test_the_grid_has_at_most_64_points_and_the_plain_step(bf16: float, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = ("matmul", "convolution")
    seconds = {f"{kernel}_{name}": value for kernel in kernels for name, value in (("fp32", 1.0), ("bf16", bf16))}
    monkeypatch.setattr(probes, "time_precisions", lambda: seconds)
    points = child.points_of(*small_job(), 1)
    assert len(set(points)) == len(points) == count
    assert {point.rows for point in points} == {8, 4, 2, 1}
    (plain,) = (point for point in points if throughput.is_plain(vars(point), 8))
    assert not plain.fused
    assert {point.rows for point in child.points_of(*small_job(), 2)} == {8, 4, 2}


def test_every_point_of_one_precision_makes_the_same_steps() -> None:
    job, batch = small_job()
    losses = []
    for rows, checkpoints, last, fused in [
        (8, False, False, False),
        (8, True, False, True),
        (2, True, True, False),
        (4, False, True, True),
    ]:
        step = child.point_step("resnet18", job, batch, child.Point(rows, checkpoints, last, False, fused))
        losses.append([step() for _ in range(3)])
    assert losses[0][2] < losses[0][0]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-4)


def way(*seconds: float, peak: int = 1) -> Any:
    return throughput.Way(process=None, keeps=True, peak_bytes=peak, seconds=list(seconds))


def test_the_figure_is_the_median_ratio_to_the_point_that_is_fastest_in_the_median() -> None:
    rivals = {"lucky once": way(0.1, 3.0, 3.0), "steady": way(2.0, 2.0, 2.2)}
    found = throughput.against(way(1.0, 2.0, 4.0), rivals)
    assert found["best"] == "steady"
    assert found["ratio"] == pytest.approx(1.0)
    assert found["ratios"] == pytest.approx([0.55, 2.0])
    assert throughput.against(None, rivals)["ratio"] == 0.0
    assert throughput.against(way(1.0), {}) is None


def test_a_plan_that_was_not_found_breaks_its_bound_unless_no_point_fits_either() -> None:
    def row(name: str, free: float, within: float | None, kept: bool = True) -> dict[str, Any]:
        judged = [{"against": None if ratio is None else {"ratio": ratio}, "kept_budget": kept} for ratio in (free, within)]
        return {"row": name, "free": judged[0], "within": judged[1]}

    bounds = throughput.bounds_of([row("a", 1.0, 0.0), row("b", 0.94, None, kept=False)])
    assert [(bound["name"].split(",")[0], bound["ok"]) for bound in bounds] == [
        ("a", True), ("b", False), ("a", False), ("plans over their budget", False)
    ]  # fmt: skip


# Planning time


def test_at_most_sixteen_networks_each_at_its_larger_batch() -> None:
    cases = planning_time.cases()
    assert len(cases) == len({case.kind for case in cases}) <= 16
    assert {"resnet18-32", "mlp-2048", "recommender-4096"} <= {case.name for case in cases}


def test_short_steps_have_a_bound_of_their_own() -> None:
    def row(step: float, free: float, within: float) -> dict[str, Any]:
        return {"free": {"plain_seconds": step, "seconds": free}, "within": {"seconds": within}}

    bounds = planning_time.bounds_of([row(0.5, 20.0, 31.0), row(0.01, 6.0, 4.0)])
    assert [(bound["value"], bound["ok"]) for bound in bounds] == [(20.0, True), (6.0, False), (31.0, False), (4.0, True)]


@pytest.mark.parametrize("name", ["cnn-32", "unet-2", "moe-4", "recommender-256"])
def test_cases_of_the_zoo_are_jobs_that_train(name: str) -> None:
    from delest.backends.torch.check import check
    from delest.training.progress import Progress
    from delest.verbs.workplace import open_workplace

    place = open_workplace(getattr(planning_jobs, name)(), Progress())
    assert len(place.splits["train"]) >= place.job.batch_size
    batch = next(iter(place.feed("train", place.splits["train"][:2]).ordered()))
    assert check(place.job, place.source.schema, batch, batch) == []


def test_an_unknown_case_is_no_job() -> None:
    assert not hasattr(planning_jobs, "nothing")
