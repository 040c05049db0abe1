"""The choice of the micro-batch and of what a probe saw gain, from figures given by hand."""

from __future__ import annotations

import pytest

from delest import errors
from delest.job import Job, Recipe
from delest.planning import probed, search
from delest.planning.request import SLACK_BYTES, Request
from delest.records.form import from_json
from delest.records.plan import Plan

MIB = 1 << 20


def probe(**changes):
    """100 MiB idle here; a model of 10 MiB; 1 MiB a row."""

    def sample(rows):
        grown = {"first": 10 + rows, "steady": 12 + rows, "evaluation": 10 + rows // 4}
        return {"rows": rows, "seconds": rows * 1e-3, **{name: mib * MIB for name, mib in grown.items()}}

    base = {
        "idle_bytes": 90 * MIB,
        "base_bytes": 10 * MIB,
        "samples": [sample(32), sample(64)],
        "variants": {},
        "batch_statistics": False,
        "parameters": 10,
        "weights_bytes": 4 * MIB,
        "largest_bytes": 4 * MIB,
        "busy": "",
        "device": "cpu",
    }
    return {**base, **changes}


def choose(budget_mib, figures=None, asked=True, exact=False, **job):
    given = Job(data="unused", model=int, batch_size=128, **job)
    request = Request(
        job=given,
        probe=figures or probe(),
        budget_bytes=budget_mib * MIB,
        asked=asked,
        idle_bytes=100 * MIB,
        threads=2,
        exact=exact,
    )
    return probed.choose(request, *probed.faster(request))


def test_a_line_through_two_sizes_is_extrapolated():
    plan = choose(10_000)
    assert plan.micro_batch == 128
    assert plan.predicted.phases["steady_step"] == (100 + 12 + 128) * MIB
    assert plan.predicted.peak_bytes == 240 * MIB
    assert plan.predicted.low_bytes < 240 * MIB < plan.predicted.high_bytes
    assert plan.predicted.step_seconds == pytest.approx(0.128)
    assert plan.config("micro_batch") is None


def test_a_smaller_budget_splits_and_keeps_the_effective_batch():
    plan = choose(200)
    assert plan.predicted.high_bytes <= 200 * MIB
    assert plan.micro_batch < 128
    assert plan.batch_size == 128
    assert plan.choices[-1].keeps == "rounding"
    assert plan.choices[-1].saved_bytes == plan.plain.peak_bytes - plan.predicted.peak_bytes
    assert "batch.split(" in plan.code


def test_the_fewest_parts_that_fit_are_taken():
    plan = choose(200)
    parts = -(-128 // plan.micro_batch)
    costs = probed.Costs(100 * MIB, probe())
    larger = -(-128 // (parts - 1))
    assert costs.footprint(larger, 128, 0.1, "cpu", True).high_bytes > 200 * MIB


def test_splitting_a_batch_that_is_normalised_over_changes_its_distribution_and_leaves_two_rows():
    figures = probe(batch_statistics=True)
    assert choose(200, figures).choices[-1].keeps == "distribution"
    with pytest.raises(errors.NothingFits, match="with 2 rows at a time"):
        choose(110, figures)


def test_nothing_fits_names_a_budget_that_does():
    with pytest.raises(errors.NothingFits) as raised:
        choose(120)
    smallest = -(-raised.value.smallest_bytes // MIB)
    assert raised.value.exit_status == 3
    assert f"--memory {smallest}MiB" in str(raised.value)
    assert choose(smallest).predicted.high_bytes <= smallest * MIB
    with pytest.raises(errors.NothingFits):
        choose(smallest - 1 - SLACK_BYTES // MIB)


def test_gradients_of_earlier_parts_are_counted():
    costs = probed.Costs(100 * MIB, probe())
    assert costs.phases(64, 128)["steady_step"] - costs.phases(64, 64)["steady_step"] == 4 * MIB


@pytest.mark.parametrize(("seconds", "chosen"), [(0.8, True), (0.97, False), (1.5, False)])
def test_a_variant_is_chosen_only_where_it_gains(seconds, chosen):
    plan = choose(10_000, probe(variants={"memory_format": {"plain": 1.0, "with": seconds}}))
    assert (plan.config("memory_format") is not None) == chosen
    assert any(rejection.method == "memory_format" for rejection in plan.rejected) != chosen


def test_what_the_recipe_asks_for_is_followed():
    plan = choose(10_000, recipe=Recipe(precision="bf16", memory_format="channels_last"))
    assert [choice.method for choice in plan.choices] == ["memory_format", "precision"]
    assert [choice.keeps for choice in plan.choices] == ["rounding", "changed"]


def test_a_budget_nobody_asked_for_is_not_guarded():
    assert choose(10_000, asked=False).memory_bytes is None


def test_one_probed_size_is_extrapolated_from_the_built_model():
    figures = probe()
    figures["samples"] = figures["samples"][:1]
    costs = probed.Costs(100 * MIB, figures)
    assert costs.phases(64, 64)["steady_step"] > costs.phases(32, 64)["steady_step"]


def test_what_changes_the_results_is_left_out_where_exact_ones_are_asked_for():
    figures = probe(variants={"precision": {"plain": 1.0, "with": 0.5}})
    assert choose(10_000, figures).config("precision") == {"dtype": "bf16"}
    plan = choose(10_000, figures, exact=True)
    assert plan.config("precision") is None
    assert "changes the results" in next(one.why for one in plan.rejected if one.method == "precision")


def test_saving_and_resuming_take_the_largest_array_beside_what_is_built():
    phases = probed.Costs(100 * MIB, probe()).phases(64, 128)
    assert phases["saving"] == phases["start"] + 4 * MIB
    assert phases["resuming"] == phases["start"] + 4 * MIB


def test_batch_statistics_over_parts_are_noted_with_the_choices():
    assert choose(10_000, probe(batch_statistics=True)).notes == ()
    (note,) = choose(200, probe(batch_statistics=True)).notes
    for words in ("rows of it at a time in place of 128", "--exact", "--memory", "--batch-size", "GroupNorm"):
        assert words in note
    assert choose(200).notes == ()


def test_a_busy_machine_is_noted():
    (note,) = choose(10_000, probe(busy="threads waited for a core in 60% of the time")).notes
    assert "threads waited for a core in 60% of the time" in note
    assert "Plan again" in note


def test_where_nothing_fits_the_plan_for_the_smallest_budget_comes_with_it():
    with pytest.raises(errors.NothingFits) as raised:
        choose(120, probe(variants={"precision": {"plain": 1.0, "with": 2.0}}))
    plan = from_json(Plan, raised.value.plan)
    assert plan.memory_bytes == raised.value.smallest_bytes
    assert plan.predicted.high_bytes <= plan.memory_bytes
    assert "no gain here" in next(one.why for one in plan.rejected if one.method == "precision")


@pytest.mark.parametrize(("seconds", "count"), [(0.5, 1), (0.98, 2), (1.5, 2)])
def test_one_thread_is_taken_only_where_it_was_faster(seconds, count):
    given = Job(data="unused", model=int, batch_size=128)
    figures = probe(variants={"threads": {"plain": 1.0, "with": seconds}})
    request = Request(job=given, probe=figures, budget_bytes=10_000 * MIB, asked=True, idle_bytes=100 * MIB, threads=2)
    plan = search.choose(request)
    assert plan.threads == count
    assert (plan.config("threads") == {"count": 1}) == (count == 1)
    assert any("no gain here" in one.why for one in plan.rejected if one.method == "threads") == (count == 2)
    assert plan.predicted.step_seconds == pytest.approx(0.128 * (seconds if count == 1 else 1.0))
