"""glibc's own malloc at work on the blocks of a trace, in a process that does nothing else and imports nothing of delest.

    python -I -S heap_process.py SEED < requests > held

Both are int64 numbers in the machine's order. A request is four: what, and three numbers. An answer is two for each operator: the bytes
held before it asks for anything, and the most while it runs. Blocks are never written to, so that they take no memory here,
whatever their size.

Between its blocks a training asks for small objects without end: nodes of the graph, tensors, what a library notes of a kernel.
They settle in what is cut off around aligned blocks and in the holes that blocks leave, which are then too small for the next
block of that size. Without them a replay holds a tenth less than a training does, at worst a third. Their sizes, and how long they
stay, are those of every request that was recorded in trainings of thirty networks (the tuning cases of benchmarks/zoo.json).
"""

from __future__ import annotations

import ctypes
import random
import sys
from array import array

BEGIN, BLOCK, SCRATCH, END, FREE, STEP = range(6)
# BEGIN an operator | BLOCK number, bytes, of which so many are never written | SCRATCH pieces, bytes in all, of the operator at work
# END of an operator, 1 where it leaves a node of the graph | FREE number | STEP: the graph of the one before is gone

ALIGNMENT = 64  # of tensors and of what oneDNN keeps
FIRST_THRESHOLD = 968_000  # of blocks that are mapped: what importing torch leaves it at
LARGE = 4096  # smaller blocks alone do not move the heap's end by much: it is not asked for

# Bytes of small objects; negative ones are aligned.
PASSING = (24, 32, 8, 64, 104, 32, 184, -824, 40, 24, 336, 520, -32, 64, 104)
PASSING_AT_ONCE = 9  # freed before the next block is asked for
OPEN, OPEN_OPERATORS = (24, 64, 104, 184, 8, -768), 3  # freed some operators later
BESIDE_BLOCK = (184, 104, 24)  # a tensor and its storage: freed with the block
NODE = (520, 16, 16, 16, 24, 24, 184, 104, 32, 8)  # of the graph


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

    def drop(self, pointers: list[int]) -> None:
        for pointer in pointers:
            self._free(pointer)


def play(requests: array[int], seed: int) -> array[int]:
    heap, chance = Heap(), random.Random(seed)
    passing = [tuple(chance.sample(PASSING, PASSING_AT_ONCE)) for _ in range(257)]
    blocks: dict[int, tuple[int, list[int], int]] = {}  # pointer, small objects, bytes that take no memory
    scratch: list[int] = []
    opened: list[list[int]] = [[] for _ in range(OPEN_OPERATORS)]
    nodes: list[int] = []
    answers, unwritten, operators, highest = array("q"), 0, 0, 0
    for at in range(0, len(requests), 4):
        what, number, size, spared = requests[at : at + 4]
        if what == BEGIN:
            operators += 1
            highest = heap.held_bytes - unwritten
            answers.append(highest)
            heap.drop(heap.small(passing[operators % len(passing)]))
            opened[-1] += heap.small(OPEN)
        elif what == BLOCK:
            pointer = heap.block(size)
            spared = heap.new_share(pointer, size, spared)
            unwritten += spared
            blocks[number] = pointer, heap.small(BESIDE_BLOCK), spared
            if size >= LARGE:
                highest = max(highest, heap.held_bytes - unwritten)
        elif what == SCRATCH:
            for _ in range(number):
                scratch.append(heap.block(size // number))
                opened[-1] += heap.small(OPEN)
                heap.drop(heap.small(passing[operators % len(passing)]))
            highest = max(highest, heap.held_bytes - unwritten)
        elif what == FREE:
            pointer, beside, spared = blocks.pop(number)
            unwritten -= spared
            heap.free(pointer)
            heap.drop(beside)
        elif what == END:
            for pointer in scratch:
                heap.free(pointer)
            scratch.clear()
            if number:
                nodes += heap.small(NODE)
            opened.append([])
            heap.drop(opened.pop(0))
            answers.append(max(highest, heap.held_bytes - unwritten))
        elif what == STEP:
            heap.drop(nodes)
            nodes.clear()
    return answers


def main() -> None:
    requests = array("q")
    requests.frombytes(sys.stdin.buffer.read())
    sys.stdout.buffer.write(play(requests, int(sys.argv[1])).tobytes())


if __name__ == "__main__":
    main()
