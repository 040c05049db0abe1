"""What a process under default glibc holds for a trace: its blocks are asked of the real malloc, in processes of their own.

glibc keeps freed blocks in its heap, merges neighbours, maps large blocks and moves the size from which on it does so. All of that
is its own code here, on requests of the right sizes in the right order; `heap_process.py` adds the small objects between them. Which
hole a block finds hangs on chance in a real process too: a few runs with other small objects are made, and their mean counts.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from delest import errors
from delest.footprint import heap_process
from delest.footprint.composition import Lives
from delest.footprint.heap_process import BEGIN, BLOCK, END, FREE, KEPT, SCRATCH, STEP

SEEDS = tuple(range(10))
STEADY, REPEATS = 2, 2  # the step of a trace that is made several times, and how often
# Of one operator's scratch a trace has the sum. oneDNN asks for its blocked operands, weights, outputs and a work space one by one.
SCRATCH_PIECES = {"convolution": 4, "depthwise": 4, "recurrent": 4}
# A convolution leaves more beside the graph than others do, with the batch normalisation that goes with it.
NODES = {"convolution": 4, "depthwise": 4}
# What MKL keeps from the first product on: 0.3 to 5.3 MB in the trainings that were recorded, half of them below this. It lies in the heap for good.
PRODUCT_BUFFER_BYTES = 600_000
_OTHER_ALLOCATORS = ("LD_PRELOAD", "MALLOC_", "GLIBC_TUNABLES")
_LIMIT_SECONDS = 120.0


def is_here() -> bool:
    """Whether this system's malloc is glibc's."""
    return platform.libc_ver()[0] == "glibc"


def hold(lives: Lives, copies: Sequence[int] = (), seeds: Sequence[int] = SEEDS) -> tuple[list[int], list[int], int]:
    """Bytes held before each of the K operators, the most while it runs, and those at rest with `copies` of further blocks.

    Blocks that the system refuses count as mappings. Raises `BadInput` where this system has another malloc.
    """
    if not is_here():
        raise errors.BadInput("the allocator glibc is not this system's: choose mmap or exact.")
    order = _order(lives)
    requests = array("q", (number for request in _requests(lives, order, copies) for number in request)).tobytes()
    run = [sum(held) // len(seeds) for held in zip(*_play(requests, seeds), strict=True)]
    before, most = [0] * lives.count, [0] * lives.count
    for k, at_first, highest in zip(order, run[0:-2:2], run[1:-2:2], strict=True):  # the last time counts
        before[k], most[k] = at_first, highest
    return before, most, run[-1]


def _order(lives: Lives) -> list[int]:
    """The operators as they are played: the steady step several times, in which the heap settles."""
    steady = [k for k, step in enumerate(lives.step) if step == STEADY]
    if not steady or not _successors(lives, steady):
        return list(range(lives.count))
    return [*range(steady[-1] + 1), *(REPEATS - 1) * steady, *range(steady[-1] + 1, lives.count)]


def _successors(lives: Lives, steady: Sequence[int]) -> dict[int, int]:
    """For what the first step leaves and the steady one frees (its gradients), what the steady one leaves in its place; none
    where they do not leave the same."""
    first, last = steady[0], steady[-1]
    there = [i for i, born in enumerate(lives.born) if lives.sizes[i] and born < lives.dies[i]]
    left = [i for i in there if lives.step[lives.born[i]] == STEADY - 1 and first <= lives.dies[i] <= last]
    places: dict[int, list[int]] = {}
    for i in there:
        if first <= lives.born[i] <= last < lives.dies[i]:
            places.setdefault(lives.sizes[i], []).append(i)
    if sorted(lives.sizes[i] for i in left) != sorted(size for size, those in places.items() for _ in those):
        return {}
    return {i: places[lives.sizes[i]].pop(0) for i in left}


def _requests(lives: Lives, order: Sequence[int], copies: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    births, deaths = lives.events()
    successors = _successors(lives, steady) if (steady := [k for k in range(lives.count) if lives.step[k] == STEADY]) else {}
    blocks: dict[int, int] = {}  # of storages that live
    left: dict[int, int] = {}  # of storages that the step before left
    made, seen, multiplied = 0, -1, False  # blocks so far, the operator before, whether there was a product
    for k in order:
        if seen >= 0 and (k < seen or lives.step[k] != lives.step[seen]):
            yield STEP, 0, 0, 0
        if k < seen:
            left = {number: blocks.pop(after) for number, after in successors.items()}
        seen = k
        for number in deaths[k]:
            block = left.pop(number) if number in left else blocks.pop(number, None)
            if block is not None:  # else it went in the first of the repeated steps
                yield FREE, block, 0, 0
        yield BEGIN, 0, 0, 0
        if lives.scratch[k]:  # first: what a kernel returns is most often copied out of its scratch
            yield SCRATCH, SCRATCH_PIECES.get(lives.kind[k], 1), lives.scratch[k], 0
        for number in births[k]:
            unwritten = lives.unwritten.get(number, 0)
            blocks[number] = made
            yield BLOCK, made, lives.sizes[number] + unwritten, unwritten
            made += 1
        if lives.kind[k] == "matmul" and not multiplied:
            multiplied = True
            yield KEPT, PRODUCT_BUFFER_BYTES, 0, 0
        yield END, lives.makes_node[k] * NODES.get(lives.kind[k], 1), 0, 0
    rest = set(lives.at_rest())
    yield STEP, 0, 0, 0
    yield from ((FREE, block, 0, 0) for number, block in blocks.items() if number not in rest)
    yield BEGIN, 0, 0, 0
    yield from ((BLOCK, made + i, size, 0) for i, size in enumerate(copies))
    yield END, 0, 0, 0


def _play(requests: bytes, seeds: Sequence[int]) -> list[array[int]]:
    """What each process answers, with the default allocator whatever this one was started with. None is left running."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_OTHER_ALLOCATORS)}
    command = [sys.executable, "-I", "-S", str(Path(heap_process.__file__))]
    with contextlib.ExitStack() as stack:
        given = stack.enter_context(tempfile.NamedTemporaryFile())
        given.write(requests)
        given.flush()
        processes = []
        for seed in seeds:
            answer, said = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))
            source = stack.enter_context(open(given.name, "rb"))
            process = subprocess.Popen([*command, str(seed)], stdin=source, stdout=answer, stderr=said, env=environment)
            stack.callback(_end, process)
            processes.append((process, answer, said))
        return [_answer(*each) for each in processes]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _answer(process: subprocess.Popen[bytes], answer: IO[bytes], said: IO[bytes]) -> array[int]:
    try:
        status = process.wait(_LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        raise errors.ProbeFailed(f"the heap's replay did not end within {_LIMIT_SECONDS:g} s.") from None
    held = array("q")
    answer.seek(0)
    held.frombytes(answer.read())
    if status or not held:
        said.seek(0)
        lines = said.read().decode(errors="replace").strip().splitlines()
        raise errors.ProbeFailed(f"the heap could not be replayed: {lines[-1] if lines else 'no answer'}", status)
    return held
