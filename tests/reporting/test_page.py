from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import browser
from delest import errors, storage
from delest.records.run import Run
from delest.reporting import page, recipe
from reporting import samples

EVIL = '</script><script>window.owned=1</script><img src="http://127.0.0.1/x" onerror="window.owned=1">{{ 7*7 }}'
DRAWN = """[...document.querySelectorAll(".chart")].map(chart => {
  const paths = [...chart.querySelectorAll(".main-svg .trace path, .main-svg .trace text")].map(path => path.getBoundingClientRect());
  const svg = chart.querySelector(".main-svg")?.getBoundingClientRect();
  return { id: chart.id, plotly: chart.classList.contains("js-plotly-plot"), right: svg?.right ?? 0, width: svg?.width ?? 0,
           height: svg?.height ?? 0, drawn: paths.filter(box => box.width > 2 && box.height > 2).length };
})"""


def body(html: str) -> str:
    """The page without Plotly's and its own code, so that nothing is found there by accident."""
    return html[html.index("<body>") : html.index("<script>")]


def plain(html: str) -> str:
    """What a reader sees, on one line."""
    text = re.sub(r"<[^>]+>", " ", body(html).partition('<script type="application/json"')[0])
    return re.sub(r"\s+", " ", text.replace("\N{NO-BREAK SPACE}", " "))


def digits(folder: Path, **changes: Any) -> str:
    run = samples.digits_run(folder, **changes)
    return page.render(run, metrics=samples.digits_metrics(), shrunk=samples.digits_shrunk(folder), hardware=samples.HARDWARE)


def houses(folder: Path, **changes: Any) -> str:
    run = replace(samples.houses_run(folder), **changes)
    return page.render(run, metrics=samples.houses_metrics(), shrunk=None, hardware=samples.HARDWARE)


def test_the_verdict_comes_first_in_words_and_four_figures(tmp_path):
    seen = plain(digits(tmp_path))
    assert "98.2 % accuracy, trained in 41 s; int8 ships, 3.9 times smaller and 1.3 times faster at batch 1." in seen
    assert "Measured on 1,000 test rows, which decided nothing." in seen
    assert "Always answering the most frequent class would score 11.2 %." in seen
    assert "What ships keeps accuracy within 0.33 points (promised 0.5), at 95 % confidence." in seen
    assert "Test accuracy 98.2 % validation 97.9 %" in seen
    assert "Training time 41 s 10 epochs 47 s with everything else" in seen
    assert "Peak memory 530 MiB of 640 MiB allowed 518 MiB predicted" in seen
    assert "int8 ships 1.2 MiB 470 µs at batch 1 ONNX Runtime" in seen


def test_every_part_is_there(tmp_path):
    seen = plain(digits(tmp_path))
    parts = (
        "Job",
        "Machine",
        "Data",
        "Memory: predicted and measured",
        "Learning curve",
        "Before and after",
        "Decisions",
        "Use the model",
        "Do it again",
    )
    places = [seen.index(f" {part} ") for part in parts]
    assert places == sorted(places)
    assert "epochs 12 command line" in seen
    assert "lr 0.002 job" in seen
    assert "AMD EPYC 7B13" in seen
    assert "inside the predicted interval (504 MiB to 546 MiB), +2.3 % from the prediction" in seen
    assert "After epoch 8 the validation score stopped improving" in seen
    assert "440 decay no better accuracy in 3 evaluations reason plateau, total steps 550" in seen
    assert "onnxruntime 1.32.0" in seen


def test_a_rejected_form_says_why(tmp_path):
    run, shrunk = samples.digits_run(tmp_path), samples.digits_shrunk(tmp_path, shipped="fp32")
    seen = plain(page.render(run, metrics=samples.digits_metrics(), shrunk=shrunk, hardware=samples.HARDWARE))
    assert "rejected its bound of 0.7 points is above the 0.5 that were promised" in seen
    assert "fp32 ships, the same size and 1.2 times faster at batch 1." in seen


def test_an_unfinished_table_run_without_test_rows_plan_or_shrinking_reads_well(tmp_path):
    html = houses(tmp_path)
    seen = plain(html)
    assert "Interrupted after 4.8 epochs, resumable: RMSE 31,250, trained in 2.5 s." in seen
    assert "Measured on 800 validation rows, which decided when to stop; there are no test rows." in seen
    assert "Validation RMSE 31,250" in seen
    assert "row 17: price is missing" in seen
    assert "has no file: call delest.train(job)" in seen
    for absent in ("Before and after", "Memory: predicted", "Decisions", "Use the model", "None", "classes"):
        assert absent not in seen


def test_a_run_with_nothing_but_a_name_still_makes_a_page(tmp_path):
    html = page.render(Run(path=tmp_path, name="bare", status="failed"), metrics=[], shrunk=None, hardware=samples.HARDWARE)
    assert "Failed after 0 epochs." in plain(html)
    assert 'class="chart"' not in html


def test_values_that_are_not_finite_stay_valid_json(tmp_path):
    broken = [
        *samples.digits_metrics(),
        {"kind": "train", "step": 600, "epoch": 11.0, "loss": float("inf"), "rate": float("nan")},
    ]
    run = samples.digits_run(tmp_path, status="diverged", test={"accuracy": float("nan")})
    html = page.render(run, metrics=broken, shrunk=None, hardware=samples.HARDWARE)
    figures = html.partition('id="figures">')[2].partition("</script>")[0]
    assert not re.search(r"\b(NaN|Infinity)\b", figures)
    assert "Diverged after 10 epochs: not finite accuracy" in plain(html)


def test_what_users_name_is_escaped_everywhere(tmp_path):
    html = evil(tmp_path)
    assert "<img" not in html.replace(page.get_plotlyjs(), "")
    assert "<script>window.owned" not in html
    assert body(html).count("&lt;/script&gt;") >= 10
    assert "{{ 7*7 }}" in html


def test_the_page_names_no_other_place(tmp_path):
    own = digits(tmp_path).replace(page.get_plotlyjs(), "")
    assert not re.findall(r"(?:src|href)=\"(?!data:)[^\"]*", own)
    assert not re.findall(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", own)


def test_the_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    run = samples.digits_run(tmp_path)
    path = page.write_report(tmp_path, run, metrics=[], shrunk=None, hardware=samples.HARDWARE)
    assert path == tmp_path / "report.html"
    before = path.read_text()
    assert before.startswith("<!doctype html>")
    assert before.endswith("</html>")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(errors.DiskFull, match=r"report\.html"):
        page.write_report(tmp_path, replace(run, name="other"), metrics=[], shrunk=None, hardware=samples.HARDWARE)
    assert path.read_text() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_the_command_repeats_what_was_set_by_hand(tmp_path):
    run, shrunk = samples.digits_run(tmp_path), samples.digits_shrunk(tmp_path)
    assert shlex.split(recipe.command(run, shrunk)) == [
        "delest", "run", "/home/ada/digits/digits.py", "--epochs", "12", "--batch-size", "128", "--memory", "640MiB", "--threads", "2", "--max-drop", "0.005",
    ]  # fmt: skip
    job = {
        **run.job,
        "origin": "/data/my file.csv",
        "skip_bad": True,
        "set_by": {"skip_bad": "command line", "recipe.augment": "command line", "split.by": "command line"},
    }
    job |= {"recipe": {**run.job["recipe"], "augment": ["noise", "dropout"]}, "split": {**run.job["split"], "by": "week"}}
    changed = replace(run, job=job, plan=None)
    assert shlex.split(recipe.command(changed, None)) == [
        "delest", "train", "/data/my file.csv", "--skip-bad", "--augment", "noise", "--augment", "dropout", "--split-by", "week",
    ]  # fmt: skip


def test_the_code_that_uses_the_bundle_runs_with_the_bundles_names(tmp_path):
    asked: dict[str, Any] = {}
    code = recipe.usage(samples.digits_run(tmp_path), samples.digits_shrunk(tmp_path))
    run_snippet(code, asked)
    assert asked["path"] == "shrunk/model.onnx"
    assert asked["rows"]["image"].shape == (1, 28, 28, 1)
    assert asked["rows"]["image"].dtype == "uint8"
    assert asked["printed"] == [["b"]]


def test_the_code_for_a_table_names_no_column_and_for_odd_names_is_still_python(tmp_path):
    shrunk = samples.digits_shrunk(tmp_path)
    run = samples.houses_run(tmp_path)
    assert "polars.read_csv" in recipe.usage(run, shrunk)
    odd = replace(run.data, kind="arrays", columns=({"name": 'a"\n\\', "kind": "array", "shape": [3], "dtype": "float32"},))
    tree = ast.parse(recipe.usage(replace(run, data=odd), shrunk))
    assert 'a"\n\\' in [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    assert recipe.usage(run, None) is None


def run_snippet(code: str, asked: dict[str, Any]) -> None:
    """Run lines that use ONNX Runtime with a session that gives class 1 of two; what it was asked for is noted."""
    import numpy

    def session(path: str) -> SimpleNamespace:
        asked["path"] = path
        meta = SimpleNamespace(custom_metadata_map={"labels": '["a", "b"]'})
        return SimpleNamespace(
            run=lambda names, rows: asked.update(rows=rows) or [numpy.array([[0.2, 0.8]])], get_modelmeta=lambda: meta
        )

    lines = code.replace("import json, numpy, onnxruntime", "import json, numpy")
    printed: list[Any] = []
    exec(lines, {"onnxruntime": SimpleNamespace(InferenceSession=session), "print": printed.append})
    asked["printed"] = printed


def contrast(one: str, other: str) -> float:
    """WCAG 2 contrast ratio of two colours given as #rrggbb."""

    def luminance(color: str) -> float:
        channels = [int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_is_readable_in_light_and_dark():
    css = (page.TEMPLATES / "report.css").read_text()
    for block in re.findall(r":root \{(.*?)\}", css, re.DOTALL):
        colors = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for ink in ("ink", "ink2", "ink3", "accent", "good", "warn", "bad"):
            for ground in ("surface", "page"):
                assert contrast(colors[ink], colors[ground]) >= 4.5, (ink, ground)
        for tone in ("good", "warn", "bad"):
            assert contrast(colors[tone], colors[f"{tone}-wash"]) >= 4.5, tone


@pytest.fixture(scope="module")
def tab() -> Iterator[browser.Page]:
    browser.require_chromium()
    with browser.page() as opened:
        yield opened


def opened(tab: browser.Page, folder: Path, html: str, **options: Any) -> list[dict[str, Any]]:
    """Load a page and return what each chart drew, having seen that nothing was fetched or said."""
    path = folder / "report.html"
    path.write_text(html)
    tab.requests.clear()
    tab.console.clear()
    tab.open(path, **options)
    assert [url for url in tab.requests if not url.startswith("data:")] == [path.as_uri()]
    assert tab.console == []
    return tab.evaluate(DRAWN)


def test_charts_draw_silently_without_a_network(tab, tmp_path):
    drawn = opened(tab, tmp_path, digits(tmp_path))
    assert [chart["id"] for chart in drawn] == [
        f"chart-{name}" for name in ("memory", "waterfall", "frontier", "curve", "size", "drop", "latency-1", "latency-32")
    ]
    for chart in drawn:
        assert chart["plotly"], chart
        assert chart["drawn"] >= 3, chart
        assert chart["height"] > 50, chart
    assert tab.evaluate("document.title") == "digits: 98.2 % accuracy on 1,000 test rows"
    assert tab.evaluate("document.documentElement.lang") == "en"


@pytest.mark.parametrize(("ci", "outcome"), [("1", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_without_chromium_tests_skip_unless_they_must_not(monkeypatch, ci, outcome):
    monkeypatch.setattr(browser, "CHROMIUM", "/nowhere/chromium")
    monkeypatch.setenv("DELEST_CI", ci)
    with pytest.raises(outcome, match="apt-get install chromium"):
        browser.require_chromium()


def test_the_browser_driver_notices_requests_and_messages(tab, tmp_path):
    path = tmp_path / "loud.html"
    path.write_text(
        "<script>console.warn('hi'); fetch('http://127.0.0.1:9/').catch(() => 0); setTimeout(() => { throw Error('no') })</script>"
    )
    tab.requests.clear()
    tab.console.clear()
    tab.open(path)
    assert "http://127.0.0.1:9/" in tab.requests
    assert any("hi" in line for line in tab.console)
    assert any("no" in line for line in tab.console)


def test_charts_follow_the_width_down_to_a_phone(tab, tmp_path):
    opened(tab, tmp_path, digits(tmp_path))
    tab.resize(390)
    for chart in tab.evaluate(DRAWN):
        assert chart["right"] <= 390, chart
        assert chart["width"] > 200, chart
    assert tab.evaluate("document.documentElement.scrollWidth") == 390


def test_charts_follow_the_colour_scheme(tab, tmp_path):
    opened(tab, tmp_path, digits(tmp_path))
    fill = 'getComputedStyle(document.querySelectorAll("#chart-size .point path")[2]).fill'
    light = tab.evaluate(fill)
    tab.prefer(dark=True)
    tab.settle()
    assert light == "rgb(43, 95, 211)"
    assert tab.evaluate(fill) == "rgb(127, 167, 255)"
    assert tab.console == []


def test_a_page_of_an_unfinished_run_is_silent_too(tab, tmp_path):
    assert [chart["id"] for chart in opened(tab, tmp_path, houses(tmp_path), width=390)] == ["chart-curve"]
    assert tab.evaluate("document.documentElement.scrollWidth") == 390


def test_names_that_look_like_code_do_nothing(tab, tmp_path):
    drawn = opened(tab, tmp_path, evil(tmp_path), width=390)
    assert all(chart["drawn"] for chart in drawn)
    assert tab.evaluate("typeof window.owned") == "undefined"
    assert tab.evaluate('document.querySelectorAll("img").length') == 0
    assert tab.evaluate("document.documentElement.scrollWidth") == 390


def test_a_screenshot_shows_the_whole_page(tab, tmp_path):
    from PIL import Image

    opened(tab, tmp_path, digits(tmp_path))
    tab.screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.width == 1280
        assert picture.height > 3_000
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 100


def evil(folder: Path) -> str:
    """The digits page with code in every name that a user can give."""
    summary = replace(
        samples.digits_summary(tuple(f"{EVIL}{k}" for k in range(10))),
        source=EVIL,
        target=EVIL,
        columns=({"name": EVIL, "kind": EVIL, "shape": [1], "dtype": EVIL, "missing": 0},),
        splits={EVIL: 5},
        notes=(EVIL,),
        left_out=(EVIL,),
    )
    shrunk = samples.digits_shrunk(folder)
    candidates = tuple(replace(candidate, name=EVIL + candidate.name, why=EVIL) for candidate in shrunk.candidates)
    run = samples.digits_run(
        folder,
        name=EVIL,
        metric=EVIL,
        data=summary,
        validation={EVIL: 0.5},
        test={EVIL: 0.5},
        versions={EVIL: EVIL},
        decisions=({"kind": EVIL, "at": 3, "why": EVIL, EVIL: EVIL},),
        stopped_by=EVIL,
        job={**samples.digits_run(folder).job, "model": EVIL, "origin": EVIL},
    )
    shrunk = replace(
        shrunk, metric=EVIL, shipped=candidates[2].name, candidates=candidates, test={EVIL: 1.0}, path=folder / EVIL
    )
    return page.render(
        run, metrics=samples.digits_metrics(EVIL), shrunk=shrunk, hardware=replace(samples.HARDWARE, processor=EVIL)
    )
