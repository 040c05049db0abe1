"""glibc's own malloc at work on the blocks of a trace, in a process that does nothing else and imports nothing of delest.

    python -I -S heap_process.py SEED < requests > held

Both are int64 numbers in the machine's order. A request is four: what, and three numbers. An answer is two for each operator: the bytes
held before it asks for anything, and the most while it runs. Blocks are never written to, so that they take no memory here,
whatever their size.

Between its blocks a training asks for small objects without end: nodes of the graph, tensors, what a library notes of a kernel.
They settle in what is cut off around aligned blocks and in the holes that blocks leave, which are then too small for the next
block of that size. Without them a replay holds a tenth less than a training does, at worst three tenths. Their sizes, and how long they
stay, are those of every request that was recorded in trainings of thirty networks (the tuning cases of benchmarks/zoo.json).
"""

from __future__ import annotations

import ctypes
import mmap
import random
import sys
from collections.abc import Iterable

BEGIN, BLOCK, SCRATCH, KEPT, END, FREE, STEP = range(7)
# BEGIN an operator | BLOCK number, bytes, of which so many are never written | SCRATCH pieces, bytes in all, of the operator at work
# KEPT bytes of a library's own, for good | END of an operator, 1 where it leaves a node of the graph | FREE number | STEP: the graph of the one before is gone

ALIGNMENT = 64  # of tensors and of what oneDNN keeps
FIRST_THRESHOLD = 968_000  # of blocks that are mapped: what importing torch leaves it at
LARGE = 4096  # smaller blocks alone do not move the heap's end by much: it is not asked for

# Bytes of small objects, as often as they were seen; negative ones are aligned.
PASSING = (
    *(24,) * 10, *(64,) * 7, *(104,) * 6, *(8,) * 5, *(176,) * 4, *(96,) * 2, *(32,) * 2, *(512,) * 2, *(48,) * 2, 312, -8, -4, 16, -768,
)  # fmt: skip
PASSING_AT_ONCE = 8  # of an operator, freed before it asks for its block
OPEN = (*(176,) * 4, *(24,) * 4, *(64,) * 3, *(312,) * 2, *(104,) * 2, *(8,) * 2, *(96,) * 2, 512, 48, -4)
OPEN_AT_ONCE, OPEN_OPERATORS = 2, 3  # of an operator, freed some operators later
BESIDE_BLOCK = (176, 96, 24)  # a tensor and its storage: freed with the block
NODE = (488, 16, 16, 24, 32, 24)  # of the graph
# 300 to 400 come with a convolution, three tenths of them aligned. With all of them replays held 2 to 14 % less than with these.
BESIDE_SCRATCH = (24, 32, 8, 64, 104, 32, 184, -824, 40, 24, 336, 520, -32, 64, 104)
BESIDE_SCRATCH_AT_ONCE, TIMES = 9, 3  # for each piece
OPEN_BESIDE_SCRATCH = (24, 64, 104, 184, 8, -768)


class Heap:
    """The main arena of this process from where it ends now, and the mappings made since."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None)
        self._malloc, self._memalign, self._free, self._sbrk = libc.malloc, libc.memalign, libc.free, libc.sbrk
        self._malloc.argtypes, self._memalign.argtypes = [ctypes.c_size_t], [ctypes.c_size_t] * 2
        self._free.argtypes, self._sbrk.argtypes = [ctypes.c_void_p], [ctypes.c_ssize_t]
        for function in (self._malloc, self._memalign, self._sbrk):
            function.restype = ctypes.c_void_p
        self._free(self._malloc(FIRST_THRESHOLD))
        libc.malloc_trim(0)
        self._start = self._used = self._sbrk(0)
        self._mapped = 0
        self._refused: dict[int, int] = {}  # bytes of blocks that the system would not give, which count as mappings

    @property
    def held_bytes(self) -> int:
        return self._sbrk(0) - self._start + self._mapped

    def block(self, size: int) -> int:
        pointer = self._memalign(ALIGNMENT, size)
        if not pointer:
            pointer = -1 - len(self._refused)
            self._refused[pointer] = size
        if size >= LARGE:
            self._mapped += self.mapping(pointer)
        return pointer

    def free(self, pointer: int) -> None:
        self._mapped -= self.mapping(pointer)
        if pointer > 0:
            self._free(pointer)

    def mapping(self, pointer: int) -> int:
        """Bytes of the mapping that a block is, 0 for one in the heap (malloc/malloc.c: IS_MMAPPED is a chunk's second bit)."""
        if pointer < 0:
            return self._refused[pointer]
        size = ctypes.c_size_t.from_address(pointer - 8).value
        return size & ~7 if size & 2 else 0

    def new_share(self, pointer: int, size: int, unwritten: int) -> int:
        """Of a block's bytes that nobody writes, those that no other block has held before: they take no memory."""
        if self.mapping(pointer):
            return unwritten
        new = max(0, min(size, pointer + size - self._used))
        self._used = max(self._used, pointer + size)
        return unwritten * new // size if size else 0

    def small(self, sizes: tuple[int, ...]) -> list[int]:
        return [self._malloc(size) if size > 0 else self._memalign(ALIGNMENT, -size) for size in sizes]

    def drop(self, pointers: Iterable[int]) -> None:
        for pointer in pointers:
            self._free(pointer)


def numbers(count: int) -> memoryview:
    """So many int64 zeros outside malloc: what this process notes must not lie in the heap that it looks at."""
    return memoryview(mmap.mmap(-1, max(8, 8 * count))).cast("q")


def play(requests: memoryview, seed: int) -> memoryview:
    """Answers to all requests. Blocks are numbered from 0 in order of their requests."""
    count = len(requests) // 4
    answers, pointers, spared_bytes = numbers(2 * count), numbers(count), numbers(count)
    beside, nodes = numbers(count * len(BESIDE_BLOCK)), numbers(4 * count * len(NODE))
    chance = random.Random(seed)
    passing, open_, beside_scratch = (
        [tuple(chance.sample(sizes, count)) for _ in range(257)]
        for sizes, count in (
            (PASSING, PASSING_AT_ONCE),
            (OPEN, OPEN_AT_ONCE),
            (BESIDE_SCRATCH, BESIDE_SCRATCH_AT_ONCE),
        )
    )
    heap = Heap()
    scratch: list[int] = []
    opened: list[list[int]] = [[] for _ in range(OPEN_OPERATORS)]
    operators = pieces = node_count = unwritten = highest = 0
    width = len(BESIDE_BLOCK)
    for at in range(0, 4 * count, 4):
        what, number, size, spared = requests[at], requests[at + 1], requests[at + 2], requests[at + 3]
        if what == BEGIN:
            highest = heap.held_bytes - unwritten
            answers[2 * operators] = highest
            heap.drop(heap.small(passing[operators % len(passing)]))
            opened[-1] += heap.small(open_[operators % len(open_)])
        elif what == BLOCK:
            pointer = heap.block(size)
            spared = heap.new_share(pointer, size, spared)
            unwritten += spared
            pointers[number], spared_bytes[number] = pointer, spared
            for i, each in enumerate(heap.small(BESIDE_BLOCK)):
                beside[width * number + i] = each
            if size >= LARGE:
                highest = max(highest, heap.held_bytes - unwritten)
        elif what == SCRATCH:
            for _ in range(number):
                scratch.append(heap.block(size // number))
                opened[-1] += heap.small(OPEN_BESIDE_SCRATCH)
                for _ in range(TIMES):
                    pieces += 1
                    heap.drop(heap.small(beside_scratch[pieces % len(beside_scratch)]))
            highest = max(highest, heap.held_bytes - unwritten)
        elif what == KEPT:
            heap.small((number,))
        elif what == FREE:
            unwritten -= spared_bytes[number]
            heap.free(pointers[number])
            heap.drop(beside[width * number : width * (number + 1)])
        elif what == END:
            for pointer in scratch:
                heap.free(pointer)
            scratch.clear()
            for each in heap.small(NODE * number):
                nodes[node_count] = each
                node_count += 1
            opened.append([])
            heap.drop(opened.pop(0))
            answers[2 * operators + 1] = max(highest, heap.held_bytes - unwritten)
            operators += 1
        elif what == STEP:
            heap.drop(nodes[:node_count])
            node_count = 0
    return answers[: 2 * operators]


def main() -> None:
    requests = mmap.mmap(sys.stdin.fileno(), 0, access=mmap.ACCESS_READ)
    sys.stdout.buffer.write(play(memoryview(requests).cast("q"), int(sys.argv[1])))


if __name__ == "__main__":
    main()
