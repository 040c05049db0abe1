"""Replays of traces made by hand, against peaks that can be worked out."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st
from traces import Maker, make_trace

from delest import errors
from delest.footprint.composition import POINTS
from delest.footprint.replay import NODE_BYTES, SIMULATIONS, replay
from delest.records.footprint import PHASES

MIB = 1 << 20
LAYERS, WIDTH, ROWS = 3, 256, 16
WEIGHT, ROW = 4 * WIDTH * WIDTH, 4 * WIDTH
WEIGHTS, ACTIVATION = LAYERS * WEIGHT, ROWS * ROW


def replayed(trace=None, *, rows=ROWS, allocator="exact", **options):
    return replay(trace or make_trace(layers=LAYERS, width=WIDTH), rows=rows, allocator=allocator, **options)


def test_phases_by_hand():
    phases = replayed().phases
    assert tuple(phases) == PHASES
    assert phases["start"] == WEIGHTS
    # The first update makes two copies of the weights as state; gradients and the gradient of the input still live then.
    assert phases["first_step"] == 4 * WEIGHTS
    # In the second backward the state is there: at the last layer, all gradients, the batch, its output, two passing ones.
    assert phases["steady_step"] == 4 * WEIGHTS + 4 * ACTIVATION
    # The batch, a layer's input and its output.
    assert phases["evaluation"] == 3 * WEIGHTS + 3 * ACTIVATION
    assert phases["saving"] == phases["resuming"] == 6 * WEIGHTS


def test_the_peak_is_the_highest_phase_and_its_breakdown_sums_to_it():
    trace = replace(make_trace(layers=LAYERS, width=WIDTH), state_bytes=0)
    found = replayed(trace, runtime_bytes=100)
    assert found.peak_bytes == max(found.phases.values()) == found.phases["steady_step"]
    assert found.breakdown == {
        "parameters": WEIGHTS,
        "buffers": 0,
        "gradients": WEIGHTS,
        "optimizer": 2 * WEIGHTS,
        "activations": ACTIVATION,
        "temporaries": 2 * ACTIVATION,
        "data": ACTIVATION,
        "runtime": 100,
    }


def test_saving_may_be_the_peak():
    found = replayed(runtime_bytes=7)
    assert found.peak_bytes == found.phases["saving"] == 6 * WEIGHTS + 7
    assert found.breakdown["parameters"] == WEIGHTS
    assert found.breakdown["optimizer"] == 2 * WEIGHTS
    assert found.breakdown["temporaries"] == 3 * WEIGHTS  # the copy
    assert sum(found.breakdown.values()) == found.peak_bytes


@pytest.mark.parametrize("allocator", SIMULATIONS)
@settings(max_examples=15, deadline=None)
@given(
    layers=st.integers(1, 5),
    width=st.sampled_from((8, 64, 300)),
    rows=st.integers(1, 600),
    parts=st.integers(1, 3),
    scratch=st.integers(0, 3000),
    runtime=st.integers(0, 10 * MIB),
)
def test_what_always_holds(allocator, layers, width, rows, parts, scratch, runtime):
    trace = make_trace(layers=layers, width=width, scratch_per_sample=scratch)
    options = {"rows": rows, "batch_size": rows * parts, "runtime_bytes": runtime}
    found, exact = replay(trace, allocator=allocator, **options), replay(trace, allocator="exact", **options)
    assert found.low_bytes <= found.peak_bytes <= found.high_bytes
    assert found.peak_bytes == max(found.phases.values()) == sum(found.breakdown.values())
    assert min(found.breakdown.values()) >= 0
    # With CUDA the copy for a checkpoint is in the host's memory.
    assert all(
        found.phases[phase] >= exact.phases[phase]
        for phase in PHASES
        if allocator != "cuda" or phase not in ("saving", "resuming")
    )
    assert found.allocated_bytes >= exact.allocated_bytes
    for share in found.modules:
        assert share.parameter_bytes + share.state_bytes + share.activation_bytes <= share.peak_bytes
        assert share.peak_bytes <= found.peak_bytes


def test_the_interval_of_glibc_is_at_most_a_quarter_of_its_midpoint():
    found = replayed(rows=2000, allocator="glibc")
    assert found.high_bytes - found.low_bytes <= 0.25 * (found.high_bytes + found.low_bytes) / 2
    assert found.low_bytes <= found.peak_bytes <= found.high_bytes


def test_storages_that_die_at_an_operator_are_gone_before_those_born_there():
    maker = Maker()
    maker.step, maker.phase = 1, "forward"
    maker.operator()
    first = maker.storage(1000, "temporaries")
    maker.free(first)
    maker.operator(scratch=300)
    maker.storage(900, "temporaries")
    maker.operator()
    found = replayed(maker.trace())
    assert found.phases["first_step"] == found.allocated_bytes == 1200
    assert found.breakdown["temporaries"] == 1200


def test_scratch_is_live_beside_the_outputs_and_of_the_module_at_work():
    trace = replace(make_trace(layers=2, width=WIDTH, scratch_per_sample=100_000), state_bytes=0)
    found = replayed(trace)
    # The last layer's forward in the second step: state, weights, batch and two outputs.
    assert found.peak_bytes == 3 * 2 * WEIGHT + 3 * ACTIVATION + ROWS * 100_000
    shares = {share.name: share for share in found.modules}
    assert shares["blocks.1"].peak_bytes == 3 * WEIGHT + ACTIVATION + ROWS * 100_000
    assert shares["blocks.0"].peak_bytes == 3 * WEIGHT + ACTIVATION


def test_modules_include_their_children():
    found = replayed(replace(make_trace(layers=LAYERS, width=WIDTH), state_bytes=0))
    shares = {share.name: share for share in found.modules}
    assert list(shares) == ["", "blocks", "blocks.0", "blocks.1", "blocks.2"]
    for name, parameters in (("", 3), ("blocks", 3), ("blocks.1", 1)):
        assert shares[name].parameter_bytes == parameters * WEIGHT
        assert shares[name].state_bytes == parameters * 3 * WEIGHT  # a gradient and two moments
    assert (shares["blocks.0"].activation_bytes, shares["blocks.1"].activation_bytes) == (ACTIVATION, 0)
    assert shares[""].peak_bytes == found.peak_bytes
    assert shares["blocks"].kind == "ModuleList"


def test_gradients_of_earlier_parts_stay():
    trace = replace(make_trace(layers=LAYERS, width=WIDTH), state_bytes=0)
    whole, split = replayed(trace), replayed(trace, batch_size=2 * ROWS)
    assert (split.batch_size, split.micro_batch) == (2 * ROWS, ROWS)
    # First operator of the backward pass: gradients of the earlier part beside all activations.
    assert split.phases["first_step"] >= 2 * WEIGHTS + (LAYERS + 2) * ACTIVATION
    # Only one gradient at a time exists twice.
    assert split.phases["steady_step"] == 4 * WEIGHTS + WEIGHT + (LAYERS + 3) * ACTIVATION
    assert whole.phases["evaluation"] == split.phases["evaluation"]
    assert split.breakdown["gradients"] == WEIGHTS + WEIGHT


def test_only_what_evaluation_makes_grows_with_its_rows():
    few, many = replayed(), replayed(evaluation_rows=10 * ROWS)
    assert many.phases["evaluation"] - few.phases["evaluation"] == 3 * 9 * ACTIVATION
    assert many.phases["steady_step"] == few.phases["steady_step"]


def test_the_runtime_counts_to_every_phase():
    bare, warm = replayed(), replayed(runtime_bytes=300 * MIB)
    assert {name: size - bare.phases[name] for name, size in warm.phases.items()} == dict.fromkeys(PHASES, 300 * MIB)
    assert warm.high_bytes - bare.high_bytes == warm.low_bytes - bare.low_bytes == 300 * MIB  # its size is known


def test_a_fixed_threshold_adds_pages():
    found = replayed(rows=1024, allocator="mmap")
    exact = replayed(rows=1024)
    assert 0 < found.peak_bytes - exact.peak_bytes <= 30 * 4096
    assert found.allocated_bytes == exact.allocated_bytes


def test_cuda_reports_reserved_and_allocated():
    found = replayed(make_trace(layers=LAYERS, width=2048), rows=64, allocator="cuda")
    # Weights, two moments and gradients are 16 MiB each, a segment each; activations of 512 KiB share segments of 2 MiB.
    assert found.peak_bytes == 12 * 16 * MIB + 4 * MIB
    exact = replayed(make_trace(layers=LAYERS, width=2048), rows=64)
    assert found.allocated_bytes == exact.allocated_bytes
    assert found.phases["saving"] == found.peak_bytes


def test_a_short_timeline_is_whole():
    found = replayed()
    line = found.timeline
    assert (line.position[0], line.position[-1]) == (0, 1)
    assert line.position == sorted(line.position)
    assert (line.phase[0], line.phase[-1]) == ("1 forward", "2 update")
    totals = [sum(sizes) for sizes in zip(*line.categories.values(), strict=True)]
    assert line.peak == totals.index(max(totals))
    assert totals[line.peak] == found.phases["steady_step"]
    assert line.module[line.peak] == "blocks.0"


def test_a_long_timeline_keeps_its_peaks():
    trace = make_trace(layers=600, width=16, scratch_per_sample=50)
    found, line = replayed(trace), replayed(trace).timeline
    assert 200 < len(line.position) <= POINTS
    assert len(line.position) == len(line.phase) == len(line.module)
    totals = [sum(sizes) for sizes in zip(*line.categories.values(), strict=True)]
    assert totals[line.peak] == max(totals) == max(found.phases["first_step"], found.phases["steady_step"])


def test_weights_that_are_there_before_the_first_operator_count_as_start():
    maker = Maker()
    maker.step, maker.phase = 1, "forward"
    maker.operator()
    maker.storage(4000, "parameters")
    maker.storage(1000, "data")
    found = replayed(maker.trace())
    assert found.phases["start"] == 4000
    assert found.phases["first_step"] == 5000
    assert "steady_step" not in found.phases


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rows": 0}, "rows is 0"),
        ({"allocator": "jemalloc"}, "exact, mmap, cuda, glibc"),
        ({"batch_size": 8}, "batch_size is 8, less than the 16 rows"),
        ({"evaluation_rows": 0}, "evaluation_rows is 0"),
        ({"runtime_bytes": -1}, "runtime_bytes is -1"),
        ({"rows": 0, "evaluation_rows": 0}, "2 faults"),
    ],
)
def test_bad_input(options, words):
    with pytest.raises(errors.BadInput, match=words):
        replayed(**options)


def test_pages_that_nobody_writes_take_no_resident_memory() -> None:
    whole = make_trace()
    number = max(range(len(whole.storages.born)), key=lambda i: whole.storages.sizes(8)[i])
    partly = dataclasses.replace(whole, storages=dataclasses.replace(whole.storages, touched={number: 0.25}))
    resident = [replay(trace, rows=8, allocator="mmap") for trace in (whole, partly)]
    assert resident[1].peak_bytes < resident[0].peak_bytes
    assert resident[1].allocated_bytes == resident[0].allocated_bytes  # it was asked for all the same
    assert replay(partly, rows=8, allocator="exact").peak_bytes == replay(whole, rows=8, allocator="exact").peak_bytes


def test_the_peak_is_that_of_the_phases_that_count() -> None:
    trace = dataclasses.replace(make_trace(), state_bytes=1 << 30)
    steps = replay(trace, rows=8, allocator="exact", phases=("first_step", "steady_step"))
    assert steps.peak_bytes == max(steps.phases["first_step"], steps.phases["steady_step"])
    assert replay(trace, rows=8, allocator="exact").peak_bytes == steps.phases["saving"] > steps.peak_bytes


def test_nodes_of_the_graph_are_held_beside_tensors() -> None:
    maker = Maker()
    for step in (1, 2):
        maker.step, maker.phase = step, "forward"
        for _ in range(1000):
            maker.operator(kind="view")
    trace = maker.trace()
    assert replay(trace, rows=1, allocator="exact").peak_bytes == 0
    assert replay(trace, rows=1, allocator="mmap").peak_bytes == 1000 * NODE_BYTES  # those of one step
