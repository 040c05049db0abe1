"""glibc's default malloc: a heap that keeps what was freed in it, and mappings above a threshold that rises.

After malloc/malloc.c of glibc 2.36, main arena. Best fit stands for its bins (large bins are sorted; unsorted chunks are sorted
into them before they are split), neighbours merge, the top is trimmed, the thresholds move. What a trace cannot show are the
many small objects around the tensors (nodes of the graph, shapes, references). They settle in the slivers that are cut off
before and behind each aligned block, and while one is there, the hole that the block leaves is too small for the next block of
the same size. So slivers stay taken for a while, the more of them the more tensors wait for the backward pass.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable

from delest.footprint.allocators.mapped import PAGE, aligned_request, chunk_bytes, mapping_bytes

TOP_PAD = 128 << 10
HIGHEST_THRESHOLD = 32 << 20  # DEFAULT_MMAP_THRESHOLD_MAX
FIRST_THRESHOLD = 968_000  # after importing torch, found by asking malloc for ever larger blocks until one was mapped
TRIMMING = 64 << 10  # FASTBIN_CONSOLIDATION_THRESHOLD: freeing less never trims
ALIGNMENT = 64
SMALLEST_CHUNK = 32
SMALL = 1024  # smaller blocks are served from lists of their own and fit into holes anywhere
# Slivers taken by what hangs on a tensor that is kept, and by what comes and goes (the thread's cache has 7 chunks of a size).
# Set on traces of 16 small trainings, of which 14 then came within 13 % of the resident set (the others: 18 % low, 20 % high).
SLIVERS_PER_KEPT = 2.5
PASSING_SLIVERS = 8


class Glibc:
    """The resident part of the heap and the mappings. The heap starts `misalignment` bytes past a multiple of 64; chance sets
    it in a real process, and small changes send later blocks to other holes."""

    def __init__(self, misalignment: int = 0) -> None:
        self.peak_bytes = 0
        self._base = self._top = self._break = self._touched = ALIGNMENT + misalignment
        self._bins: list[tuple[int, int, int]] = []  # (bytes, order of freeing, start) of free chunks, smallest first
        self._free: dict[int, tuple[int, int]] = {}  # start of a free chunk: bytes and order
        self._ends: dict[int, int] = {}  # end of a free chunk: its start
        self._used: dict[int, int] = {}  # start of a used chunk: bytes
        self._mappings: dict[int, int] = {}
        self._small: dict[int, int] = {}
        self._kept: set[int] = set()
        self._taken: deque[tuple[int, int]] = deque()  # slivers that belong to kept blocks, oldest first
        self._passing: deque[tuple[int, int]] = deque()  # and others
        self._threshold = FIRST_THRESHOLD
        self._apart = self._order = self._handle = 0  # bytes outside the heap; counters

    @classmethod
    def starting(cls, misalignment: int) -> Callable[[], Glibc]:
        """A maker of heaps that begin there."""
        return lambda: cls(misalignment)

    @property
    def held_bytes(self) -> int:
        return self._apart + self._touched - self._base

    def allocate(self, size: int, *, kept: bool = False) -> int:
        """A handle of a new block of `size` bytes; `kept` ones wait for a later part of the step."""
        handle = self._aligned(size) if size >= SMALL else self._outside(self._small, chunk_bytes(size))
        if kept:
            self._kept.add(handle)
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        return handle

    def free(self, handle: int) -> None:
        """Give a block back; its handle is then void."""
        self._kept.discard(handle)
        while len(self._taken) > SLIVERS_PER_KEPT * len(self._kept):
            self._merge(*self._taken.popleft())
        if handle in self._small:
            self._apart -= self._small.pop(handle)
        elif handle in self._mappings:
            size = self._mappings.pop(handle)
            self._apart -= size
            if self._threshold < size <= HIGHEST_THRESHOLD:
                self._threshold = size
        elif self._merge(handle, self._used.pop(handle)) >= TRIMMING:
            self._trim()

    # Allocating

    def _outside(self, group: dict[int, int], size: int) -> int:
        self._handle -= 1  # negative: never the start of a chunk in the heap
        group[self._handle] = size
        self._apart += size
        return self._handle

    def _aligned(self, size: int) -> int:
        """A block whose data, 16 bytes behind its start, lie on a multiple of 64; slivers before and behind are cut off."""
        wanted, chunk = chunk_bytes(size), chunk_bytes(aligned_request(size))
        found = self._from_bins(chunk) or self._from_top(chunk)
        if found is None:
            return self._outside(self._mappings, mapping_bytes(chunk))
        start, taken = found
        before = -(start + 16) % ALIGNMENT
        if before:
            before += ALIGNMENT if before < SMALLEST_CHUNK else 0
            self._cut_off(start, before)
            start, taken = start + before, taken - before
        if taken > wanted + SMALLEST_CHUNK:
            self._cut_off(start + wanted, taken - wanted)
            taken = wanted
        self._used[start] = taken
        return start

    def _from_bins(self, chunk: int) -> tuple[int, int] | None:
        """Start and bytes of the smallest free chunk that fits, its rest left free."""
        place = bisect_left(self._bins, (chunk,))
        if place == len(self._bins):
            return None
        size, _, start = self._bins.pop(place)
        del self._free[start], self._ends[start + size]
        if size - chunk < SMALLEST_CHUNK:
            return start, size
        self._put(start + chunk, size - chunk)
        return start, chunk

    def _from_top(self, chunk: int) -> tuple[int, int] | None:
        """Start and bytes of a chunk at the heap's top, which grows for it; None where it is to be mapped."""
        if self._break - self._top < chunk + SMALLEST_CHUNK:
            if chunk >= self._threshold:
                return None
            self._break = (self._top + chunk + TOP_PAD + SMALLEST_CHUNK + PAGE - 1) & ~(PAGE - 1)
        start, self._top = self._top, self._top + chunk
        self._touched = max(self._touched, self._top)
        return start, chunk

    # Freeing

    def _cut_off(self, start: int, size: int) -> None:
        """Free a sliver, which small objects take first."""
        if len(self._taken) < SLIVERS_PER_KEPT * len(self._kept):
            self._taken.append((start, size))
            return
        self._passing.append((start, size))
        if len(self._passing) > PASSING_SLIVERS:
            self._merge(*self._passing.popleft())

    def _merge(self, start: int, size: int) -> int:
        """Join a freed chunk with free neighbours or the top; bytes of the whole."""
        if (before := self._ends.get(start)) is not None:
            size, start = size + self._take(before), before
        if start + size in self._free:
            size += self._take(start + size)
        if start + size == self._top:
            self._top = start
            return self._break - start
        self._put(start, size)
        return size

    def _put(self, start: int, size: int) -> None:
        self._order += 1
        self._free[start], self._ends[start + size] = (size, self._order), start
        insort(self._bins, (size, self._order, start))

    def _take(self, start: int) -> int:
        size, order = self._free.pop(start)
        del self._ends[start + size]
        self._bins.pop(bisect_left(self._bins, (size, order, start)))
        return size

    def _trim(self) -> None:
        """Give the top back where it is larger than twice the threshold (malloc/malloc.c, systrim)."""
        rest = self._break - self._top
        if rest >= 2 * self._threshold:
            self._break -= (rest - SMALLEST_CHUNK - 1 - TOP_PAD) & ~(PAGE - 1)
            self._touched = min(self._touched, self._break)
