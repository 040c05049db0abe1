"""The benchmark of distillation: what of the gap a student gains, and what is promised of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmark_files import load

benchmark = load("distillation")


def figures(accuracy: float, nll: float, parameters: int = 1000, **more: Any) -> dict[str, Any]:
    return {"accuracy": accuracy, "nll": nll, "parameters": parameters, "steps": 10, "seconds": 1.0, **more}


def sample(gained: float, longer: float = 0.0) -> list[dict[str, Any]]:
    """A gap of 4 points and 0.4 nats of which students gain a share, by seed one point lower."""
    return [
        {
            "row": name,
            "seed": seed,
            "rows": {"train": 1000, "test": 9000},
            "teacher": figures(0.94 - 0.01 * seed, 0.2, 16000),
            "longer": figures(0.94 - 0.01 * seed + longer, 0.2, 16000),
            "alone": figures(0.90 - 0.01 * seed, 0.6),
            "alone, mixtures": figures(0.91 - 0.01 * seed, 0.5),
            **{
                student: {way: figures(0.90 - 0.01 * seed + 0.04 * gained, 0.6 - 0.4 * gained) for way in benchmark.WAYS}
                for student in benchmark.STUDENTS
            },
        }
        for name, seed in benchmark.SEEDS.items()
    ]


def test_a_share_is_of_the_gap_between_means_and_a_loss_counts_against_it() -> None:
    for gained in (0.5, -0.25):
        for what in ("accuracy", "nll"):
            assert benchmark.share_of(sample(gained), what, "plain, rows", "equal time") == pytest.approx(gained)


@pytest.mark.parametrize(("gained", "longer", "kept"), [(0.4, 0.001, True), (0.3, 0.001, False), (0.4, 0.01, False)])
def test_a_third_of_the_gap_to_a_teacher_that_has_learnt_all_it_can_is_promised(
    gained: float, longer: float, kept: bool
) -> None:
    bounds = benchmark.bounds_of(sample(gained, longer))
    assert all(bound["ok"] for bound in bounds) == kept
    assert sum("share of the gap" in bound["name"] for bound in bounds) == 4


def test_the_page_has_each_objective_both_ways_and_stays_as_it_is_around(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{benchmark.BEGIN}\nold\n{benchmark.END}\nafter\n")
    benchmark.write_page(sample(0.5), page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    for student in benchmark.STUDENTS:
        assert f"| {student}, equal time | 92.00, 91.00, 90.00 | **91.00** | 50% |" in text


def test_the_page_shows_what_was_measured() -> None:
    path = benchmark.results_file.RESULTS / "distillation.json"
    text = benchmark.PAGE.read_text()
    assert benchmark.BEGIN in text
    assert benchmark.END in text
    if path.exists():
        rows = json.loads(path.read_text())["rows"]
        assert f"{benchmark.BEGIN}\n{benchmark.render(rows)}\n{benchmark.END}" in text
