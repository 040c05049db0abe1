from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from delest.records.shrunk import Bound
from delest.reporting import charts, marks
from reporting import samples

FOLDER = Path("runs/digits-001")


def trace(figure: charts.Figure, name: str) -> dict:
    return next(item for item in figure["data"] if item.get("name") == name)


def test_memory_bars_add_up_to_the_peaks_with_their_interval_and_budget():
    figure = charts.memory_chart(samples.digits_run(FOLDER))
    runtime, training, whiskers = figure["data"][:3]
    assert runtime["y"] == ["measured", "predicted", "without methods"]
    assert [a + b for a, b in zip(runtime["x"], training["x"], strict=True)] == [530, 518, 749]
    assert whiskers["y"] == ["predicted", "without methods"]  # a measurement has no interval
    assert whiskers["error_x"]["array"] == [28, 40]
    assert whiskers["error_x"]["arrayminus"] == [14, 20]
    assert figure["layout"]["shapes"][0]["x0"] == 640
    assert figure["layout"]["annotations"][0]["text"] == "budget 640 MiB"


def test_a_budget_far_away_does_not_flatten_the_bars():
    run = samples.digits_run(FOLDER, plan=replace(samples.digits_plan(), memory_bytes=64 * 2**30))
    figure = charts.memory_chart(run)
    assert "shapes" not in figure["layout"]
    assert figure["layout"]["xaxis"]["range"][1] < 1_100


def test_large_peaks_are_in_gibibytes():
    big = samples.footprint(3 * 2**30)
    figure = charts.memory_chart(samples.digits_run(FOLDER, plan=None, measured=big))
    assert figure["layout"]["xaxis"]["title"]["text"] == "GiB"
    assert trace(figure, "runtime")["x"][0] + trace(figure, "training")["x"][0] == pytest.approx(3)


def test_nothing_measured_gives_no_chart():
    assert charts.memory_chart(samples.houses_run(FOLDER)) is None
    assert charts.curve_chart(samples.houses_run(FOLDER), []) is None


def test_curves_hold_every_evaluation_and_mark_best_decay_and_end():
    figure = charts.curve_chart(samples.digits_run(FOLDER), samples.digits_metrics())
    assert trace(figure, "accuracy")["x"] == [float(k) for k in range(1, 11)]
    assert trace(figure, "best")["x"] == [9.0]
    assert trace(figure, "best")["y"] == [pytest.approx(97.9)]
    assert [shape["x0"] for shape in figure["layout"]["shapes"]] == [10.0, 8.0]
    notes = [note["text"].strip() for note in figure["layout"]["annotations"]]
    assert {"ended: plateau", "decay starts"} <= set(notes)
    assert figure["layout"]["yaxis"]["type"] == "log"  # from 2 down to 0.05


def test_a_job_judged_by_its_loss_has_no_panel_for_a_metric():
    metrics = [row | {"score": row["loss"]} for row in samples.digits_metrics("unused")]
    run = samples.digits_run(FOLDER, metric="loss", higher_is_better=False)
    figure = charts.curve_chart(run, metrics)
    assert "yaxis2" not in figure["layout"]
    assert trace(figure, "best")["yaxis"] == "y"


def test_steps_taken_again_after_a_resume_are_drawn_once():
    metrics = samples.digits_metrics()
    again = [row for row in metrics if 300 < row["step"] <= 400]
    cut = [row for row in metrics if row["step"] <= 400]
    rest = [row for row in metrics if row["step"] > 400]
    run = samples.digits_run(FOLDER)
    assert charts.curve_chart(run, cut + again + rest) == charts.curve_chart(run, metrics)


def test_long_curves_are_thinned_and_keep_their_mean():
    metrics = [{"kind": "train", "step": k, "epoch": k / 1000, "loss": float(k % 2), "rate": 1.0} for k in range(1, 10_001)]
    curve = trace(charts.curve_chart(samples.digits_run(FOLDER), metrics), "training loss")
    assert len(curve["x"]) <= charts.POINTS
    assert curve["x"][-1] == 10.0
    assert set(curve["y"]) == {0.5}


def test_values_that_are_not_finite_are_left_out_of_curves():
    metrics = samples.digits_metrics()
    broken = [*metrics, {"kind": "train", "step": 600, "epoch": 11.0, "loss": float("nan"), "rate": 0.5}]
    figure = charts.curve_chart(samples.digits_run(FOLDER), broken)
    assert trace(figure, "training loss")["x"][-1] == 10.0


def test_the_decay_begins_where_the_rate_leaves_its_highest():
    assert charts.decay_epoch(samples.digits_metrics()) == 8.0
    assert charts.decay_epoch(samples.houses_metrics()) is None
    assert charts.decay_epoch([]) is None


def test_what_ships_stands_out_in_every_comparison():
    shrunk = samples.digits_shrunk(FOLDER)
    for figure in (charts.size_chart(shrunk), charts.latency_chart(shrunk, 1), charts.latency_chart(shrunk, 32)):
        assert figure["data"][0]["marker"]["color"] == ["@quiet", "@quiet", "@accent"]
    spread = charts.latency_chart(shrunk, 1)["data"][1]["error_x"]
    assert spread["array"] == pytest.approx([0.0001, 0.00003, 0.00003])
    assert spread["arrayminus"] == pytest.approx([0.00003, 0.00002, 0.00002])


def test_the_drop_is_drawn_beside_the_promise():
    figure = charts.drop_chart(samples.digits_shrunk(FOLDER))
    whiskers, dots = figure["data"][:2]
    assert dots["x"] == pytest.approx([0, 0.1])
    assert whiskers["error_x"]["array"] == pytest.approx([0.23])
    assert figure["layout"]["shapes"][1]["x0"] == pytest.approx(0.5)


def test_a_form_that_is_better_than_the_trained_model_stays_inside_the_chart():
    shrunk = samples.digits_shrunk(FOLDER)
    better = replace(shrunk.candidates[2], bound=Bound(drop=-0.004, upper=-0.001, rows=1_000, disagreeing=0.01))
    low, high = charts.drop_chart(replace(shrunk, candidates=(*shrunk.candidates[:2], better)))["layout"]["xaxis"]["range"]
    assert low < -0.4
    assert high > 0.5


def test_long_names_are_cut_and_titles_are_not():
    run = samples.digits_run(FOLDER, metric="m" * 60)
    figure = charts.curve_chart(run, samples.digits_metrics("m" * 60))
    notes = [note["text"] for note in figure["layout"]["annotations"]]
    assert "m" * 23 + "…" in notes
    assert "learning rate, share of its highest" in notes


def test_names_in_charts_are_escaped():
    shrunk = samples.digits_shrunk(FOLDER)
    named = replace(shrunk, candidates=(replace(shrunk.candidates[0], name="<b>&"), *shrunk.candidates[1:]))
    assert charts.size_chart(named)["data"][0]["y"][0] == "&lt;b&gt;&amp;"


def test_logarithmic_ticks_cover_the_values():
    assert marks.ticks_1_2_5([0.05, 2.2]) == pytest.approx([0.01, 0.1, 1, 10])
    assert marks.ticks_1_2_5([1.5, 40]) == pytest.approx([1, 2, 5, 10, 20, 50, 100, 200, 500])
