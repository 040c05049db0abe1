"""Real steps measured: figures that are known exactly, sums that must hold, and what cannot be measured."""

from __future__ import annotations

import textwrap
import time
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

import delest
from delest import errors, processes
from delest.backends.torch.loops import JobLoop
from delest.backends.torch.observe import observe
from delest.data import Feed, fit_preprocessing, open_job, synthetic
from delest.footprint import measurement
from delest.records.batch import State
from delest.records.footprint import PHASES, Footprint
from delest.records.form import from_json, to_json
from delest.records.hardware import Roofline
from delest.records.plan import Plan
from delest.records.trace import CATEGORIES

ROWS, WIDTH = 4096, 512
WEIGHTS = 4 * (64 * WIDTH + WIDTH + WIDTH * WIDTH + WIDTH + WIDTH * 4 + 4)
STATE = 2 * WEIGHTS + 6 * 4  # AdamW's moments, and a count for each of six tensors
OUTPUT = 4 * ROWS * WIDTH  # bytes of a hidden layer's activations
ROOFLINE = Roofline(
    device="made up", flops={"matmul.fp32": 1e12}, reused_bytes=1e10, fresh_bytes=1e10, cached_bytes=1e11, overhead_seconds=1e-6
)
JOB = f"""
    from torch import nn
    import delest
    from delest.data import synthetic

    def model():
        return nn.Sequential(nn.Linear(64, {WIDTH}), nn.ReLU(), nn.Linear({WIDTH}, {WIDTH}), nn.ReLU(), nn.Linear({WIDTH}, 4))

    job = delest.Job(model=model, data=synthetic(64, classes=4, rows=10_000), batch_size={ROWS}, recipe=delest.Recipe(optimizer="adamw"))
"""


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))


class SlowSource:
    """Rows that take their time; everything else is that of the source inside."""

    def __init__(self, source, seconds):
        self._source, self._seconds = source, seconds

    def __getattr__(self, name):
        return getattr(self._source, name)

    def __len__(self):
        return len(self._source)

    def read(self, index):
        time.sleep(self._seconds)
        return self._source.read(index)


def small_job(**changes) -> delest.Job:
    return replace(delest.Job(model=network, data=synthetic(16, classes=4, rows=100), batch_size=32), **changes)


def measure(job, **arguments) -> Footprint:
    """In this process, on all rows."""
    source = open_job(job)
    index = list(range(len(source)))
    given = {
        "preprocessing": to_json(fit_preprocessing(source, np.array(index))),
        "index": index,
        "threads": 1,
        "device": "cpu",
    }
    return from_json(Footprint, measurement.measure_job(job, **{**given, **arguments}))


@pytest.fixture(autouse=True)
def _known_rates(monkeypatch):
    """Measuring those of this machine takes seconds; children do measure them."""
    monkeypatch.setattr(measurement, "measure_roofline", lambda threads, device: ROOFLINE)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Footprint:
    """A perceptron with wide batches in a process of its own."""
    path = tmp_path_factory.mktemp("measured") / "perceptron.py"
    path.write_text(textwrap.dedent(JOB))
    job = delest.job.load(path)
    source = open_job(job)
    index = np.arange(len(source))
    answer = processes.call(
        "delest.footprint.measurement:measure_job",
        job,
        environment={"OMP_NUM_THREADS": "1"},
        preprocessing=to_json(fit_preprocessing(source, index)),
        index=index.tolist(),
        threads=1,
        device="cpu",
        steps=3,
    )
    return from_json(Footprint, answer)


def test_what_stays_is_known_to_the_byte(measured):
    assert measured.breakdown["parameters"] == WEIGHTS
    assert measured.breakdown["optimizer"] == STATE
    assert measured.breakdown["buffers"] == 0
    assert measured.breakdown["data"] == ROWS * (64 * 4 + 8)


def test_activations_are_the_outputs_that_the_backward_pass_needs(measured):
    assert measured.breakdown["activations"] == pytest.approx(2 * OUTPUT, rel=0.02)


def test_the_parts_sum_to_the_peak(measured):
    assert set(measured.breakdown) == {*CATEGORIES, "runtime"}
    assert sum(measured.breakdown.values()) == measured.peak_bytes
    assert min(measured.breakdown.values()) >= 0
    assert measured.breakdown["runtime"] == measured.runtime_bytes
    assert measured.low_bytes == measured.high_bytes == measured.peak_bytes


def test_every_phase_has_a_peak_of_its_own(measured):
    assert tuple(measured.phases) == PHASES
    assert measured.peak_bytes == max(measured.phases.values())
    at_rest = measured.runtime_bytes + WEIGHTS + STATE
    for phase in ("first_step", "steady_step", "evaluation", "saving", "resuming"):
        assert measured.phases[phase] > at_rest
    assert measured.phases["steady_step"] > at_rest + 3 * OUTPUT
    assert measured.phases["start"] < measured.phases["first_step"]


def test_the_allocator_saw_what_was_live_and_little_more(measured):
    timeline = measured.timeline
    live = sum(amounts[timeline.peak] for amounts in timeline.categories.values())
    assert live == max(map(sum, zip(*timeline.categories.values(), strict=True)))
    assert live <= measured.allocated_bytes < 1.1 * live
    assert {len(amounts) for amounts in timeline.categories.values()} == {len(timeline.position)} == {len(timeline.phase)}


def test_modules_have_bytes_flops_and_their_share_of_the_seconds(measured):
    shares = {share.name: share for share in measured.modules}
    assert list(shares) == ["", "0", "1", "2", "3", "4"]
    assert shares[""].parameter_bytes == WEIGHTS
    assert shares["2"].parameter_bytes == 4 * (WIDTH * WIDTH + WIDTH)
    assert shares["2"].flops == 3 * 2 * ROWS * WIDTH * WIDTH
    assert shares[""].flops == measured.flops == sum(shares[name].flops for name in "024")
    assert shares[""].seconds == pytest.approx(measured.step_seconds)
    assert shares["2"].seconds > shares["4"].seconds > 0


def test_time_is_that_of_steps_in_a_process_of_their_own(measured):
    assert measured.step_seconds > 0
    assert measured.step_seconds_spread >= 0
    assert measured.waiting_seconds >= 0
    assert 0 < measured.utilisation < 2
    assert measured.bound_by in ("compute", "memory traffic", "overhead", "data")
    assert (measured.basis, measured.how, measured.isolated) == ("measurement", "run", True)
    assert (measured.batch_size, measured.micro_batch) == (ROWS, ROWS)
    assert not measured.notes


def test_a_slow_feed_shows_as_waiting(monkeypatch):
    job = small_job()
    monkeypatch.setattr(measurement, "open_job", lambda job: SlowSource(open_job(job), 0.05))
    slow = measure(job, steps=3)
    assert slow.waiting_seconds >= 0.05
    assert slow.bound_by == "data"
    assert slow.step_seconds < slow.waiting_seconds
    assert not slow.isolated


def test_a_single_step_has_no_spread_and_the_timeline_can_be_left_out():
    footprint = measure(small_job(), steps=1, timeline=False)
    assert footprint.step_seconds_spread == 0
    assert footprint.timeline is None
    # In a process that has memory to spare already, so small a job makes none resident.
    grown = footprint.peak_bytes - footprint.runtime_bytes
    assert footprint.breakdown["parameters"] == min(grown, 4 * (16 * 8 + 8 + 8 * 4 + 4))
    assert sum(footprint.breakdown.values()) == footprint.peak_bytes


def test_a_batch_larger_than_the_data_is_all_of_the_data():
    assert measure(small_job(batch_size=500), steps=1).batch_size == 100


def test_frozen_weights_have_no_gradient_and_no_state():
    def frozen():
        model = network()
        model[0].requires_grad_(False)
        return model

    footprint = measure(small_job(model=frozen, recipe=delest.Recipe(optimizer="adamw")), steps=1)
    shares = {share.name: share for share in footprint.modules}
    assert shares["0"].parameter_bytes == 4 * (16 * 8 + 8)
    assert shares["0"].state_bytes == 0
    assert shares["2"].state_bytes > 0


def steady_details(phases: dict[str, int]) -> Footprint:
    """Details of a model whose weights outweigh its batch, as though these phases had been measured."""

    def heavy():
        return nn.Sequential(nn.Linear(16, 1000), nn.ReLU(), nn.Linear(1000, 4))

    job = small_job(model=heavy, batch_size=2, recipe=delest.Recipe(optimizer="adamw"))
    source = open_job(job)
    index = np.arange(100)
    batch = next(Feed(source, index, fit_preprocessing(source, index), batch_size=2).ordered())
    watched = observe(JobLoop(job, Plan(batch_size=2, micro_batch=2), source.schema, batch), 2)
    peak = max(phases.values())
    footprint = Footprint(
        peak_bytes=peak,
        runtime_bytes=0,
        low_bytes=peak,
        high_bytes=peak,
        phases=phases,
        step_seconds=1.0,
        batch_size=2,
        micro_batch=2,
        basis="measurement",
        how="run",
    )
    return measurement._with_details(footprint, watched)


def test_gradients_at_the_peak_of_a_step_are_known_to_the_byte():
    weights = 4 * (16 * 1000 + 1000 + 1000 * 4 + 4)
    breakdown = steady_details({"steady_step": 10_000_000, "saving": 1}).breakdown
    assert breakdown["parameters"] == breakdown["gradients"] == weights
    assert breakdown["optimizer"] == 2 * weights + 4 * 4
    assert sum(breakdown.values()) == 10_000_000


@pytest.mark.parametrize(("phase", "data"), [("saving", 0), ("resuming", 0), ("start", 0), ("evaluation", 2 * (16 * 4 + 8))])
def test_a_peak_outside_of_steps_holds_no_gradients(phase, data):
    breakdown = steady_details({"steady_step": 1, phase: 10_000_000}).breakdown
    assert breakdown["gradients"] == breakdown["activations"] == 0
    assert breakdown["data"] == data
    assert breakdown["parameters"] == 4 * (16 * 1000 + 1000 + 1000 * 4 + 4)
    assert sum(breakdown.values()) == 10_000_000


@given(
    live=st.dictionaries(st.sampled_from((*CATEGORIES, "runtime", "other")), st.integers(0, 10**12)),
    runtime=st.integers(0, 10**12),
    above=st.integers(0, 10**12),
)
def test_a_breakdown_always_sums_and_is_never_negative(live, runtime, above):
    parts = measurement._break_down(live, runtime, runtime + above)
    assert sum(parts.values()) == runtime + above
    assert min(parts.values()) >= 0
    assert parts["runtime"] == runtime


def test_pages_that_were_never_touched_are_taken_from_activations_first():
    parts = measurement._break_down({"parameters": 50, "activations": 60, "temporaries": 99}, 100, 200)
    assert (parts["parameters"], parts["activations"], parts["temporaries"]) == (50, 50, 0)


def test_a_model_that_cannot_be_watched_is_measured_all_the_same(monkeypatch):
    def refuse(loop, rows):
        raise RuntimeError("no dispatch here")

    monkeypatch.setattr(measurement, "observe", refuse)
    footprint = measure(small_job(), steps=1)
    assert any("no dispatch here" in note for note in footprint.notes)
    assert footprint.step_seconds > 0
    assert (
        sum(footprint.breakdown.values())
        == footprint.peak_bytes
        == footprint.runtime_bytes + footprint.breakdown["temporaries"]
    )


def test_a_system_that_cannot_reset_the_peak_is_named(monkeypatch):
    monkeypatch.setattr("delest.hardware.machine.reset_peak", lambda: False)
    assert any("reset" in note for note in measure(small_job(), steps=1).notes)


def test_a_small_last_batch_is_left_out():
    job = small_job(batch_size=48)
    source, index = open_job(job), np.arange(100)
    feed = Feed(source, index, fit_preprocessing(source, index), batch_size=48)
    assert [batch.count for batch in feed.epoch(0)] == [48, 48, 4]
    assert [batch.count for batch in islice(measurement._endless(feed), 5)] == [48] * 5


def test_a_state_as_from_a_file_shares_no_memory():
    kept = torch.ones(4)
    state = measurement._as_from_file(State({"optimizer.0": kept.numpy(), "model.w": np.ones(3)}, {"numbers": {}}))
    kept.zero_()
    assert state.arrays["optimizer.0"].tolist() == [1.0] * 4


def test_a_gpu_counts_what_is_reserved_and_its_context(monkeypatch):
    figures = {
        "mem_get_info": (700, 1000),
        "memory_reserved": 100,
        "max_memory_reserved": 450,
        "max_memory_allocated": 400,
        "reset_peak_memory_stats": None,
        "synchronize": None,
    }
    for name, value in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    gauge = measurement._Gauge("cuda")
    gauge.reset()
    assert gauge.runtime == 200  # in use by the driver's account, less what PyTorch keeps for tensors
    assert gauge.peak() == 200 + 450
    assert gauge.allocated == 400
    assert "300" in gauge.notes()[0]


def test_all_impossible_numbers_are_told_together():
    with pytest.raises(errors.BadInput) as raised:
        measure(small_job(), steps=0, threads=0, index=[])
    assert len(raised.value.faults) == 3
    assert "steps is 0" in str(raised.value)


def test_a_model_that_does_not_fit_the_data_is_refused():
    with pytest.raises(errors.BadInput, match="4 classes"):
        measure(small_job(model=lambda: nn.Linear(16, 3)))
