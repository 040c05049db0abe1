"""How much worse a candidate may be than the trained model, judged on the same rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from delest.records.shrunk import Bound

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from delest.metrics import Metric
    from delest.training.evaluate import Evaluation

_Z = 1.645  # one-sided 95 % of the normal distribution
_NONE = 3.0  # -ln 5 %: of so many divided by a share, one is seen in 95 % of cases (the rule of three)
_FEW = 20  # rows that are worse, up to which their share is bounded exactly


def paired_bound(reference_rows: NDArray, candidate_rows: NDArray, higher_is_better: bool) -> Bound:
    """One-sided 95 % bound on the drop of a metric that is a mean over rows: drop + 1.645 * sqrt(variance / rows).

    Both are float [N], the metric's value of each row, rows in the same order. Where few rows are worse the normal distribution promises too
    much: the bound is then at least the exact one on their share (Clopper and Pearson, 1934), times the most that a row lost, less what others gained.
    """
    worse = np.asarray(reference_rows, np.float64) - np.asarray(candidate_rows, np.float64)
    if not higher_is_better:
        worse = -worse
    rows = len(worse)
    spread = math.sqrt(worse.var(ddof=1) / rows) if rows > 1 else math.inf
    drop = float(worse.mean())
    lost, gained = worse[worse > 0], worse[worse < 0]
    exact = _largest_share(len(lost), rows) * lost.max() + gained.sum() / rows if 0 < len(lost) <= _FEW else -math.inf
    return Bound(drop=drop, upper=max(drop + _Z * spread, exact), rows=rows, disagreeing=float((worse != 0).mean()))


def _largest_share(count: int, rows: int) -> float:
    """The share of which `count` or fewer are seen among `rows` in one case of twenty."""
    low, high = count / rows, 1.0
    for _ in range(60):
        share = (low + high) / 2
        seen = sum(math.comb(rows, k) * share**k * (1 - share) ** (rows - k) for k in range(count + 1))
        low, high = (share, high) if seen > 0.05 else (low, share)
    return high


def resampled_bound(
    metric: Metric, reference: Evaluation, candidate: Evaluation, *, resamples: int = 1000, seed: int = 0
) -> Bound:
    """The same bound for a metric of all rows together (AUC, F1, RMSE): the 95th percentile of its drop over bootstrap
    resamples of the rows. Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.
    """
    assert reference.outputs is not None
    assert candidate.outputs is not None
    assert reference.targets is not None
    sign = 1.0 if metric.higher_is_better else -1.0
    random = np.random.default_rng(seed)
    rows = len(reference.targets)
    before, after = (_scorer(metric, outputs, reference.targets) for outputs in (reference.outputs, candidate.outputs))
    drops = np.empty(resamples)
    for place in range(resamples):
        chosen = random.integers(0, rows, rows)
        drops[place] = sign * (before(chosen) - after(chosen))
    return Bound(
        drop=sign * (reference.score - candidate.score),
        upper=float(np.nanpercentile(drops, 95)),
        rows=rows,
        disagreeing=float((_answers(reference) != _answers(candidate)).reshape(rows, -1).any(1).mean()),
    )


def _scorer(metric: Metric, outputs: NDArray, targets: NDArray) -> Callable[[NDArray], float]:
    """The score of chosen rows, of which some may be chosen several times."""
    counted = getattr(metric, "counted", None)
    if counted is None:
        return lambda chosen: float(metric.compute(metric.update(metric.init(), outputs[chosen], targets[chosen])))
    score = counted(metric.update(metric.init(), outputs, targets))
    return lambda chosen: float(score(np.bincount(chosen, minlength=len(targets))))


def bound_drop(metric: Metric, reference: Evaluation, candidate: Evaluation) -> Bound | None:
    """The bound that suits the metric; None where nothing was judged (the metric is the loss of the job's own step)."""
    assert np.array_equal(reference.index, candidate.index)
    if reference.rows is not None and candidate.rows is not None and _are_means(reference, candidate):
        return paired_bound(reference.rows, candidate.rows, metric.higher_is_better)
    if metric.name == "loss" or reference.outputs is None or candidate.outputs is None or reference.targets is None:
        return None
    return resampled_bound(metric, reference, candidate)


def rows_needed(bound: Bound, max_drop: float) -> int | None:
    """How many rows would prove that the drop is at most `max_drop`, if they were like those seen; None: no number would.

    Where no row differs, the variance seen is 0 and proves nothing: then as many as would show one differing row in 95 % of cases.
    """
    if bound.disagreeing == 0:
        return math.ceil(_NONE / max_drop) if max_drop > 0 else None
    if bound.drop >= max_drop or not math.isfinite(bound.upper):
        return None
    return max(1, math.ceil(bound.rows * ((bound.upper - bound.drop) / (max_drop - bound.drop)) ** 2))


def _are_means(*evaluations: Evaluation) -> bool:
    """Whether scores are means over rows as they are: RMSE has rows, but takes a root at the end."""
    return all(each.rows is not None and math.isclose(each.score, each.rows.mean()) for each in evaluations)


def _answers(evaluation: Evaluation) -> NDArray:
    """What a row is judged by: the chosen class, the value, or all of a grid."""
    assert evaluation.outputs is not None
    assert evaluation.targets is not None
    outputs = evaluation.outputs
    if outputs.ndim == 2 and outputs.shape[1] > 1:
        return outputs.argmax(1)
    if outputs.ndim > 2:
        return outputs
    flat = outputs.reshape(len(outputs), -1)[:, 0]
    return flat > 0 if evaluation.targets.dtype.kind in "iu" else flat
