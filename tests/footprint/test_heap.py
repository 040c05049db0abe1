"""A trace's blocks asked of the real malloc, against what glibc is documented to do with them."""

from __future__ import annotations

import dataclasses

import pytest
from traces import Maker, make_trace

from delest import errors
from delest.footprint import heap
from delest.footprint.composition import Lives

KIB, MIB = 1 << 10, 1 << 20
pytestmark = pytest.mark.skipif(not heap.is_here(), reason="this system's malloc is not glibc's")


def held_by(*steps, **changes):
    """Bytes before and while each operator runs, of operators that each free the blocks named first and make those named second."""
    maker, numbers = Maker(), {}
    maker.step = 1
    for freed, made in steps:
        maker.free(*(numbers.pop(name) for name in freed))
        maker.operator(kind="memory")
        for name, size in made.items():
            numbers[name] = maker.storage(size, "temporaries")
    trace = dataclasses.replace(maker.trace(), **changes)
    before, most, _ = heap.hold(Lives(trace, rows=1, evaluation_rows=1, resident=True))
    return before, most


def test_a_large_block_is_mapped_until_one_of_its_size_was_freed():
    before, most = held_by(((), {"a": 8 * MIB}), ("a", {}), ((), {"b": 8 * MIB}), ("b", {}))
    assert most[0] == pytest.approx(8 * MIB, rel=0.02)
    assert before[1] < MIB  # unmapped
    assert before[3] >= 8 * MIB  # now it came from the heap, which keeps it: less than twice the threshold


def test_a_block_above_32_mib_is_always_mapped():
    before, _ = held_by(((), {"a": 40 * MIB}), ("a", {}), ((), {"b": 40 * MIB}), ("b", {}))
    assert max(before) < MIB


def test_a_hole_under_a_live_block_stays_and_is_used_again():
    before, most = held_by(((), {"low": 512 * KIB, "high": 512 * KIB}), (("low",), {}), ((), {"other": 256 * KIB}))
    assert before[1] >= 2 * 512 * KIB
    assert most[2] < most[0] + 128 * KIB


def test_what_nobody_writes_is_not_held():
    maker = Maker()
    maker.operator()
    maker.storage(64 * MIB, "activations")
    trace = maker.trace()
    partly = dataclasses.replace(trace, storages=dataclasses.replace(trace.storages, touched={0: 0.25}))
    lives = [Lives(each, rows=1, evaluation_rows=1, resident=True) for each in (trace, partly)]
    whole, written = (heap.hold(each)[1][0] for each in lives)
    beside = heap.PRODUCT_BUFFER_BYTES
    assert whole == pytest.approx(64 * MIB + beside, rel=0.01)
    assert written == pytest.approx(16 * MIB + beside, rel=0.03)


def test_the_same_trace_holds_the_same_and_no_less_than_what_lives():
    lives = Lives(make_trace(layers=6), rows=64, evaluation_rows=64)
    assert heap.hold(lives) == heap.hold(lives)
    assert max(heap.hold(lives)[1]) >= max(lives.totals())


def test_settings_of_the_allocator_in_this_process_do_not_count(monkeypatch):
    lives = Lives(make_trace(layers=2), rows=64, evaluation_rows=64)
    plain = heap.hold(lives)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=65536")
    assert heap.hold(lives) == plain


def test_blocks_larger_than_the_machine_are_held_all_the_same():
    before, most = held_by(((), {"a": 1 << 60, "b": 1 << 60}), ("a", {}), ("b", {}))
    assert most[0] == pytest.approx(2 << 60)
    assert (before[1], before[2]) == (pytest.approx(1 << 60), pytest.approx(0, abs=MIB))


def test_another_malloc_is_said(monkeypatch):
    monkeypatch.setattr(heap, "is_here", lambda: False)
    with pytest.raises(errors.BadInput, match="choose mmap or exact"):
        heap.hold(Lives(make_trace(), rows=1, evaluation_rows=1))
