"""What a process under default glibc holds for a trace: its blocks are asked of the real malloc, in processes of their own.

glibc keeps freed blocks in its heap, merges neighbours, maps large blocks and moves the size from which on it does so. All of that
is its own code here, on requests of the right sizes in the right order; `heap_process.py` adds the small objects between them. Which
hole a block finds hangs on chance in a real process too: a few runs with other small objects are made, and the middle one counts.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

from delest import errors
from delest.footprint import heap_process
from delest.footprint.composition import Lives
from delest.footprint.heap_process import BEGIN, BLOCK, END, FREE, SCRATCH, STEP

SEEDS = (0, 1, 2, 3, 4)
# Of one operator's scratch a trace has the sum. oneDNN asks for its blocked operands, weights, outputs and a work space one by one.
SCRATCH_PIECES = {"convolution": 4, "depthwise": 4, "recurrent": 4}
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
    requests = array("q", (number for request in _requests(lives, copies) for number in request)).tobytes()
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(_start(seed)) for seed in seeds]
        for process in processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(requests)
        runs = sorted((_answer(process) for process in processes), key=max)
    run = runs[len(runs) // 2].tolist()
    return run[0:-2:2], run[1:-2:2], run[-1]


def _requests(lives: Lives, copies: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    births, deaths = lives.events()
    for k in range(lives.count):
        if k and lives.step[k] != lives.step[k - 1]:
            yield STEP, 0, 0, 0
        yield from ((FREE, number, 0, 0) for number in deaths[k])
        yield BEGIN, 0, 0, 0
        if lives.scratch[k]:  # first: what a kernel returns is most often copied out of its scratch
            yield SCRATCH, SCRATCH_PIECES.get(lives.kind[k], 1), lives.scratch[k], 0
        for number in births[k]:
            unwritten = lives.unwritten.get(number, 0)
            yield BLOCK, number, lives.sizes[number] + unwritten, unwritten
        yield END, int(lives.makes_node[k]), 0, 0
    rest = set(lives.at_rest())
    yield STEP, 0, 0, 0
    yield from ((FREE, number, 0, 0) for number in deaths[lives.count] if number not in rest)
    yield BEGIN, 0, 0, 0
    yield from ((BLOCK, len(lives.sizes) + i, size, 0) for i, size in enumerate(copies))
    yield END, 0, 0, 0


def _start(seed: int) -> subprocess.Popen[bytes]:
    """A process with the default allocator, whatever this one was started with."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_OTHER_ALLOCATORS)}
    command = [sys.executable, "-I", "-S", str(Path(heap_process.__file__)), str(seed)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment)


def _answer(process: subprocess.Popen[bytes]) -> array[int]:
    assert process.stdout is not None
    assert process.stderr is not None
    held = array("q")
    held.frombytes(process.stdout.read())
    said = process.stderr.read().decode(errors="replace").strip().splitlines()
    if process.wait(_LIMIT_SECONDS) or not held:
        raise errors.ProbeFailed(f"the heap could not be replayed: {said[-1] if said else 'no answer'}", process.returncode)
    return held
