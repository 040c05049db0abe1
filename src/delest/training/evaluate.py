"""Evaluation of anything that has `outputs(feed)`: a session, or an exported bundle."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from delest.metrics import Metric


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a predictor scored on one split."""

    score: float  # of the metric; the mean loss where the metric is the loss
    loss: float
    rows: NDArray | None  # [N] metric value of each row, in the order of `index`; None where it is no mean over rows
    index: NDArray  # [N] row numbers in the source
    outputs: NDArray | None  # [N, ...] as the metric saw them
    targets: NDArray | None

    def metrics(self, metric: Metric) -> dict[str, float]:
        """By name, as `run.json` has them."""
        found = {"loss": self.score} if metric.name == "loss" else {metric.name: self.score}
        return found if math.isnan(self.loss) else {**found, "loss": self.loss}


def evaluate(predictor: Any, feed: Any, metric: Metric, *, stop: Callable[[], None] = lambda: None) -> Evaluation:
    """Score a predictor on all rows of a feed. `stop` is called after each batch and may raise to end it.

    Number outputs are taken back to the target's units (`feed.preprocessing.restore`) before the metric sees them.
    """
    state = metric.init()
    losses, indices, rows, outputs, targets = [], [], [], [], []
    for batch in predictor.outputs(feed):
        losses.append(batch.losses)
        indices.append(batch.index)
        if metric.name != "loss" and batch.outputs is not None and batch.targets is not None:
            restored = feed.preprocessing.restore(batch.outputs)
            truth = feed.preprocessing.restore(batch.targets)
            state = metric.update(state, restored, truth)
            outputs.append(restored)
            targets.append(truth)
            if metric.rows is not None:
                rows.append(metric.rows(restored, truth))
        stop()
    if getattr(metric, "by_row", False):
        rows = losses
    loss = float(np.concatenate(losses).mean()) if losses else float("nan")
    return Evaluation(
        score=loss if metric.name == "loss" else float(metric.compute(state)),
        loss=loss,
        rows=np.concatenate(rows) if rows else None,
        index=np.concatenate(indices) if indices else np.empty(0, np.int64),
        outputs=np.concatenate(outputs) if outputs and isinstance(outputs[0], np.ndarray) else None,
        targets=np.concatenate(targets) if targets and isinstance(targets[0], np.ndarray) else None,
    )
