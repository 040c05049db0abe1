"""Named metrics in NumPy.

Every metric accumulates: `state = init()`, `state = update(state, outputs, targets)`, `compute(state)`. Where a metric
is a mean over rows, `rows(outputs, targets)` gives the value of each row [B]: those are what paired confidence bounds
are computed from. Outputs are [B, K] scores (logits or probabilities) for classes, [B] values for numbers; targets are
int [B] or float [B].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from delest import errors

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Metric(Protocol):
    """What a metric of the user's own must offer; `rows` is None where the metric is no mean over rows.

    It may also have `counted(state)`: a function from how often each row counts, int [N], to the score. Confidence bounds of a metric
    that is no mean over rows then take each row in once, not once a resample.
    """

    @property
    def name(self) -> str: ...
    @property
    def higher_is_better(self) -> bool: ...
    @property
    def rows(self) -> Callable[[Any, Any], NDArray] | None: ...

    def init(self) -> Any: ...
    def update(self, state: Any, outputs: Any, targets: Any) -> Any: ...
    def compute(self, state: Any) -> float: ...


@dataclass(frozen=True)
class RowMean:
    """A metric that is a mean over rows, with a last step (the root of RMSE)."""

    name: str
    higher_is_better: bool
    rows: Callable[[Any, Any], NDArray]
    finish: Callable[[float], float] = float

    def init(self) -> tuple[float, int]:
        return 0.0, 0

    def update(self, state: tuple[float, int], outputs: Any, targets: Any) -> tuple[float, int]:
        values = self.rows(outputs, targets)
        return state[0] + float(values.sum()), state[1] + len(values)

    def compute(self, state: tuple[float, int]) -> float:
        return self.finish(state[0] / state[1]) if state[1] else float("nan")


@dataclass(frozen=True)
class Collected:
    """A metric of all rows together (AUC, R2)."""

    name: str
    higher_is_better: bool
    whole: Callable[[Any, Any], float]
    rows: None = None

    def init(self) -> list[tuple[Any, Any]]:
        return []

    def update(self, state: list[tuple[Any, Any]], outputs: Any, targets: Any) -> list[tuple[Any, Any]]:
        state.append((outputs, targets))
        return state

    def compute(self, state: list[tuple[Any, Any]]) -> float:
        import numpy as np

        if not state:
            return float("nan")
        outputs, targets = zip(*state, strict=True)
        return self.whole(np.concatenate(outputs), np.concatenate(targets))


def _is_single(outputs: Any) -> bool:
    """Whether outputs are [B] or [B, 1]: the logit of class 1 of two."""
    return outputs.ndim == 1 or outputs.shape[-1] == 1


def _classes(outputs: Any) -> NDArray:
    """Chosen class of each row."""
    import numpy as np

    outputs = np.asarray(outputs)
    return (outputs.reshape(-1) > 0).astype(np.int64) if _is_single(outputs) else outputs.argmax(-1)


def _correct(outputs: Any, targets: Any) -> NDArray:
    return (_classes(outputs) == targets).astype(float)


def _top5(outputs: Any, targets: Any) -> NDArray:
    import numpy as np

    if _is_single(outputs):  # two classes, both among the best five
        return np.ones(len(outputs))
    best = np.argsort(-outputs, axis=-1)[:, :5]
    return (best == np.asarray(targets)[:, None]).any(-1).astype(float)


def _squared(outputs: Any, targets: Any) -> NDArray:
    import numpy as np

    return (np.asarray(outputs, dtype=np.float64).reshape(-1) - targets) ** 2


def _absolute(outputs: Any, targets: Any) -> NDArray:
    import numpy as np

    return abs(np.asarray(outputs, dtype=np.float64).reshape(-1) - targets)


def _r2(outputs: Any, targets: Any) -> float:
    import numpy as np

    targets = np.asarray(targets, dtype=np.float64)  # float32 loses the spread of values far from zero
    total = float(((targets - targets.mean()) ** 2).sum())
    return 1.0 - float(_squared(outputs, targets).sum()) / total if total else float("nan")


def _auc(outputs: Any, targets: Any) -> float:
    """Area under the ROC curve of two classes: the chance that a row of class 1 scores above one of class 0.

    Raises `BadInput` for more than two classes.
    """
    import numpy as np

    if not _is_single(outputs) and outputs.shape[-1] > 2:
        raise errors.BadInput(f"auc judges two classes, the model gives {outputs.shape[-1]}: use another metric, as f1.")
    scores = outputs.reshape(-1) if _is_single(outputs) else outputs[:, 1] - outputs[:, 0]
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # ties share their mean rank
    positive = int((targets == 1).sum())
    negative = len(targets) - positive
    if not positive or not negative:
        return float("nan")
    return float((ranks[targets == 1].sum() - positive * (positive + 1) / 2) / (positive * negative))


def _balanced(outputs: Any, targets: Any) -> float:
    """Mean of the accuracies of the classes that occur."""
    correct = _correct(outputs, targets)
    return float(sum(correct[targets == k].mean() for k in set(targets.tolist())) / len(set(targets.tolist())))


def _f1(outputs: Any, targets: Any) -> float:
    """Mean of the F1 scores of the classes that occur."""
    chosen = _classes(outputs)
    scores = []
    for k in sorted(set(targets.tolist())):
        both = int(((chosen == k) & (targets == k)).sum())
        scores.append(2 * both / (int((chosen == k).sum()) + int((targets == k).sum())))
    return sum(scores) / len(scores)


_METRICS: tuple[Any, ...] = (
    RowMean("accuracy", True, _correct),
    RowMean("top5_accuracy", True, _top5),
    RowMean("mse", False, _squared),
    RowMean("rmse", False, _squared, lambda value: value**0.5),
    RowMean("mae", False, _absolute),
    Collected("r2", True, _r2),
    Collected("auc", True, _auc),
    Collected("balanced_accuracy", True, _balanced),
    Collected("f1", True, _f1),
)
NAMES = tuple(metric.name for metric in _METRICS)
OF_NUMBERS = ("mse", "rmse", "mae", "r2")  # all others judge classes


@dataclass(frozen=True)
class LossMetric:
    """The mean loss as the score, for jobs whose `step` gives a loss and nothing to judge, and for texts.

    `by_row`: each row has a loss of its own, and an exported model gives it too, so that it can be judged by rows.
    """

    name: str = "loss"
    higher_is_better: bool = False
    rows: None = None
    by_row: bool = False

    def init(self) -> None:
        return None

    def update(self, state: None, outputs: Any, targets: Any) -> None:
        return None

    def compute(self, state: None) -> float:
        return float("nan")


def named(name: str) -> Metric:
    """A metric by name; raises `KeyError` for one that is not in `NAMES`."""
    return next(metric for metric in _METRICS if metric.name == name) if name in NAMES else _missing(name)


def chosen(metric: Any, target_kind: str | None, judged: bool = True) -> Metric:
    """The metric of a job: its own, or for "auto" accuracy (classes), rmse (numbers), the loss for texts and where nothing is judged."""
    if not isinstance(metric, str):
        return metric
    if metric not in ("auto", "loss"):
        return named(metric)
    if metric == "loss" or not judged or target_kind in (None, "tokens", "array"):
        return LossMetric(by_row=judged and target_kind == "tokens")
    return named("accuracy" if target_kind == "class" else "rmse")


def _missing(name: str) -> Metric:
    raise KeyError(name)
