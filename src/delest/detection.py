"""Mean average precision of detectors, in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Detections = tuple[Any, Any, Any]  # boxes [N, 4] as x1, y1, x2, y2; scores [N]; classes int [N]


@dataclass(frozen=True)
class MeanAveragePrecision:
    """Mean over the classes that occur of the area under precision (made monotone) against recall.

    `decode` turns a batch of raw outputs into the detections of each row, doubles already suppressed. Targets are
    [B, M, 5]: x1, y1, x2, y2 in the unit of the detections, and the class; rows are padded with class -1.
    A detection is right if its IoU with its best box of its class is at least `iou` and no better one took that box
    (Everingham et al. 2010, with the area under the whole curve).
    """

    decode: Callable[[Any], list[Detections]]
    iou: float = 0.5
    name: str = "map"
    higher_is_better: bool = True
    rows: None = None

    def init(self) -> list[tuple[Detections, Any]]:
        return []

    def update(self, state: list[tuple[Detections, Any]], outputs: Any, targets: Any) -> list[tuple[Detections, Any]]:
        state.extend(zip(self.decode(outputs), targets, strict=True))
        return state

    def compute(self, state: list[tuple[Detections, Any]]) -> float:
        kinds = {int(k) for _, target in state for k in target[:, 4] if k >= 0}
        return sum(self._average_precision(state, k) for k in kinds) / len(kinds) if kinds else float("nan")

    def _average_precision(self, state: list[tuple[Detections, Any]], kind: int) -> float:
        import numpy as np

        scores, right, total = [], [], 0
        for (boxes, confidences, classes), target in state:
            truth = target[target[:, 4] == kind, :4]
            total += len(truth)
            taken: set[int] = set()
            mine = np.flatnonzero(classes == kind)
            for i in mine[np.argsort(-confidences[mine], kind="stable")]:
                overlaps = overlap(boxes[i], truth)
                best = int(overlaps.argmax()) if len(truth) else -1
                hit = best >= 0 and overlaps[best] >= self.iou and best not in taken
                taken |= {best} if hit else set()
                scores.append(confidences[i])
                right.append(hit)
        found = np.cumsum(np.array(right, dtype=float)[np.argsort(-np.array(scores), kind="stable")])
        precision = np.maximum.accumulate((found / np.arange(1, len(found) + 1))[::-1])[::-1]
        return float((np.diff(found / total, prepend=0.0) * precision).sum())


def overlap(box: Any, others: Any) -> Any:
    """Intersection over union [N] of a box [4] with others [N, 4], each x1, y1, x2, y2."""
    import numpy as np

    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    shared = np.clip(sides, 0, None).prod(-1)
    union = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(-1) - shared
    return shared / np.maximum(union, 1e-9)
