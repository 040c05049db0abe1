from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import browser
from delest import errors, storage
from delest.records.footprint import Footprint, ModuleShare
from delest.reporting import categories, memory, memory_charts, memory_page, modules, page
from reporting import samples
from reporting.test_page import DRAWN, EVIL, contrast, plain

MIB = 2**20


def own_page(footprint: Footprint, **options: Any) -> str:
    return memory_page.render_footprint(footprint, **options)


def run_page(folder: Path, predicted: Footprint | None, measured: Footprint | None) -> str:
    run = samples.digits_run(folder, plan=replace(samples.digits_plan(), predicted=predicted), measured=measured)
    return page.render(run, metrics=samples.digits_metrics(), shrunk=None, hardware=samples.HARDWARE)


def figures(html: str) -> dict[str, Any]:
    return json.loads(html.partition('id="figures">')[2].partition("</script>")[0])


def tiles(figure: Any) -> dict[str, dict[str, Any]]:
    """Tiles of the module tree by id."""
    made = figure["data"][0]
    columns = ("parents", "labels", "values", "hovertext")
    colors = made["marker"]["colors"]
    rows = zip(*(made[column] for column in columns), colors, strict=True)
    return {tile: dict(zip((*columns, "color"), row, strict=True)) for tile, row in zip(made["ids"], rows, strict=True)}


def test_the_timeline_stacks_categories_up_to_what_is_live():
    line = samples.resnet_timeline()
    figure = memory_charts.timeline_chart(line)
    *areas, outline = figure["data"]
    assert [area["name"] for area in areas] == [
        categories.look(name).words for name in categories.LOOKS if name in line.categories
    ]
    assert [area["fillcolor"] for area in areas][:2] == ["@parameters", "@buffers"]
    assert {area["stackgroup"] for area in areas} == {"live"}
    for k, height in enumerate(outline["y"]):
        assert sum(area["y"][k] for area in areas) == pytest.approx(height)
    assert max(outline["y"]) == pytest.approx(memory_charts.live_bytes(line)[line.peak] / MIB)


def test_the_peak_is_marked_with_its_figure_and_module():
    line = samples.resnet_timeline()
    mark = memory_charts.timeline_chart(line)["layout"]["annotations"][-1]
    assert mark["text"] == "<b>peak 262 MiB</b> in layer3.1.bn2"
    assert mark["x"] == line.position[line.peak]
    assert mark["y"] == pytest.approx(262, abs=0.5)
    assert mark["xanchor"] == "right"  # late in the chart: the words lie before it
    early = memory_charts.timeline_chart(replace(line, peak=3))["layout"]["annotations"][-1]
    assert early["xanchor"] == "left"


def test_phases_are_shaded_by_turns_and_named_where_there_is_room():
    line = samples.resnet_timeline()
    layout = memory_charts.timeline_chart(line)["layout"]
    bands = [shape for shape in layout["shapes"] if shape["type"] == "rect"]
    edges = [k for k in range(len(line.phase)) if k == 0 or line.phase[k] != line.phase[k - 1]]
    assert [band["x0"] for band in bands] == [line.position[k] for k in edges[::2]]
    names = [note["text"] for note in layout["annotations"][:-1]]
    assert names == ["forward", "<b>first step</b>", "backward", "forward", "<b>steady step</b>", "backward"]


def test_a_point_says_module_phase_and_every_category_from_the_top_down():
    line = samples.resnet_timeline()
    said = memory_charts.timeline_chart(line)["data"][-1]["hovertext"][line.peak].split("<br>")
    assert said[:3] == ["<b>layer3.1.bn2</b>", "steady step: backward", "262 MiB live"]
    assert [part.rsplit(" ", 2)[0] for part in said[3:]] == [
        "data",
        "temporaries",
        "activations",
        "optimizer state",
        "gradients",
        "buffers",
        "parameters",
    ]


def test_a_timeline_of_other_phases_without_modules_is_drawn_as_it_is():
    line = replace(samples.resnet_timeline(), module=[])
    line = replace(line, phase=["<warm> up"] * len(line.phase))
    figure = memory_charts.timeline_chart(line)
    assert figure["data"][-1]["hovertext"][0].startswith("&lt;warm&gt; up<br>")
    assert figure["layout"]["annotations"][0]["text"] == "&lt;warm&gt; up"
    assert figure["layout"]["annotations"][-1]["text"] == "<b>peak 262 MiB</b>"


def test_tiles_add_up_and_a_modules_own_bytes_are_a_tile_inside_it():
    footprint = samples.resnet()
    found = tiles(memory_charts.module_chart(footprint))
    assert [tile for tile, row in found.items() if not row["parents"]] == ["/"]
    assert sum(row["values"] for row in found.values()) == modules.weight(footprint.modules[0])
    assert found["/layer1.0.conv1"]["parents"] == "/layer1.0"
    assert found["/layer1.0.conv1"]["labels"] == "conv1"
    assert found["=layer1.0"] == {
        "parents": "/layer1.0",
        "labels": "itself",
        "values": MIB,
        "color": "@activations",
        "hovertext": "<b>layer1.0</b> (Block)<br>itself, without the modules inside<br>1 MiB, 0.4 %<br>activations 1 MiB"
        "<br>1 ms of a step<br>0 FLOP of a step",
    }
    assert found["/layer1.0"]["values"] == 0
    assert "/head" not in found  # it holds one layer and nothing else
    assert found["/head.linear"]["parents"] == "/"
    assert found["/head.linear"]["labels"] == "head.linear"
    assert found["/layer3.0.conv1"]["color"] == "@optimizer"
    assert "12 ms of a step<br>100 MFLOP of a step" in found["/layer1.0.conv1"]["hovertext"]


def test_tiles_without_a_common_module_get_the_model_around_them():
    shares = (ModuleShare(name="a", kind="A", peak_bytes=MIB), ModuleShare(name="b.c", kind="C", peak_bytes=3 * MIB))
    found = tiles(memory_charts.module_chart(samples.resnet(modules=shares)))
    assert {tile: row["parents"] for tile, row in found.items()} == {"/b.c": "/", "/a": "/", "/": ""}
    assert "75 %" in found["/b.c"]["hovertext"]
    alone = tiles(memory_charts.module_chart(samples.resnet(modules=shares[1:])))
    assert list(alone) == ["/b.c"]


def test_of_very_many_modules_the_largest_are_drawn_and_nothing_is_lost():
    shares = [ModuleShare(name=f"m{k}", kind="M", peak_bytes=MIB + k) for k in range(2 * memory_charts.TILES)]
    whole = sum(share.peak_bytes for share in shares)
    footprint = samples.resnet(modules=(ModuleShare(name="", kind="Model", peak_bytes=whole), *shares))
    found = tiles(memory_charts.module_chart(footprint))
    assert len(found) == memory_charts.TILES + 1
    assert sum(row["values"] for row in found.values()) == whole
    assert "itself and modules too small to show" in found["="]["hovertext"]


def test_without_modules_or_timeline_there_is_nothing_to_draw():
    assert memory_charts.module_chart(samples.footprint(530 * MIB)) is None
    views = [("measured", samples.footprint(530 * MIB))]
    assert memory.places(views) is None
    assert memory.figures(views) == {}


def test_predicted_and_measured_lie_beside_each_other_on_one_scale(tmp_path):
    html = run_page(tmp_path, samples.resnet(), samples.resnet("measurement", scale=1.5))
    seen, drawn = plain(html), figures(html)
    assert "Activations 216 MiB 39 % 324 MiB" in seen
    assert seen.index("Through two steps, predicted") < seen.index("Through two steps, measured") < seen.index("By module")
    assert "Highest in the backward of the steady step, in layer3.1.bn2: 262 MiB live. With 296 MiB of runtime" in seen
    assert "a module's bytes at the peak, measured;" in seen.replace("&#39;", "'")
    ends = [drawn[f"timeline-{name}"]["layout"]["yaxis"]["range"] for name in ("predicted", "measured")]
    assert ends[0] == ends[1]


def test_a_run_without_a_measured_timeline_shows_the_predicted_one(tmp_path):
    drawn = figures(run_page(tmp_path, samples.resnet(), samples.footprint(530 * MIB, basis="measurement", how="run")))
    assert {"timeline-predicted", "modules"} <= set(drawn)
    assert "timeline-measured" not in drawn


def test_what_the_allocator_holds_besides_is_told_apart():
    footprint = samples.resnet(peak_bytes=samples.resnet().peak_bytes + 60 * MIB)
    seen = plain(own_page(footprint))
    assert "With 296 MiB of runtime and 60 MiB that the allocator and kernels hold besides that is 618 MiB." in seen
    line = footprint.timeline
    assert line is not None
    line = replace(line, categories={**line.categories, "runtime": [296 * MIB] * len(line.phase)})
    assert "of runtime and" not in plain(own_page(replace(footprint, timeline=line)))


def test_the_page_of_a_footprint_opens_with_its_verdict_and_figures():
    seen = plain(own_page(samples.resnet(), budget_bytes=2**30, name="resnet.py"))
    assert "resnet.py Fits Fits: 558 MiB of 1 GiB, 0.31 s a step, bound by compute." in seen
    assert "Peak memory 558 MiB 546 to 583 MiB of 1 GiB allowed" in seen
    assert "A step 0.31 s 412.9 rows a second bound by compute" in seen
    assert "Batch 128 rows in 4 parts of 32 cpu" in seen
    assert "Live tensors 262 MiB" in seen
    assert "estimate from a trace of two steps, replayed through the allocator" in seen
    assert "The scratch of convolutions was probed on this machine." in seen
    assert "layer1.0.conv1 Conv2d 13 MiB 4.6 % activations 12 ms" in seen


@pytest.mark.parametrize(
    ("budget", "badge"), [(None, "Estimate"), (2**30, "Fits"), (570 * MIB, "May not fit"), (400 * MIB, "Does not fit")]
)
def test_the_badge_says_whether_it_fits(budget, badge):
    assert re.search(rf'<span class="badge \w+">{badge}</span>', own_page(samples.resnet(), budget_bytes=budget))


def test_a_footprint_of_which_little_is_known_still_makes_a_page():
    html = own_page(samples.footprint(530 * MIB, basis="measurement", how="run", seconds=0.0))
    seen = plain(html)
    assert "530 MiB at the peak" in seen
    for absent in ("Where it goes", "Hungriest", "None", "class=&quot;chart"):
        assert absent not in seen
    assert figures(html) == {}


def test_the_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "footprint.html"
    memory_page.write_footprint_page(path, samples.resnet())
    before = path.read_text()
    assert before.startswith("<!doctype html>")
    assert before.endswith("</html>")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(errors.DiskFull, match=r"footprint\.html"):
        memory_page.write_footprint_page(path, samples.resnet("measurement"))
    assert path.read_text() == before


def evil() -> Footprint:
    """Code in every text of a footprint."""
    line = samples.resnet_timeline()
    return samples.resnet(
        modules=tuple(replace(share, name=share.name + EVIL, kind=EVIL) for share in samples.resnet_modules()),
        timeline=replace(
            line,
            module=[EVIL] * len(line.module),
            phase=[EVIL] * len(line.phase),
            categories={**line.categories, EVIL: [MIB] * len(line.phase)},
        ),
        breakdown={**samples.resnet().breakdown, EVIL: MIB},
        phases={EVIL: MIB},
        device=EVIL,
        bound_by=EVIL,
        notes=(EVIL,),
        validated_on=(EVIL,),
    )


def test_what_records_name_is_escaped_everywhere():
    html = own_page(evil(), name=EVIL)
    assert "<img" not in html.replace(page.get_plotlyjs(), "")
    assert "<script>window.owned" not in html


def palette(*, dark: bool) -> dict[str, str]:
    """The page's colours by name."""
    light, _, night = (page.TEMPLATES / "report.css").read_text().partition("@media")
    named = re.compile(r"--([\w-]+): (#[0-9a-f]{6})")
    return dict(named.findall(light)) | (dict(named.findall(night)) if dark else {})


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("vision", ["usual", "protanopia", "deuteranopia", "tritanopia"])
def test_categories_are_told_apart_with_any_colour_vision(vision, dark):
    """Machado et al. 2009 (doi 10.1109/TVCG.2009.113), full severity; distances are CIE 1976, where 2.3 is just noticeable."""
    names = {look.color.removeprefix("@") for look in categories.LOOKS.values()}
    seen = {name: lab(palette(dark=dark)[name], VISIONS[vision]) for name in names}
    for one, other in itertools.combinations(names, 2):
        apart = sum((a - b) ** 2 for a, b in zip(seen[one], seen[other], strict=True)) ** 0.5
        assert apart >= 12, (one, other, apart)


def test_the_page_paints_every_colour_that_charts_name():
    script = (page.TEMPLATES / "report.js").read_text()
    for look in categories.LOOKS.values():
        assert f'"{look.color.removeprefix("@")}"' in script


def test_letters_on_tiles_are_readable():
    for category in modules.PARTS:
        ground = palette(dark=True)[category]
        assert contrast(memory_charts.INKS.get(f"@{category}", memory_charts.DARK), ground) >= 4.5, category


VISIONS = {
    "usual": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}


def lab(color: str, vision: tuple[tuple[float, ...], ...]) -> tuple[float, float, float]:
    """CIE L*a*b* (D65) of a colour #rrggbb as somebody with that vision sees it."""
    channels = [int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    red, green, blue = (min(1.0, max(0.0, sum(map(lambda a, b: a * b, row, linear)))) for row in vision)
    x = (0.4124 * red + 0.3576 * green + 0.1805 * blue) / 0.9505
    y = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    z = (0.0193 * red + 0.1192 * green + 0.9505 * blue) / 1.089
    fx, fy, fz = (value ** (1 / 3) if value > 0.008856 else 7.787 * value + 16 / 116 for value in (x, y, z))
    return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)


@pytest.fixture(scope="module")
def tab() -> Iterator[browser.Page]:
    browser.require_chromium()
    with browser.page() as opened:
        yield opened


def opened(tab: browser.Page, folder: Path, html: str, **options: Any) -> list[dict[str, Any]]:
    """Load a page and return what each chart drew, having seen that nothing was fetched or said."""
    path = folder / "footprint.html"
    path.write_text(html)
    tab.requests.clear()
    tab.console.clear()
    tab.open(path, **options)
    assert [url for url in tab.requests if not url.startswith("data:")] == [path.as_uri()]
    assert tab.console == []
    return tab.evaluate(DRAWN)


def hover(tab: browser.Page, x: float, y: float) -> str:
    """What the box says that opens where the pointer rests."""
    for step in (3, 0):  # a pointer that has not moved opens nothing
        tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=x - step, y=y)
        tab.evaluate("new Promise(done => setTimeout(done, 150))")
    return tab.evaluate(
        '[...document.querySelectorAll(".hoverlayer text tspan, .hoverlayer text")].map(t => t.textContent).join("\\n")'
    )


def place(tab: browser.Page, selector: str) -> dict[str, float]:
    return tab.evaluate(
        f"(() => {{ const element = document.querySelector({json.dumps(selector)}); element.scrollIntoView({{ block: 'center' }});"
        "const box = element.getBoundingClientRect();"
        "return { x: box.x, y: box.y, width: box.width, height: box.height }; })()"
    )


def test_the_page_draws_silently_without_a_network(tab, tmp_path):
    drawn = opened(tab, tmp_path, own_page(samples.resnet()))
    assert [chart["id"] for chart in drawn] == ["chart-timeline-estimated", "chart-modules"]
    assert all(chart["plotly"] and chart["drawn"] >= 7 for chart in drawn), drawn
    assert "558 MiB" in tab.evaluate('document.querySelector("h1").textContent').replace("\N{NO-BREAK SPACE}", " ")
    assert "peak 262 MiB" in tab.evaluate('document.querySelector("#chart-timeline-estimated").textContent')


def test_pointing_at_the_timeline_names_the_module(tab, tmp_path):
    opened(tab, tmp_path, own_page(samples.resnet()))
    box = place(tab, "#chart-timeline-estimated .nsewdrag")
    said = hover(tab, box["x"] + 0.3 * box["width"], box["y"] + 0.6 * box["height"])
    assert re.search(r"layer\d\.\d\.\w+", said), said
    assert "first step: backward" in said
    assert re.search(r"\d+ MiB live", said)


def test_pointing_at_a_tile_gives_bytes_seconds_and_operations_and_a_click_opens_it(tab, tmp_path):
    opened(tab, tmp_path, own_page(samples.resnet()))
    box = place(tab, "#chart-modules .slice:nth-child(2) path")
    said = hover(tab, box["x"] + box["width"] / 2, box["y"] + 8)
    assert "layer" in said
    for unit in ("MiB", "of a step", "FLOP"):
        assert unit in said
    count = 'document.querySelectorAll("#chart-modules .slice").length'
    before = tab.evaluate(count)
    for kind in ("mousePressed", "mouseReleased"):
        tab.call(
            "Input.dispatchMouseEvent", type=kind, x=box["x"] + box["width"] / 2, y=box["y"] + 8, button="left", clickCount=1
        )
    tab.evaluate("new Promise(done => setTimeout(done, 1200))")
    assert tab.evaluate(count) < before
    assert tab.console == []


def test_a_report_draws_both_timelines_in_the_dark_and_on_a_phone(tab, tmp_path):
    html = run_page(tmp_path, samples.resnet(), samples.resnet("measurement", scale=1.07))
    drawn = opened(tab, tmp_path, html, width=390, dark=True)
    assert [chart["id"] for chart in drawn] == [
        f"chart-{name}"
        for name in ("memory", "timeline-predicted", "timeline-measured", "modules", "waterfall", "frontier", "curve")
    ]
    assert all(chart["drawn"] >= 3 and chart["right"] <= 390 for chart in drawn), drawn
    assert tab.evaluate("document.documentElement.scrollWidth") == 390


def test_names_that_look_like_code_do_nothing(tab, tmp_path):
    drawn = opened(tab, tmp_path, own_page(evil(), name=EVIL), width=390)
    assert all(chart["drawn"] for chart in drawn)
    box = place(tab, ".chart .nsewdrag")
    hover(tab, box["x"] + 0.3 * box["width"], box["y"] + 0.6 * box["height"])
    assert tab.evaluate("typeof window.owned") == "undefined"
    assert tab.evaluate('document.querySelectorAll("img").length') == 0
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
