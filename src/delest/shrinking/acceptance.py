"""The rule by which a smaller form of a model ships: inside the accuracy bound, and smaller or faster as measured here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from delest.shrinking.confidence import rows_needed

if TYPE_CHECKING:
    from delest.records.shrunk import Candidate

_LEAST_GAIN = 0.05  # of file size or latency


def judge(candidate: Candidate, plain: Candidate, max_drop: float) -> tuple[bool, str]:
    """Whether `candidate` ships instead of `plain`, and the reason in words."""
    loss = _loss(candidate, max_drop)
    if loss is not None:
        return False, loss
    gains = _gains(candidate, plain)
    if not gains:
        return False, (
            f"it is neither {_LEAST_GAIN:.0%} smaller nor, beyond the spread of the measurements, {_LEAST_GAIN:.0%} faster "
            f"at batch {' or '.join(map(str, plain.latency_seconds))}"
        )
    return True, "; ".join(gains + _costs(candidate, plain))


def _loss(candidate: Candidate, max_drop: float) -> str | None:
    """Why the accuracy is not proven to be kept, None where it is."""
    bound = candidate.bound
    if bound is None:
        return "nothing says how accurate it is: that takes selection rows and a metric of the model's outputs"
    needed = rows_needed(bound, max_drop)
    if needed is None:
        return f"it loses {bound.drop:.4g} on average and up to {bound.upper:.4g} with 95 % confidence, {max_drop:g} is allowed"
    if bound.rows < needed:
        seen = "no row differs" if bound.disagreeing == 0 else f"it loses up to {bound.upper:.4g} with 95 % confidence"
        return (
            f"{seen} on {bound.rows:,} rows, {max_drop:g} is allowed: that is too few rows to prove it; "
            f"about {needed:,} selection rows of this kind would"
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
