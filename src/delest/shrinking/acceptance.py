"""The rule by which a smaller form of a model ships: inside the accuracy bound, and smaller or faster as measured here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from delest.shrinking.confidence import rows_needed
from delest.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from delest.records.shrunk import Bound, Candidate

_LEAST_GAIN = 0.05  # of file size or latency


def judge(candidate: Candidate, plain: Candidate, max_drop: float) -> tuple[bool, str]:
    """Whether `candidate` ships instead of `plain`, and the reason in words."""
    loss = loses(candidate.bound, max_drop)
    if loss is not None:
        return False, loss
    gains = _gains(candidate, plain)
    if not gains:
        return False, (
            f"it is neither {_LEAST_GAIN:.0%} smaller nor, beyond the spread of the measurements, {_LEAST_GAIN:.0%} faster "
            f"at batch {' or '.join(map(str, plain.latency_seconds))}"
        )
    return True, "; ".join(gains + _costs(candidate, plain))


def loses(bound: Bound | None, max_drop: float) -> str | None:
    """Why the accuracy is not proven to be kept, None where it is."""
    if bound is None:
        return "nothing says how accurate it is: that takes selection rows and a metric of the model's outputs"
    needed = rows_needed(bound, max_drop)
    if needed is None:
        return f"it loses {bound.drop:.4g} on average and up to {bound.upper:.4g} with 95 % confidence, {max_drop:g} is allowed"
    if bound.rows < needed:
        seen = "no row differs" if bound.disagreeing == 0 else f"it loses up to {bound.upper:.4g} with 95 % confidence"
        return (
            f"{seen} on {bound.rows:,} rows, {max_drop:g} is allowed: that is too few rows to prove it; "
            f"about {needed:,} such rows would"
        )
    return None


def _gains(candidate: Candidate, plain: Candidate) -> list[str]:
    gains = []
    if candidate.file_bytes and plain.file_bytes and candidate.file_bytes <= (1 - _LEAST_GAIN) * plain.file_bytes:
        gains.append(f"file {plain.file_bytes / candidate.file_bytes:.1f} times smaller")
    for size, seconds in candidate.latency_seconds.items():
        if seconds <= (1 - _LEAST_GAIN) * plain.latency_seconds[size] and _apart(candidate, plain, size):
            gains.append(f"{plain.latency_seconds[size] / seconds:.2f} times faster at batch {size}")
    return gains


def _costs(candidate: Candidate, plain: Candidate) -> list[str]:
    """What got worse, said beside the gains."""
    return [
        f"{seconds / plain.latency_seconds[size]:.2f} times slower at batch {size}"
        for size, seconds in candidate.latency_seconds.items()
        if seconds >= (1 + _LEAST_GAIN) * plain.latency_seconds[size] and _apart(plain, candidate, size)
    ]


def _apart(faster: Candidate, slower: Candidate, size: int) -> bool:
    """Whether three quarters of one's calls took less time than three quarters of the other's."""
    return faster.latency_spread[size][1] < slower.latency_spread[size][0]


def slowness(candidate: Candidate, beside: Candidate | None = None) -> float:
    """Seconds of an answer, the geometric mean over the measured batch sizes; those of `beside` where the measurements do not tell the two apart."""
    seconds = [
        beside.latency_seconds[size] if beside is not None and not _differ(candidate, beside, size) else value
        for size, value in candidate.latency_seconds.items()
    ]
    return math.exp(sum(math.log(max(1e-9, value)) for value in seconds) / len(seconds)) if seconds else math.inf


def _differ(one: Candidate, other: Candidate, size: int) -> bool:
    return _apart(one, other, size) or _apart(other, one, size)


def best_of(
    candidates: Sequence[Candidate], plain: Candidate, wish: Wish
) -> tuple[Candidate, Candidate, Candidate, str | None]:
    """What ships, the fastest and the smallest of `candidates` (all may ship, `plain` is one), and what of the wish is not met (None: all is).

    What ships has the smallest product of size and seconds, both against the plain form, among those that meet the wish; of those that are within `_LEAST_GAIN` of
    it the one that loses least, and then the smallest. Seconds that the measurements do not tell apart are equal: chance decides nothing but what is on
    the edge of the wish. Of those that are as fast as the fastest the smallest counts, and then the one that loses least.
    """

    def product(one: Candidate, beside: Candidate | None = None) -> float:
        return _bytes(one) / _bytes(plain) * slowness(one, beside) / slowness(plain)

    def drop(one: Candidate) -> float:
        return 0.0 if one.bound is None else one.bound.drop

    first, small = min(candidates, key=slowness), min(candidates, key=_bytes)
    equals = [one for one in candidates if slowness(one, first) <= slowness(first)]
    fast = min(equals, key=lambda one: (_bytes(one), drop(one)))
    meeting = [one for one in candidates if wish.excess(one) <= 1]
    if meeting:
        best = min(meeting, key=product)
        near = [one for one in meeting if product(one, best) <= (1 + _LEAST_GAIN) * product(best)]
        return min(near, key=lambda one: (drop(one), _bytes(one))), fast, small, None
    nearest = min(candidates, key=wish.excess)
    return nearest, fast, small, wish.words(nearest)


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What an artefact should be at most."""

    latency_seconds: float | None = None  # of one row
    size_bytes: int | None = None

    def excess(self, candidate: Candidate) -> float:
        """How many times too slow or too large it is, whichever is more; at most 1 where it meets the wish."""
        found = [0.0]
        if self.latency_seconds is not None:
            found.append(candidate.latency_seconds[min(candidate.latency_seconds)] / self.latency_seconds)
        if self.size_bytes is not None:
            found.append(_bytes(candidate) / self.size_bytes)
        return max(found)

    def words(self, nearest: Candidate) -> str:
        wished = [] if self.latency_seconds is None else [f"answers in {format_seconds(self.latency_seconds)}"]
        wished += [] if self.size_bytes is None else [f"takes {format_bytes(self.size_bytes)}"]
        seconds = nearest.latency_seconds[min(nearest.latency_seconds)]
        return (
            f"no form within the accuracy bound {' and '.join(wished)}: the nearest is {nearest.name}, which takes {format_bytes(_bytes(nearest))} and "
            f"{format_seconds(seconds)} for one row. It is kept as what ships. Give more time with --time, a larger --max-drop, or another target."
        )


def _bytes(candidate: Candidate) -> int:
    return candidate.file_bytes or candidate.weights_bytes
