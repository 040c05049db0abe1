"""The methods' pages: every method is listed, and those that change results show what the benchmark on digits measured."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmark_files import load
from delest import methods

ROOT = Path(__file__).parents[1]
INDEX = ROOT / "docs" / "methods.md"
STAND_INS: dict[Any, list[Any]] = {int: [2], str: ["block"], list: [["block"]]}  # of settings that are no choice


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load("methods_on_digits")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return json.loads((ROOT / "benchmarks" / "results" / "methods_on_digits.json").read_text())["rows"]


def test_every_method_is_in_the_index_and_every_link_leads_somewhere() -> None:
    for name in methods.NAMES:
        assert f"| `{name}` |" in INDEX.read_text()
    pages = [INDEX, ROOT / "README.md", *INDEX.with_suffix("").glob("*.md")]
    for page in pages:
        for link in re.findall(r"\]\(([^):#]+\.md)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
    listed = re.findall(r"\((methods/[a-z_]+\.md)\)", INDEX.read_text())
    assert sorted(listed) == sorted(str(page.relative_to(INDEX.parent)) for page in pages[2:])


def changing() -> Iterator[tuple[str, dict[str, Any]]]:
    """Methods that do not keep results, with the settings among which they have a choice."""
    for name in methods.NAMES:
        settings = methods.named(name).SETTINGS
        values = [kind if isinstance(kind, tuple) else STAND_INS[kind] for kind in settings.values()]
        for chosen in itertools.product(*values):
            config = dict(zip(settings, chosen, strict=True))
            kept = {methods.named(name).keeps(config, batch_statistics=normalises) for normalises in (False, True)}
            if kept & {"distribution", "changed"}:
                yield name, {key: value for key, value in config.items() if isinstance(settings[key], tuple)}


def test_every_method_that_changes_results_is_compared_with_three_seeds(
    benchmark: ModuleType, rows: list[dict[str, Any]]
) -> None:
    for name, config in changing():
        assert any(side.method == name and config.items() <= side.config.items() for side in benchmark.SIDES), (name, config)
    assert {name for name, _ in changing()} >= {"micro_batch", "optimizer_state", "precision"}
    for side in benchmark.SIDES:
        assert [row["seed"] for row in sorted(rows, key=lambda row: row["seed"]) if row["side"] == side.name] == [0, 1, 2]
    assert len({row["epochs"] for row in rows}) == 1


def test_the_pages_show_what_was_measured(benchmark: ModuleType, rows: list[dict[str, Any]]) -> None:
    for method in benchmark.compared():
        table = f"{benchmark.BEGIN}\n{benchmark.render(rows, method)}\n{benchmark.END}"
        assert table in (benchmark.PAGES / f"{method}.md").read_text(), method


def sample(benchmark: ModuleType) -> list[dict[str, Any]]:
    """Each side three points better than plain, by seed 0, 1 and 2 points more."""
    return [
        {"side": side.name, "seed": seed, "accuracy": 0.9 + (0.03 + 0.01 * seed) * (side.method is not None)}
        | {"loss": 0.5, "state_bytes": 1024 * (1 if side.method else 2)}
        for side in benchmark.SIDES
        for seed in benchmark.SEEDS
    ]


def test_differences_are_paired_by_seed(benchmark: ModuleType) -> None:
    line = next(line for line in benchmark.render(sample(benchmark), "precision").splitlines() if line.startswith("| bf16"))
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[3:6] == ["90.00, 90.00, 90.00", "93.00, 94.00, 95.00", "**+4.00** (1.00)"]
    assert cells[8:10] == ["**+0.0000** (0.0000)", "2 to 1"]


def test_a_table_replaces_the_one_before_and_a_page_that_has_no_place_for_it_is_named(
    benchmark: ModuleType, tmp_path: Path
) -> None:
    for method in benchmark.compared():
        (tmp_path / f"{method}.md").write_text(f"before\n{benchmark.BEGIN}\nold\n{benchmark.END}\nafter\n")
    benchmark.write_pages(sample(benchmark), tmp_path)
    text = (tmp_path / "precision.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "+4.00" in text
    (tmp_path / "precision.md").write_text("no place\n")
    with pytest.raises(SystemExit, match=r"precision\.md has no place for the table of precision"):
        benchmark.write_pages(sample(benchmark), tmp_path)
