"""The charts of a plan: bars that meet, the frontier with the plan on it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from delest.reporting import plan_charts, text, words
from reporting import samples
from reporting.samples import MIB


def test_bars_go_from_the_plain_peak_to_the_plan_and_say_what_each_choice_takes_off(tmp_path):
    figure = plan_charts.waterfall_chart(samples.digits_run(tmp_path))
    bar, labels = figure["data"]
    assert bar["y"] == ["without methods", "micro batch", "predicted", "measured"]
    assert bar["base"] == [0, 518, 0, 0]
    assert bar["x"] == [749, 231, 518, 530]
    assert labels["text"][1].strip() == "−231 MiB, +4 ms a step"


def test_a_choice_that_takes_more_memory_is_a_bar_upwards(tmp_path):
    run = samples.digits_run(tmp_path)
    choice = replace(run.plan.choices[0], saved_bytes=-10 * MIB, cost_seconds=None)
    figure = plan_charts.waterfall_chart(replace(run, plan=replace(run.plan, choices=(choice,))))
    assert figure["data"][0]["base"][1] == 749
    assert figure["data"][1]["text"][1].strip() == "+10 MiB"


def test_nothing_saved_or_compared_gives_no_chart(tmp_path):
    run = samples.digits_run(tmp_path)
    plain = replace(run.plan, choices=(), frontier=())
    assert plan_charts.waterfall_chart(replace(run, plan=plain)) is None
    assert plan_charts.waterfall_chart(replace(run, plan=None)) is None
    assert plan_charts.frontier_chart(plain) is None
    assert plan_charts.frontier_chart(None) is None


def test_the_frontier_has_every_option_the_plan_and_the_budget(tmp_path):
    plan = samples.digits_plan()
    figure = plan_charts.frontier_chart(plan)
    line, here = figure["data"]
    assert line["x"] == [431, 470, 518, 749]
    assert line["y"] == [0.041, 0.036, 0.031, 0.027]
    assert line["hovertext"][0].startswith("8 parts of 16, 4 blocks recomputed<br>431 MiB")
    assert (here["x"], here["y"]) == ([518], [0.031])
    assert figure["layout"]["shapes"][0]["x0"] == 640


def test_more_memory_is_said_to_buy_time_only_where_it_does():
    plan = samples.digits_plan()
    assert words.more_memory_words(plan) == "with 1 GiB more: 27 ms a step instead of 31 ms (the whole batch)"
    assert words.more_memory_words(replace(plan, frontier=plan.frontier[:3])) == ""
    assert words.more_memory_words(replace(plan, frontier=())) == ""


@pytest.mark.parametrize(
    ("method", "verdict", "why"),
    [
        ("micro_batch", "micro_batch: chosen", "4 parts of 32 rows"),
        ("bf16", "bf16: not chosen", "1.9 times slower"),
        ("precision", "precision: not chosen", "it was not considered"),
    ],
)
def test_one_method_is_explained(method, verdict, why):
    said = text.explained_text(samples.digits_plan(), method, "What it is.")
    assert said.startswith(verdict)
    assert why in said
    assert "What it is." in said


def test_the_text_of_a_plan_has_the_frontier():
    said = text.plan_text(samples.digits_plan())
    assert "least memory to shortest step" in said
    assert "8 parts of 16, 4 blocks recomputed" in said
