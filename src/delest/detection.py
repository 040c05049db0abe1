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
        import numpy as np

        return self.counted(state)(np.ones(len(state), np.int64))

    def counted(self, state: list[tuple[Detections, Any]]) -> Callable[[Any], float]:
        """The score where each row counts so many times, int [N]; rows are matched once."""
        curves = [self._match(state, k) for k in sorted({int(k) for _, target in state for k in target[:, 4] if k >= 0})]

        def score(counts: Any) -> float:
            found = [_average_precision(counts, *curve) for curve in curves if counts @ curve[-1]]
            return sum(found) / len(found) if found else float("nan")

        return score

    def _match(self, state: list[tuple[Detections, Any]], kind: int) -> tuple[Any, Any, Any]:
        """Row and rightness of each detection of a class, best scores first, and each row's boxes of that class [N]."""
        import numpy as np

        scores, rows, right, boxes_of = [], [], [], np.zeros(len(state), np.int64)
        for row, ((boxes, confidences, classes), target) in enumerate(state):
            truth = target[target[:, 4] == kind, :4]
            boxes_of[row] = len(truth)
            taken: set[int] = set()
            mine = np.flatnonzero(classes == kind)
            for i in mine[np.argsort(-confidences[mine], kind="stable")]:
                overlaps = overlap(boxes[i], truth)
                best = int(overlaps.argmax()) if len(truth) else -1
                hit = best >= 0 and overlaps[best] >= self.iou and best not in taken
                taken |= {best} if hit else set()
                scores.append(confidences[i])
                rows.append(row)
                right.append(hit)
        order = np.argsort(-np.array(scores), kind="stable")
        return np.array(rows, dtype=np.int64)[order], np.array(right, dtype=float)[order], boxes_of


def _average_precision(counts: Any, rows: Any, right: Any, boxes_of: Any) -> float:
    """Area under the curve of one class. Of a detection that counts several times the right ones could stand in any order: precision
    rises within them, and made monotone it is that of the last."""
    import numpy as np

    weights = counts[rows]
    found, seen = np.cumsum(weights * right), np.cumsum(weights)
    precision = np.maximum.accumulate((found / np.maximum(seen, 1))[::-1])[::-1]
    return float((np.diff(found / (counts @ boxes_of), prepend=0.0) * precision).sum())


def overlap(box: Any, others: Any) -> Any:
    """Intersection over union [N] of a box [4] with others [N, 4], each x1, y1, x2, y2."""
    import numpy as np

    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    shared = np.clip(sides, 0, None).prod(-1)
    union = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(-1) - shared
    return shared / np.maximum(union, 1e-9)
