"""Whether an exported model answers like the trained one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from delest.bundle import Model
    from delest.data import Preprocessing

LIMIT = 1e-3  # of probabilities or standardised values; different kernels round differently, by 1e-6 to 1e-4


def largest_difference(session: Any, model: Model, feed: Any, *, rows: int = 512) -> float:
    """Largest absolute difference between a bundle and the session it was exported from, on the first `rows` of a feed.

    Of probabilities for classes, of standardised values for numbers, else of outputs as they are; where those exceed 1, relative to the
    largest. NaN on one side only is infinite.
    """
    head, largest, seen = model.description["head"], 0.0, 0
    for trained, raw in zip(feed.ordered(), feed.raw(), strict=True):
        expected = _expected(session.predict(trained.inputs), head)
        answers = _answers(model.predict(raw.inputs), head, model.preprocessing)
        for ours, theirs in zip(expected, answers, strict=True):
            with np.errstate(invalid="ignore"):
                difference = np.abs(ours.astype(np.float64) - theirs) / max(1.0, float(np.nanmax(np.abs(ours), initial=0.0)))
            largest = max(
                largest, float(np.where(np.isnan(ours) & np.isnan(theirs), 0.0, np.nan_to_num(difference, nan=np.inf)).max())
            )
        seen += trained.count
        if seen >= rows:
            break
    return largest


def _expected(outputs: Any, head: str) -> list[NDArray]:
    """What the bundle should answer, from the network's outputs."""
    if head == "softmax":
        scores = np.exp(outputs - outputs.max(-1, keepdims=True), dtype=np.float64)
        return [scores / scores.sum(-1, keepdims=True)]
    if head == "sigmoid":
        second = 1 / (1 + np.exp(-outputs.reshape(-1, 1).astype(np.float64)))
        return [np.concatenate([1 - second, second], axis=1)]
    return [outputs.reshape(-1)] if head == "value" else _parts(outputs)


def _answers(answers: Any, head: str, preprocessing: Preprocessing) -> list[NDArray]:
    if head == "value":
        return [(answers.astype(np.float64) - preprocessing.target_mean) / preprocessing.target_std]
    return _parts(answers)


def _parts(outputs: Any) -> list[NDArray]:
    """Arrays of nested outputs, in the order in which an export gives them."""
    if isinstance(outputs, np.ndarray):
        return [outputs]
    nested = outputs.values() if isinstance(outputs, Mapping) else outputs
    return [array for part in nested for array in _parts(part)]
