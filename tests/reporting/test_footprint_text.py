from __future__ import annotations

from dataclasses import replace

import pytest

from delest.records.footprint import ModuleShare
from delest.reporting import categories, footprint, modules
from delest.units import format_bytes
from reporting import samples

MIB = 2**20
GIB = 2**30

WHOLE = """\
fits: 558 MiB of 1 GiB, 0.31 s a step, bound by compute

at the peak
  ░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░██▀▀▀▀▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▚
  ░  runtime          296 MiB  53 %
  █  parameters        13 MiB  2.4 %
  ▌  buffers           40 KiB  under 0.1 %
  ▒  gradients          1 MiB  0.2 %
  ▀  optimizer state   27 MiB  4.8 %
  ▓  activations      216 MiB  39 %
  ▚  temporaries      3.3 MiB  0.6 %
  ▄  data               2 MiB  0.4 %

by phase
  start        323 MiB  ███████████████████████
  first step   532 MiB  ██████████████████████████████████████
  steady step  558 MiB  ████████████████████████████████████████
  evaluation   412 MiB  ██████████████████████████████
  saving       310 MiB  ██████████████████████

hungriest modules, each without those inside it
   bytes  share  mostly                      a step  module
  24 MiB  8.8 %  activations                  24 ms  conv1 (Conv2d)
  24 MiB  8.7 %  activations                  24 ms  bn1 (BatchNorm2d)
  13 MiB  4.6 %  activations                  12 ms  layer1.0.conv1 (Conv2d)
  13 MiB  4.6 %  activations                  12 ms  layer1.0.conv2 (Conv2d)
  13 MiB  4.6 %  activations                  12 ms  layer1.1.conv1 (Conv2d)
  13 MiB  4.6 %  activations                  12 ms  layer1.1.conv2 (Conv2d)
  12 MiB  4.4 %  gradients, optimizer state    3 ms  layer3.0.conv1 (Conv2d)
  12 MiB  4.4 %  gradients, optimizer state    3 ms  layer3.0.conv2 (Conv2d)
  12 MiB  4.4 %  gradients, optimizer state    3 ms  layer3.1.conv1 (Conv2d)
  12 MiB  4.4 %  gradients, optimizer state    3 ms  layer3.1.conv2 (Conv2d)
  and 23 more modules, together 128 MiB

how this is known
  basis         estimate from a trace of two steps, replayed through the allocator
  batch         128 rows in 4 parts of 32
  device        cpu, allocator mmap
  runtime       296 MiB of a warm idle process, included
  tensors       at most 262 MiB live at once
  step          0.31 s, 412.9 rows a second, 31.4 GFLOP
  validated on  no device yet

  - The scratch of convolutions was probed on this machine."""

SWEEP = """\
fits up to batch 64: 778 MiB of 1 GiB, 0.31 s a step, bound by compute

  batch     peak        interval  a step  rows a second  fits
     32  558 MiB  546 to 583 MiB  0.31 s          103.2  yes
     64  778 MiB  766 to 803 MiB  0.31 s          206.5  yes
    128  1.2 GiB         1.2 GiB  0.31 s          412.9  no
    256    2 GiB    2 to 2.1 GiB  0.31 s          825.8  no

  - The scratch of convolutions was probed on this machine."""


def first(output: str) -> str:
    return output.splitlines()[0]


def sweep() -> list:
    """Out of order, as tried."""
    return [samples.resnet(scale=scale, batch_size=32 * scale) for scale in (4, 1, 2, 8)]


def test_the_whole_text_of_an_estimate():
    assert footprint.footprint_text(samples.resnet(), budget_bytes=GIB) == WHOLE


@pytest.mark.parametrize(
    ("peak", "low", "high", "budget", "said"),
    [
        (1.4, 1.3, 1.5, 2.0, "fits: 1.4 GiB of 2 GiB"),
        (1.4, 1.3, 1.5, 1.5, "fits: 1.4 GiB of 1.5 GiB"),
        (1.4, 1.3, 1.5, 1.45, "may not fit: 1.4 GiB (1.3 to 1.5 GiB) of 1.4 GiB"),
        (1.4, 1.3, 1.5, 1.0, "does not fit: 1.4 GiB (1.3 to 1.5 GiB) of 1 GiB"),
        (1.4, 1.4, 1.4, 1.0, "does not fit: 1.4 GiB of 1 GiB"),
        (1.4, 1.3, 1.5, None, "1.4 GiB (1.3 to 1.5 GiB) at the peak"),
        (1.4, 1.4, 1.4, None, "1.4 GiB at the peak"),
        (1.0, 0.9, 1.1, None, "1 GiB (922 MiB to 1.1 GiB) at the peak"),
    ],
)
def test_the_verdict_takes_the_upper_end_for_what_must_fit(peak, low, high, budget, said):
    sizes = {"peak_bytes": int(peak * GIB), "low_bytes": int(low * GIB), "high_bytes": int(high * GIB)}
    budget_bytes = None if budget is None else int(budget * GIB)
    plain = samples.resnet(**sizes, step_seconds=None, bound_by=None)
    assert footprint.verdict(plain, budget_bytes=budget_bytes) == said
    assert footprint.verdict(samples.resnet(**sizes), budget_bytes=budget_bytes) == f"{said}, 0.31 s a step, bound by compute"
    assert budget_bytes is None or footprint.fits(plain, budget_bytes) == said.startswith("fits")


def test_a_measurement_says_what_was_measured_and_names_no_validation():
    output = footprint.footprint_text(samples.resnet("measurement"))
    assert first(output) == "558 MiB at the peak, 0.31 s a step, bound by compute"
    assert "  basis    measurement of real steps\n" in output
    assert "0.31 s (middle half within 20 ms), 412.9 rows a second, 4 ms of it waiting for data, 31.4" in output
    assert "41 % of the device's highest rate" in output
    assert "validated" not in output
    assert "in this process rather than one of its own" in footprint.footprint_text(
        samples.resnet("measurement", isolated=False)
    )


def test_what_backs_an_estimate_is_named():
    output = footprint.footprint_text(samples.resnet(validated_on=("EPYC 7B13", "A100"), notes=("One.", "Two.")))
    assert "  validated on  EPYC 7B13, A100" in output
    assert output.endswith("  - One.\n  - Two.")


def test_a_footprint_of_which_only_the_peak_is_known_shows_no_empty_parts():
    output = footprint.footprint_text(samples.footprint(530 * MIB, basis="measurement", how="run"))
    assert "by phase" in output
    for absent in ("at the peak\n", "hungriest", "tensors", "None"):
        assert absent not in output
    assert "by phase" not in footprint.footprint_text(samples.resnet(phases={}, breakdown={}, modules=()))


@pytest.mark.parametrize("scale", [0.01, 0.4, 1.0, 30.0])
def test_the_bar_is_as_long_as_it_says_and_each_part_as_its_share(scale):
    shown = samples.resnet(scale=scale)
    bar = footprint.breakdown_bar(shown)
    assert len(bar) + 2 == 80
    for category, size in shown.breakdown.items():
        blocks = bar.count(categories.look(category).block)
        assert abs(blocks - footprint.BAR * size / shown.peak_bytes) <= 1, category
    order = [block for k, block in enumerate(bar) if k == 0 or block != bar[k - 1]]
    assert order == [look.block for look in categories.LOOKS.values() if look.block in order]


def test_an_empty_breakdown_has_no_bar():
    assert footprint.breakdown_bar(samples.resnet(breakdown={})) == ""
    assert footprint.breakdown_bar(samples.resnet(breakdown={"data": 0})) == ""


def test_unknown_categories_and_phases_come_last_under_their_own_names():
    shown = samples.resnet(breakdown={"my_cache": 3 * MIB, "runtime": MIB}, phases={"cooling_down": MIB, "start": MIB})
    lines = footprint.footprint_text(shown).splitlines()
    assert [line.split()[1] for line in lines[4:6]] == ["runtime", "my"]
    assert [name for name, _ in footprint.phase_bytes(shown)] == ["start", "cooling down"]


def test_every_category_of_a_trace_has_a_look_that_no_other_has():
    from delest.records.trace import CATEGORIES

    assert {*CATEGORIES, "runtime"} == set(categories.LOOKS)
    for key in ("words", "block", "color"):
        assert len({getattr(look, key) for look in categories.LOOKS.values()}) == len(categories.LOOKS)


def test_modules_count_only_what_none_inside_takes():
    shares = samples.resnet_modules()
    listed = modules.hungriest(samples.resnet())
    assert sum(map(modules.weight, listed)) == modules.weight(shares[0])
    names = [share.name for share in listed]
    assert "head" not in names  # wraps one layer and has nothing itself
    assert "head.linear" in names
    block = next(share for share in listed if share.name == "layer1.0")
    assert modules.weight(block) == MIB
    assert modules.mostly(block) == "activations"


def test_a_weight_shared_by_two_modules_takes_nothing_from_the_one_around_them():
    tied = [
        ModuleShare(name="", kind="GPT", parameter_bytes=10 * MIB, peak_bytes=10 * MIB),
        ModuleShare(name="wte", kind="Embedding", parameter_bytes=10 * MIB, peak_bytes=10 * MIB),
        ModuleShare(name="head", kind="Linear", parameter_bytes=10 * MIB, peak_bytes=10 * MIB),
    ]
    assert [modules.weight(share) for share in modules.own_shares(tied)] == [0, 10 * MIB, 10 * MIB]


def test_modules_without_those_between_lie_in_the_nearest_that_is_there():
    names = ("a.b.c.d", "a.b", "ab", "x.y")
    found = modules.parents([ModuleShare(name=name, kind="M") for name in names])
    assert found == {"a.b.c.d": "a.b", "a.b": None, "ab": None, "x.y": None}
    rooted = modules.parents([ModuleShare(name=name, kind="M") for name in ("", *names)])
    assert rooted["x.y"] == rooted["ab"] == ""
    assert rooted[""] is None


def test_modules_of_which_only_weights_are_known_are_compared_by_these():
    shares = (
        ModuleShare(name="a", kind="Linear", parameter_bytes=MIB, state_bytes=2 * MIB),
        ModuleShare(name="b", kind="Linear", parameter_bytes=4 * MIB),
    )
    output = footprint.footprint_text(samples.resnet(modules=shares))
    shown = output[output.index("inside it\n") :].splitlines()[1:4]
    assert shown == [
        "  bytes  share  mostly                      module",
        "  4 MiB   57 %  parameters                  b (Linear)",
        "  3 MiB   43 %  gradients, optimizer state  a (Linear)",
    ]


@pytest.mark.parametrize(
    ("name", "length", "short"),
    [
        ("layer1.0.conv1", 20, "layer1.0.conv1"),
        ("model.encoder.layers.11.self_attn.out_proj", 30, "…layers.11.self_attn.out_proj"),
        ("model.encoder.layers.11.self_attn.out_proj", 29, "…layers.11.self_attn.out_proj"),
        ("model.encoder.layers.11.self_attn.out_proj", 28, "…11.self_attn.out_proj"),
        ("a." + "x" * 50, 10, "…" + "x" * 9),
        ("", 10, ""),
    ],
)
def test_long_names_lose_their_beginning(name, length, short):
    assert modules.short_name(name, length) == short
    assert len(modules.short_name(name, length)) <= length


def test_lines_keep_to_the_width_and_to_printable_characters_whatever_the_names():
    wild = "\x1b[2J" + ".".join(["block"] * 60) + ".\x07"
    shares = tuple(replace(share, name=share.name and wild + share.name) for share in samples.resnet_modules())
    shown = samples.resnet(modules=shares, notes=("\x9b31m" + "word " * 60,), device="\x1b]0;x\x07", bound_by="\x1b[1m")
    output = footprint.footprint_text(shown)
    assert max(map(len, output.splitlines())) <= 100
    assert all(character.isprintable() or character == "\n" for character in output)


def test_a_sweep_is_in_order_of_batch_and_says_what_fits():
    assert footprint.sweep_text(sweep(), budget_bytes=GIB) == SWEEP


def test_a_sweep_without_a_budget_gives_the_range():
    output = footprint.sweep_text(sweep())
    assert first(output) == "4 batch sizes: 558 MiB to 2 GiB at the peak"
    assert "fits" not in output
    assert first(footprint.sweep_text(sweep()[:1])) == "1 batch size: 1.2 GiB at the peak"
    assert footprint.sweep_text([]) == "no batch size was tried"


def test_a_sweep_in_which_nothing_fits_names_the_least():
    upper = format_bytes(samples.resnet().high_bytes)
    said = footprint.sweep_text(sweep(), budget_bytes=100 * MIB)
    assert first(said) == f"does not fit: batch 32 already takes up to {upper} of 100 MiB"


def test_a_sweep_row_whose_interval_holds_the_budget_may_fit():
    output = footprint.sweep_text(sweep()[1:3], budget_bytes=samples.resnet(scale=2).peak_bytes)
    assert [line.split()[-1] for line in output.splitlines()[3:5]] == ["yes", "perhaps"]


@pytest.mark.parametrize(
    ("flops", "said"), [(0, "0 FLOP"), (999.9, "1 kFLOP"), (31.4e9, "31.4 GFLOP"), (2e15, "2 PFLOP"), (4.2e18, "4.2e+03 PFLOP")]
)
def test_operations_are_counted_in_words(flops, said):
    assert footprint.format_flops(flops) == said
