"""Which range of each activation the 256 levels of uint8 should span, from rows that are sent through the float network.

`min_max` spans every value seen. One outlier then widens the levels of all others, so two more clip: `percentile` cuts the
outermost 0.01 % of values, `entropy` clips where the distribution of values before and after quantisation differ least by
Kullback-Leibler divergence (Migacz, "8-bit Inference with TensorRT", GTC 2017). Which of them does best depends on the network
(Wu et al., arXiv 2004.09602, compare all three).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto

from delest import errors

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from onnx import ModelProto

    Batches = Iterable[Mapping[str, NDArray]]
    Ranges = dict[str, tuple[float, float]]

_PERCENTILE = 99.99
_LEVELS = 256
_BINS = 32 * _LEVELS  # so that what is left of a range clipped to a 32nd still has a bin for each level
_CANDIDATES = 64  # ranges among which the entropy chooses
_SAMPLE = 1 << 18  # values of one activation that are counted of what goes through the network at once
_PIECE_BYTES = 1 << 28  # of activations that are held at once


def open_session(model: bytes | str, options: onnxruntime.SessionOptions | None = None) -> onnxruntime.InferenceSession:
    """ONNX Runtime on the CPU, with its warnings off."""
    options = options or onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class Activations:
    """Float tensors inside a network, read while batches go through it."""

    def __init__(self, model: ModelProto, tensors: Sequence[str]):
        weights = {weight.name for weight in model.graph.initializer}
        inputs = [value for value in model.graph.input if value.name not in weights]
        given = {value.name for value in inputs}
        self._given = [name for name in tensors if name in given]
        self._computed = [name for name in tensors if name not in given]
        self._dynamic = all(_is_dynamic(value) for value in inputs)
        augmented = onnx.ModelProto()
        augmented.CopyFrom(model)
        known = {value.name for value in model.graph.output}
        augmented.graph.output.extend(
            onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in self._computed if name not in known
        )
        self._session = open_session(augmented.SerializeToString())

    def read(self, batches: Batches) -> Iterator[dict[str, NDArray]]:
        """Values by tensor name of a few rows at a time, so that they stay below 256 MiB where the batch is dynamic."""
        rows = 1
        for batch in batches:
            count = len(next(iter(batch.values())))
            start = 0
            while start < count:
                piece = {name: array[start : start + rows] if self._dynamic else array for name, array in batch.items()}
                values = {name: piece[name] for name in self._given}
                if self._computed:
                    values |= zip(self._computed, self._session.run(self._computed, piece), strict=True)
                yield values
                start += rows if self._dynamic else count
                a_row = sum(array.nbytes for array in values.values()) / len(next(iter(piece.values())))
                rows = max(1, int(_PIECE_BYTES / max(1, a_row)))


def min_max(activations: Activations, batches: Batches) -> Ranges:
    """Least and largest finite value of each activation, by tensor name. Raises `BadInput` where there are no rows."""
    ranges: Ranges = {}
    for values in activations.read(batches):
        for name, array in values.items():
            low, high = _span(array)
            if name in ranges:
                low, high = min(low, ranges[name][0]), max(high, ranges[name][1])
            ranges[name] = low, high
    if not ranges:
        raise errors.BadInput(
            "int8 needs rows to see which values the activations of the network take, and there are none. "
            "Give at least one calibration batch, better a few hundred rows."
        )
    return ranges


def measure_ranges(model: ModelProto, tensors: Sequence[str], batches: Callable[[], Batches]) -> dict[str, Ranges]:
    """Ranges of `tensors` by method (`min_max`, `percentile`, `entropy`). The batches are read twice, so `batches()` must give
    the same ones each time."""
    activations = Activations(model, tensors)
    whole = min_max(activations, batches())
    counts = _count(activations, batches(), whole)
    clipped = {"percentile": _percentile, "entropy": _least_entropy}
    return {
        "min_max": whole,
        **{method: {name: clip(counts[name], *whole[name]) for name in whole} for method, clip in clipped.items()},
    }


def _is_dynamic(value: Any) -> bool:
    shape = value.type.tensor_type.shape.dim
    return len(shape) > 0 and not shape[0].HasField("dim_value")


def _span(array: NDArray) -> tuple[float, float]:
    if not array.size:
        return 0.0, 0.0
    low, high = float(array.min()), float(array.max())
    if not np.isfinite([low, high]).all():
        return _span(array[np.isfinite(array)])
    return low, high


def _count(activations: Activations, batches: Batches, ranges: Ranges) -> dict[str, NDArray]:
    """Histogram of each activation, `_BINS` bins over its range, of values drawn at random where there are many."""
    random = np.random.default_rng(0)
    counts = {name: np.zeros(_BINS, np.int64) for name in ranges}
    for values in activations.read(batches):
        for name, array in values.items():
            sample = array.reshape(-1)
            if sample.size > _SAMPLE:
                sample = sample[random.integers(sample.size, size=_SAMPLE)]
            counts[name] += np.histogram(sample[np.isfinite(sample)], _BINS, ranges[name])[0]
    return counts


def _percentile(counts: NDArray, low: float, high: float) -> tuple[float, float]:
    """The range without the outermost values, half of them on either side."""
    total = counts.sum()
    if not total:
        return low, high
    edges = np.linspace(low, high, _BINS + 1)
    shares = np.cumsum(counts) / total
    cut = (1 - _PERCENTILE / 100) / 2
    first, last = np.searchsorted(shares, cut, side="right"), np.searchsorted(shares, 1 - cut)
    return float(edges[first]), float(edges[last + 1])


def _least_entropy(counts: NDArray, low: float, high: float) -> tuple[float, float]:
    """The range, symmetric around zero as far as there are values, whose quantised distribution tells most of the original one."""
    edges = np.linspace(low, high, _BINS + 1)
    largest = max(abs(low), abs(high))
    counts = counts.astype(np.float64)
    if low <= 0 <= high:  # zero is a level of its own, and after a ReLU it would outweigh all others
        zero = min(int(np.searchsorted(edges, 0, side="right")) - 1, _BINS - 1)
        beside = [counts[place] for place in (zero - 1, zero + 1) if 0 <= place < _BINS]
        counts[zero] = min(counts[zero], max(beside))
    best, least = (low, high), np.inf
    for limit in np.linspace(largest, largest * _LEVELS / _BINS, _CANDIDATES):
        first = int(np.searchsorted(edges, -limit, side="right")) - 1 if low < -limit else 0
        last = int(np.searchsorted(edges, limit)) if high > limit else _BINS
        if last - first < _LEVELS:
            continue
        divergence = _divergence(counts, first, last)
        if divergence < least:
            best, least = (float(edges[first]), float(edges[last])), divergence
    return best


def _divergence(counts: NDArray, first: int, last: int) -> float:
    """Kullback-Leibler divergence of the values clipped to bins `first` to `last` and quantised, from the values clipped alone."""
    kept = counts[first:last]
    clipped = kept.copy()
    clipped[0] += counts[:first].sum()
    clipped[-1] += counts[last:].sum()
    total, kept_total = clipped.sum(), kept.sum()
    if not kept_total:
        return np.inf
    level = np.arange(len(kept)) * _LEVELS // len(kept)
    occupied = kept > 0
    mean = np.bincount(level, kept, _LEVELS) / np.maximum(np.bincount(level, occupied, _LEVELS), 1)
    quantised = np.where(occupied, mean[level], 0) / kept_total
    seen = clipped > 0
    original = clipped[seen] / total
    return float((original * np.log(original / np.maximum(quantised[seen], 1e-9))).sum())
