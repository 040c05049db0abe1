"""Time of calls that compete, measured side by side."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping


def time_alternating(
    calls: Mapping[str, Callable[[], object]], *, seconds: float = 2.0, warmups: int = 3, least_rounds: int = 7
) -> dict[str, tuple[float, float, float]]:
    """Median, lower and upper quartile of each call in seconds, by name.

    The calls take turns, so that a machine that slows down slows all of them; every round starts with another one, so that none
    always runs in the wake of the same neighbour. Warm-up calls are not counted and the garbage collector rests. `seconds` is for all calls
    together; `least_rounds` are made however long they take.
    """
    for call in calls.values():
        for _ in range(warmups):
            call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        rounds = 0
        while rounds < least_rounds or time.perf_counter() < end:
            turn = rounds % len(names)
            for name in names[turn:] + names[:turn]:
                begin = time.perf_counter()
                calls[name]()
                taken[name].append(time.perf_counter() - begin)
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return {name: _middle(values) for name, values in taken.items()}


def _middle(values: list[float]) -> tuple[float, float, float]:
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return median, lower, upper
