import dataclasses

import pytest
from traces import Maker, make_trace

from delest import errors
from delest.footprint import time
from delest.records.hardware import Roofline

GPU = Roofline(
    device="device of round numbers",
    flops={"matmul.fp32": 1e12, "convolution.fp32": 5e11},
    reused_bytes=1e11,
    fresh_bytes=1e11,
    cached_bytes=1e11,
    overhead_seconds=1e-6,
)
CPU = dataclasses.replace(
    GPU, device="processor of round numbers", threads=1, fresh_bytes=1e10, kernel_bytes={"softmax.fp32": 1e9}
)


def steady(*operators, **fields):
    """A trace whose steady step is these operators, each the arguments of `Maker.operator`; they run forward unless said."""
    maker = Maker()
    maker.step = 2
    for given in operators:
        maker.phase = given.pop("phase", "forward")
        maker.operator(**given)
    return maker.trace(**fields)


def test_an_operator_takes_the_longer_of_arithmetic_and_traffic_and_its_launch():
    trace = steady({"flops": 2e9, "moved": 1e6}, {"kind": "memory", "moved": 5e8}, {"kind": "memory", "moved": 10})
    assert time.operator_seconds(trace, GPU, rows=1) == pytest.approx([2e-3 + 1e-6, 5e-3 + 1e-6, 1e-6 + 1e-10])


def test_views_take_no_time():
    assert time.operator_seconds(steady({"kind": "view"}), GPU, rows=1) == [0.0]


def test_what_each_row_costs_is_multiplied_by_the_rows():
    trace = steady({"flops": (1e9, 1e8)})
    few, many = (time.step_time(trace, GPU, rows=rows) for rows in (10, 20))
    assert (few.flops, many.flops) == (2e9, 3e9)
    assert many.seconds - few.seconds == pytest.approx(1e-3)


def test_only_the_steady_step_is_counted_and_its_phases_apart():
    maker = Maker()
    for step, seconds in ((1, 7), (2, 1), (3, 9)):
        maker.step = step
        for phase, times in (("forward", 1), ("backward", 2), ("update", 4)):
            maker.phase = phase
            maker.operator(flops=seconds * times * 1e12)
    step = time.step_time(maker.trace(), GPU, rows=1)
    assert step.phases == pytest.approx({"forward": 1, "backward": 2, "update": 4}, abs=1e-5)
    assert step.seconds == pytest.approx(7, abs=1e-5)


def test_modules_include_what_is_inside_them():
    trace = steady(
        {"module": "body.0", "flops": 1e12}, {"module": "body.1.inner", "flops": 2e12}, {"module": "", "flops": 4e12},
        modules={"": "Net", "body": "Sequential", "unused": "Linear"},
    )  # fmt: skip
    step = time.step_time(trace, GPU, rows=1)
    assert step.modules == pytest.approx({"": 7, "body": 3, "body.0": 1, "body.1": 2, "body.1.inner": 2, "unused": 0}, abs=1e-5)
    assert step.module_flops["body"] == 3e12
    assert step.modules[""] == pytest.approx(step.seconds)


@pytest.mark.parametrize(
    ("operators", "bound"),
    [
        ([{"flops": 1e12}, {"kind": "memory", "moved": 1e9}], "compute"),
        ([{"flops": 1e10}, {"kind": "memory", "moved": 1e10}], "memory traffic"),
        ([{"flops": 1e8}] + [{"kind": "memory", "moved": 8}] * 1000, "overhead"),
    ],
)
def test_what_binds_most_of_the_seconds_binds_the_step(operators, bound):
    step = time.step_time(steady(*[dict(one) for one in operators]), GPU, rows=1)
    assert step.bound_by == bound
    assert sum(step.bounds.values()) == pytest.approx(step.seconds)


def test_utilisation_is_a_share_of_the_highest_rate_in_the_formats_used():
    assert time.step_time(steady({"flops": 1e12}), GPU, rows=1).utilisation == pytest.approx(1, abs=1e-4)
    slower = time.step_time(steady({"flops": 1e12, "kind": "convolution"}), GPU, rows=1)
    assert slower.utilisation == pytest.approx(0.5, abs=1e-4)
    assert time.step_time(steady({"kind": "memory", "moved": 1e9}), GPU, rows=1).utilisation is None


def test_a_rate_that_is_not_known_is_that_of_the_nearest_kind_and_format():
    for kind in ("attention", "recurrent", "depthwise"):
        seconds = time.step_time(steady({"flops": 1e12, "kind": kind}), GPU, rows=1).seconds
        assert seconds == pytest.approx(2 if kind == "depthwise" else 1, abs=1e-4)
    halved = steady({"flops": 1e12})
    halved.operators.dtype[0] = "bf16"
    assert time.step_time(halved, GPU, rows=1).seconds == pytest.approx(1, abs=1e-4)
    with pytest.raises(errors.BadInput, match=r"matmul\.fp32"):
        time.step_time(halved, dataclasses.replace(GPU, flops={}), rows=1)


def test_a_processors_libraries_copy_their_operands_before_they_compute():
    trace = steady({"flops": 1e12, "moved": 1e10})
    assert time.operator_seconds(trace, CPU, rows=1, allocator="exact") == pytest.approx([1 + 3 * 0.1], abs=1e-5)
    assert time.operator_seconds(trace, GPU, rows=1) == pytest.approx([1], abs=1e-5)


def test_a_processor_reads_what_it_writes_unless_it_works_in_place():
    maker = Maker()
    maker.step, maker.phase = 2, "forward"
    maker.operator(kind="memory", moved=3e9)  # two read, one made
    maker.storage(1e9, "temporaries")
    maker.operator(kind="memory", moved=2e9)  # in place
    made, in_place = time.operator_seconds(maker.trace(), CPU, rows=1, allocator="exact")
    assert made == pytest.approx(3e9 / 1e11, rel=1e-3)  # as the rate was measured
    assert in_place == pytest.approx(2e9 / 1e11 * 3 / 4, rel=1e-3)


def test_kernels_slower_than_memory_are_held_to_their_own_rate():
    trace = steady({"kind": "softmax", "moved": 1e9}, {"kind": "layer_norm", "moved": 1e9})
    slow, plain = time.operator_seconds(trace, CPU, rows=1)
    assert slow == pytest.approx(1, abs=1e-4)
    assert plain < 0.02


def test_depthwise_kernels_are_held_to_their_bytes_where_that_rate_is_known():
    trace = steady({"kind": "depthwise", "flops": 1e10, "moved": 1e9})
    known = dataclasses.replace(CPU, kernel_bytes={"depthwise.fp32": 1e9})
    assert time.operator_seconds(trace, known, rows=1) == pytest.approx([1], abs=1e-3)
    assert time.operator_seconds(trace, CPU, rows=1) == pytest.approx([1e10 / 5e11], abs=1e-3)


def test_memory_that_the_system_gives_anew_costs_its_page_faults():
    maker = Maker()
    for step, size in ((1, 64 << 20), *[(1, 512 << 10)] * 20, (2, 64 << 20), (2, 512 << 10)):
        maker.step, maker.phase = step, "forward"
        maker.operator(kind="memory")
        maker.free(maker.storage(size, "temporaries"))
    trace, faulting = maker.trace(), 1 / 1e10 - 1 / 1e11

    def extra(allocator):
        """Seconds of the steady step's two operators beyond those without any fault."""
        found, without = (time.operator_seconds(trace, CPU, rows=1, allocator=name)[-2:] for name in (allocator, "exact"))
        return [(a - b) / faulting for a, b in zip(found, without, strict=True)]

    assert extra("mmap") == pytest.approx([64 << 20, 512 << 10], rel=0.01)
    # The heap has had room for the small one since step 1.
    assert extra("glibc") == pytest.approx([64 << 20, 0], rel=0.01, abs=1)


def test_scratch_of_a_kernel_is_fresh_too():
    trace = steady({"scratch": 64 << 20})
    with_faults, without = (time.step_time(trace, CPU, rows=1, allocator=name).seconds for name in ("mmap", "exact"))
    assert with_faults - without == pytest.approx((64 << 20) * (1 / 1e10 - 1 / 1e11), rel=0.01)


def test_measured_seconds_count_instead_of_the_roofline():
    trace = steady({"name": "aten.convolution.default", "flops": 1e12}, {"flops": 1e12})
    known = {trace.operators.signature[0]: 0.25}
    assert time.operator_seconds(trace, GPU, rows=1, measured=known) == pytest.approx([0.25, 1], abs=1e-5)


def test_micro_batches_repeat_everything_but_the_update_and_add_their_gradients():
    trace = make_trace(layers=3, width=256)
    one, four = (time.step_time(trace, GPU, rows=8, parts=parts) for parts in (1, 4))
    weights = 3 * 4 * 256 * 256
    assert four.phases["update"] == one.phases["update"]
    assert four.phases["forward"] == pytest.approx(4 * one.phases["forward"])
    assert four.phases["backward"] == pytest.approx(4 * one.phases["backward"] + 3 * 3 * weights / 1e11)
    assert four.flops == 4 * one.flops
    assert sum(four.bounds.values()) == pytest.approx(four.seconds)


def test_a_probe_corrects_another_steps_prediction_as_a_whole_or_by_phase():
    def predicted(forward, update):
        return time.step_time(
            steady({"flops": forward * 1e12}, {"phase": "update", "kind": "memory", "moved": update * 1e11}), GPU, rows=1
        )

    probe, wanted = predicted(1, 1), predicted(2, 3)
    assert time.scale(3.0, probe, wanted) == pytest.approx(5 * 1.5, rel=1e-4)
    by_phase = time.scale({"forward": 2.0, "backward": 0.0, "update": 0.5}, probe, wanted)
    assert by_phase == pytest.approx(2 * 2.0 + 3 * 0.5, rel=1e-4)
    assert time.scale(probe.phases, probe, wanted) == pytest.approx(wanted.seconds)
    assert time.scale({"forward": 2.0}, probe, wanted) == pytest.approx(2 * (2 + 3), rel=1e-4)


def test_a_probe_that_took_no_time_says_nothing():
    step = time.step_time(steady({"flops": 1e12}), GPU, rows=1)
    with pytest.raises(errors.BadInput, match="says nothing"):
        time.scale(0.0, step, step)


def test_less_than_one_row_or_part_is_refused_with_all_faults_together():
    with pytest.raises(errors.BadInput) as caught:
        time.step_time(steady({"flops": 1}), GPU, rows=0, parts=0)
    assert "0 rows" in str(caught.value)
    assert "0 parts" in str(caught.value)
