"""PyTorch's caching allocator for CUDA, with its default settings and one stream (c10/cuda/CUDACachingAllocator.cpp)."""

from __future__ import annotations

from bisect import bisect_left, insort

_MIB = 1 << 20
GRANULE = 512  # kMinBlockSize
SMALL = _MIB  # kSmallSize: up to here a block is of the small pool
SMALL_SEGMENT = 2 * _MIB  # kSmallBuffer
LARGE_SEGMENT = 20 * _MIB  # kLargeBuffer
OWN_SEGMENT = 10 * _MIB  # kMinLargeAlloc: from here on a block has a segment of its own size
SEGMENT_GRANULE = 2 * _MIB  # kRoundLarge


def block_bytes(size: int) -> int:
    """A request in whole granules (round_size)."""
    return max(GRANULE, -(-size // GRANULE) * GRANULE)


def segment_bytes(block: int) -> int:
    """What is asked of the driver for a block that no free one serves (get_allocation_size)."""
    if block <= SMALL:
        return SMALL_SEGMENT
    return LARGE_SEGMENT if block < OWN_SEGMENT else -(-block // SEGMENT_GRANULE) * SEGMENT_GRANULE


class Caching:
    """Segments from the driver, split into blocks; none is given back, as none is until memory runs out.

    `held_bytes` is `torch.cuda.memory_reserved()`, `allocated_bytes` is `torch.cuda.memory_allocated()`.
    """

    def __init__(self) -> None:
        self.held_bytes = self.peak_bytes = 0
        self.allocated_bytes = self.peak_allocated_bytes = 0
        self._pools: tuple[list[tuple[int, int]], list[tuple[int, int]]] = (
            [],
            [],
        )  # (bytes, start) of free small, large blocks
        self._free: dict[int, int] = {}  # start of a free block: bytes
        self._ends: dict[int, int] = {}  # end of a free block: its start
        self._used: dict[int, tuple[int, int]] = {}  # start: bytes and pool
        self._frontier = 0

    def allocate(self, size: int) -> int:
        """A handle of a new block of `size` bytes."""
        wanted = block_bytes(size)
        pool = int(wanted > SMALL)
        place = bisect_left(self._pools[pool], (wanted,))
        if place < len(self._pools[pool]):
            start, found = self._take(self._pools[pool][place][1], pool)
        else:
            start, found = self._segment(wanted)
        # should_split: a large block's rest stays with it unless it would serve another large one.
        if found - wanted >= GRANULE if pool == 0 else found - wanted > SMALL:
            self._put(start + wanted, found - wanted, pool)
            found = wanted
        self._used[start] = found, pool
        self.allocated_bytes += found
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return start

    def free(self, handle: int) -> None:
        """Give a block back to its pool, merged with free neighbours of the same segment."""
        start = handle
        size, pool = self._used.pop(start)
        self.allocated_bytes -= size
        if start in self._ends:
            start, before = self._take(self._ends[start], pool)
            size += before
        if start + size in self._free:
            size += self._take(start + size, pool)[1]
        self._put(start, size, pool)

    def _segment(self, block: int) -> tuple[int, int]:
        size = segment_bytes(block)
        start = self._frontier
        self._frontier += size + GRANULE  # a gap, so that neighbours in different segments never merge
        self.held_bytes += size
        self.peak_bytes = self.held_bytes
        return start, size

    def _put(self, start: int, size: int, pool: int) -> None:
        self._free[start], self._ends[start + size] = size, start
        insort(self._pools[pool], (size, start))

    def _take(self, start: int, pool: int) -> tuple[int, int]:
        size = self._free.pop(start)
        del self._ends[start + size]
        self._pools[pool].pop(bisect_left(self._pools[pool], (size, start)))
        return start, size
