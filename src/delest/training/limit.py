"""The limit that a budget of memory sets to this process: an allocation beyond it fails, in place of a process that is killed.

It is the soft RLIMIT_DATA, which counts address space; what is budgeted is what is resident. A thread follows both.
"""

from __future__ import annotations

import contextlib
import gc
import math
import mmap
import os
import resource
import threading
from collections.abc import Iterator

from delest import errors, malloc
from delest.hardware.machine import Gauge, data_and_resident_bytes, give_back_unused, share_one_heap
from delest.units import format_bytes

USUAL_STACK_BYTES = 8 << 20  # of a thread, where its size has no limit: glibc takes 2, and libraries up to this
MARGIN_BYTES = 16 << 20  # pages of libraries that are touched later: resident, but no data that the limit counts
LEAST_SECONDS, MOST_SECONDS = 0.01, 0.25  # between two looks of the thread
# No faster does address space come into use, since the kernel clears each page first: 4 GB/s a core were measured.
TOUCHED_BYTES_PER_SECOND = (4 << 30) * len(os.sched_getaffinity(0))


@contextlib.contextmanager
def held(budget_bytes: int | None) -> Iterator[Limit | None]:
    """Hold this process's resident bytes within a budget while the context is open; None holds nothing. One that is open already
    goes on, and is given."""
    if budget_bytes is None:
        yield None
    elif _open:
        yield _open[-1]
    else:
        _open.append(Limit(budget_bytes))
        try:
            with _open[-1].running():
                yield _open[-1]
        finally:
            _open.clear()


def only_watch() -> None:
    """Let the open budget be held by watching alone from here on: for libraries that do not survive an allocation that fails."""
    if _open:
        _open[-1].only_watch()


def is_held() -> bool:
    """Whether a budget is held now, so that allocations may fail for it."""
    return bool(_open)


@contextlib.contextmanager
def reported(doing: str) -> Iterator[None]:
    """Turn memory that ran out outside steps into `NothingFits` where a budget is held; `doing` says in words when."""
    try:
        yield
    except (MemoryError, errors.OutOfMemory) as error:
        if not _open:
            raise
        budget = _open[-1].budget_bytes
        raise too_small(budget, max(_open[-1].highest_bytes, budget), f"memory ran out while {doing} ({error})") from None


def has_room_for_threads() -> bool:
    """Whether the limit on data leaves a new thread its stack, and the threads of parallel operators that it starts theirs: OpenMP ends the process where it does not."""
    stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
    each = USUAL_STACK_BYTES if stack == resource.RLIM_INFINITY else stack
    try:
        mmap.mmap(
            -1, each * (1 + len(os.sched_getaffinity(0))) + MARGIN_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        ).close()
    except OSError:
        return False
    return True


class Limit:
    """The thread, and the limit on data: what may be resident still, above the least difference between data and resident
    memory that was seen, since the rest of that difference may be touched."""

    def __init__(self, budget_bytes: int):
        self.budget_bytes, self.highest_bytes = budget_bytes, 0
        self._gauge: Gauge
        self._done, self._lock = threading.Lock(), threading.Lock()  # the first is held while watched
        self._peak_bytes: int | None = None  # since the process began
        self._near_bytes, self._wait = 0, LEAST_SECONDS  # the highest since the limit began anew; seconds until the next look
        self._limit: int | None = None  # None: not set
        self._stacks_bytes = 0  # address space of threads that were started meanwhile
        self._off = self._only_watched = False

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Watch and limit while the context is open."""
        before = resource.getrlimit(resource.RLIMIT_DATA)
        thread = threading.Thread(target=self._run, name="memory-guard", daemon=True)
        share_one_heap()
        self._gauge = Gauge()
        self._done.acquire()
        with self.lifted():
            thread.start()
        self.begin_anew(widen=True)
        try:
            yield
        finally:
            self._done.release()
            thread.join()
            self._gauge.close()
            self._set(None if before[0] == resource.RLIM_INFINITY else before[0] + self._stacks_bytes)

    def only_watch(self) -> None:
        """Set no limit any more."""
        with self._lock:
            self._only_watched = True
            self._set(None)

    def begin_anew(self, *, widen: bool = False) -> None:
        """Free what can be freed. With `widen` the limit is set for what is resident then, else it stays as tight as it was: what
        is given back here comes into use again without being asked for, and so does what is free in the heap."""
        gc.collect()
        if not widen:
            self._read(widen=False)
        give_back_unused()
        if widen:
            self._read(widen=True, unasked_bytes=malloc.free_bytes())
        self.highest_bytes, self._near_bytes, self._wait = 0, 0, LEAST_SECONDS

    def resident_bytes(self) -> int:
        """What is resident now, which counts for the highest."""
        resident = self._gauge.resident_bytes()
        self.highest_bytes = max(self.highest_bytes, resident)
        return resident

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        """Without the limit, which is as much wider afterwards as address space was taken meanwhile: for stacks of threads, of which
        hardly any is touched."""
        with self._lock:
            sizes, limit = data_and_resident_bytes(), self._limit
            self._set(None)
            try:
                yield
            finally:
                after = data_and_resident_bytes()
                grown = max(0, after[0] - sizes[0]) if sizes and after else 0
                self._stacks_bytes += grown
                if limit is not None:
                    self._set(limit + grown)

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """Without the limit, though watched, and with a new one afterwards: for child processes, which inherit it, and for libraries that
        take address space as they please and do not survive where they get none. Raises `NothingFits` where the budget was exceeded."""
        with self._lock:
            self._off, self.highest_bytes = True, 0
            self._set(None)
        try:
            yield
        finally:
            highest = max(self.highest_bytes, self._read(widen=False))
            self._off = False
            self.begin_anew(widen=True)
        if highest > self.budget_bytes:
            raise too_small(self.budget_bytes, highest, f"{format_bytes(highest)} were in use once the data were opened")

    def _run(self) -> None:
        """What rose and fell between two looks is told by the kernel's own peak, where it is a new one."""
        while not self._done.acquire(timeout=self._wait):
            highest = self._read(widen=False)
            self.highest_bytes, self._near_bytes = max(self.highest_bytes, highest), max(self._near_bytes, highest)
            self._wait = next_wait(self._wait, self.budget_bytes - self._near_bytes)

    def _read(self, *, widen: bool, unasked_bytes: int = 0) -> int:
        """The most that was resident since the last reading, as far as is known; the limit follows what is resident now, and leaves room for
        what comes into use again unasked."""
        with self._lock:
            resident, peak, data = self._gauge.sizes()
            if data is not None:  # else a system that does not count data: watched only
                limit = max(0, data + self.budget_bytes - MARGIN_BYTES - resident - unasked_bytes)
                if not (self._off or self._only_watched) and (widen or self._limit is None or limit < self._limit):
                    self._set(limit)
            before, self._peak_bytes = self._peak_bytes, peak
            return peak if peak is not None and before is not None and peak > before else resident

    def _set(self, limit: int | None) -> None:
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        self._limit = limit
        within = limit is not None and (hard == resource.RLIM_INFINITY or limit < hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit if within and limit is not None else hard, hard))


def next_wait(last_seconds: float, free_bytes: int) -> float:
    """Seconds until the thread looks again: before memory that comes into use without being asked for can fill half of what is free in
    the budget, and at most twice the last."""
    return max(LEAST_SECONDS, min(2 * last_seconds, free_bytes / 2 / TOUCHED_BYTES_PER_SECOND, MOST_SECONDS))


def too_small(budget_bytes: int, highest_bytes: int, why: str, more: str = "", option: str = "--memory ") -> errors.NothingFits:
    """The error that names the smallest budget, as well as one failure tells it: some more than was in use. `option` is how one is
    asked for."""
    smallest = int((highest_bytes + MARGIN_BYTES) * BACK_AND_FORTH)
    return errors.NothingFits(
        f"{format_bytes(budget_bytes)} are not enough: {why}. As far as can be told it takes {option}"
        f"{math.ceil(smallest / 2**20)}MiB or more, in a new run, or a smaller model.{more}",
        smallest,
    )


BACK_AND_FORTH = 1.05  # of the smallest budget that is named: a process that asks again is a little larger
_open: list[Limit] = []  # the one limit of this process
