"""Simulated allocators against sizes worked out by hand from the sources they follow, and against what must always hold."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings, strategies as st

from delest.footprint.allocators import Allocator, Caching, Exact, Mapped
from delest.footprint.allocators.caching import block_bytes, segment_bytes

KIB, MIB = 1 << 10, 1 << 20
MAKERS: dict[str, Callable[[], Allocator]] = {
    "exact": Exact,
    "mmap": Mapped,
    "cuda": Caching,
}

# (bytes,) to allocate, or the place in the list of live blocks of the one to free
SIZES = st.integers(1, 2048) | st.integers(1, 64).map(lambda n: n * 4096) | st.integers(1, 40 * MIB)
EVENTS = st.lists(st.tuples(SIZES) | st.integers(0, 1000), max_size=80)


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=60, deadline=None)
@given(events=EVENTS)
def test_never_holds_less_than_what_lives(name, events):
    allocator, live = MAKERS[name](), []
    highest = 0
    for event in events:
        if isinstance(event, tuple):
            live.append((allocator.allocate(event[0]), event[0]))
        elif live:
            allocator.free(live.pop(event % len(live))[0])
        highest = max(highest, allocator.held_bytes)
        assert allocator.held_bytes >= sum(size for _, size in live)
        assert len({handle for handle, _ in live}) == len(live)
    assert allocator.peak_bytes == highest


@pytest.mark.parametrize("name", ["exact", "mmap"])
@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(SIZES, max_size=40), seed=st.randoms(use_true_random=False))
def test_is_empty_when_all_is_freed(name, sizes, seed):
    allocator = MAKERS[name]()
    handles = [allocator.allocate(size) for size in sizes]
    seed.shuffle(handles)
    for handle in handles:
        allocator.free(handle)
    assert allocator.held_bytes == 0


@settings(max_examples=60, deadline=None)
@given(events=EVENTS)
def test_blocks_of_cuda_fill_their_segments(events):
    device, live = Caching(), []
    for event in events:
        if isinstance(event, tuple):
            live.append(device.allocate(event[0]))
        elif live:
            device.free(live.pop(event % len(live)))
        blocks = [*((start, size) for start, (size, _) in device._used.items()), *device._free.items()]
        assert sum(size for _, size in blocks) == device.held_bytes
        assert device.allocated_bytes == sum(size for size, _ in device._used.values())
        ordered = sorted(blocks)
        assert all(a + size <= b for (a, size), (b, _) in pairwise(ordered))


# A fixed threshold


@pytest.mark.parametrize(
    ("size", "held"),
    [
        (1 * MIB, 1 * MIB + 4096),  # a page for the headers, the alignment and the smallest chunk
        (1 * MIB - 256, 1 * MIB),  # they fit into the last page
        (1024, 1040),  # a header, in granules of 16 bytes
        (1, 32),
    ],
)
def test_a_block_under_a_fixed_threshold_takes(size, held):
    allocator = Mapped()
    allocator.allocate(size)
    assert allocator.held_bytes == held


def test_only_blocks_from_64_kib_on_are_mapped():
    sizes = [60 * KIB, 64 * KIB]
    held = [Mapped()._taken(size) for size in sizes]
    assert [size % 4096 == 0 for size in held] == [False, True]


# CUDA


@pytest.mark.parametrize(("size", "block"), [(1, 512), (512, 512), (513, 1024), (MIB, MIB), (MIB + 1, MIB + 512)])
def test_requests_are_rounded_to_512_bytes(size, block):
    assert block_bytes(size) == block


@pytest.mark.parametrize(
    ("block", "segment"),
    [
        (512, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 512, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 512, 12 * MIB),
        (33 * MIB, 34 * MIB),
    ],
)
def test_segments_of_cuda(block, segment):
    assert segment_bytes(block) == segment


def test_small_blocks_share_a_segment_and_split_to_512_bytes():
    device = Caching()
    for _ in range(4096):  # fill 2 MiB exactly
        device.allocate(100)
    assert (device.held_bytes, device.allocated_bytes) == (2 * MIB, 2 * MIB)
    device.allocate(100)
    assert device.held_bytes == 4 * MIB


def test_medium_blocks_share_a_segment_of_20_mib():
    device = Caching()
    for _ in range(5):
        device.allocate(4 * MIB)
    assert (device.held_bytes, device.allocated_bytes) == (20 * MIB, 20 * MIB)
    device.allocate(4 * MIB)
    assert device.held_bytes == 40 * MIB


def test_a_rest_of_at_most_1_mib_stays_with_a_large_block():
    device = Caching()
    handle = device.allocate(33 * MIB)  # 34 MiB, and a rest of 1 MiB is not split off
    assert (device.held_bytes, device.allocated_bytes) == (34 * MIB, 34 * MIB)
    device.free(handle)
    device.allocate(33 * MIB - 512)  # a rest of 1 MiB + 512 is
    assert (device.held_bytes, device.allocated_bytes) == (34 * MIB, 33 * MIB - 512)


def test_small_and_large_pools_do_not_serve_each_other():
    device = Caching()
    device.free(device.allocate(4 * MIB))
    device.allocate(MIB)
    assert device.held_bytes == 22 * MIB


def test_freed_neighbours_merge_and_the_best_fit_is_taken():
    device = Caching()
    blocks = [device.allocate(4 * MIB) for _ in range(5)]
    device.free(blocks[0])
    device.free(blocks[2])
    device.free(blocks[1])  # 12 MiB in one piece
    device.free(blocks[4])  # 4 MiB in another
    assert device.allocate(3 * MIB - 512) == blocks[4]
    assert device.allocate(12 * MIB) == blocks[0]
    assert device.held_bytes == 20 * MIB


def test_segments_never_merge():
    device = Caching()
    for handle in [device.allocate(12 * MIB), device.allocate(12 * MIB)]:
        device.free(handle)
    device.allocate(24 * MIB)
    assert device.held_bytes == 48 * MIB


def test_cuda_keeps_what_was_freed():
    device = Caching()
    device.free(device.allocate(64 * MIB))
    assert (device.held_bytes, device.allocated_bytes, device.peak_allocated_bytes) == (64 * MIB, 0, 64 * MIB)
