"""glibc's default malloc: a heap that keeps what was freed in it, and mappings above a threshold that rises.

After malloc/malloc.c of glibc 2.36, main arena. Best fit stands for its bins (large bins are sorted; unsorted chunks are sorted
into them before they are split), neighbours merge, the top is trimmed, the thresholds move. What a trace cannot show are the
millions of small objects around the tensors (nodes of the graph, shapes, references). They settle in the slivers that are cut
off before and behind each aligned block, and while one is there, the hole that the block leaves is too small for the next block
of the same size. So slivers stay taken for a while: see `SLIVERS_PER_BLOCK`.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable

from delest.footprint.allocators.mapped import PAGE, aligned_request, chunk_bytes, mapping_bytes

TOP_PAD = 128 << 10
HIGHEST_THRESHOLD = 32 << 20  # DEFAULT_MMAP_THRESHOLD_MAX
FIRST_THRESHOLD = (
    968_000  # importing torch frees a mapping of about that size, which the threshold follows (probed with malloc)
)
ALIGNMENT = 64
SMALLEST_CHUNK = 32
SMALL = 1024  # smaller blocks are served from lists of their own and fit into holes anywhere
# Slivers that are taken, for each block that is live only within a step: objects come and go with the blocks. Streams of malloc
# calls recorded in training 12 small networks fit between 0.7 and 4, most near 2.
SLIVERS_PER_BLOCK = 2.0
LEAST_SLIVERS = 14  # the thread's cache keeps 7 of a size


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
        self._passing: set[int] = set()
        self._slivers: deque[tuple[int, int]] = deque()
        self._threshold = FIRST_THRESHOLD
        self._apart = self._order = self._handle = 0  # bytes outside the heap; counters

    @classmethod
    def starting(cls, misalignment: int) -> Callable[[], Glibc]:
        """A maker of heaps that begin there."""
        return lambda: cls(misalignment)

    @property
    def held_bytes(self) -> int:
        return self._apart + self._touched - self._base

    def allocate(self, size: int, *, lasting: bool = False) -> int:
        """A handle of a new block of `size` bytes; `lasting` ones are kept from step to step."""
        if size < SMALL:
            handle = self._outside(self._small, chunk_bytes(size))
        else:
            handle = self._aligned(size)
        if size >= SMALL and not lasting:
            self._passing.add(handle)
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        return handle

    def free(self, handle: int) -> None:
        """Give a block back; its handle is then void."""
        self._passing.discard(handle)
        if handle in self._small:
            self._apart -= self._small.pop(handle)
        elif handle in self._mappings:
            size = self._mappings.pop(handle)
            self._apart -= size
            if self._threshold < size <= HIGHEST_THRESHOLD:
                self._threshold = size
        else:
            if self._merge(handle, self._used.pop(handle)) >= 64 << 10:
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
        """Free a sliver, which small objects take until as many newer ones are there as they need."""
        self._slivers.append((start, size))
        while len(self._slivers) > max(LEAST_SLIVERS, SLIVERS_PER_BLOCK * len(self._passing)):
            self._merge(*self._slivers.popleft())

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
