"""Mean average precision against values worked out by hand."""

import math

import numpy as np
import pytest

from delest.detection import MeanAveragePrecision, overlap

A, B, FAR = [0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60]


def score(detections, targets):
    metric = MeanAveragePrecision(decode=lambda outputs: outputs)
    rows = [
        (np.array([d[0] for d in row], float).reshape(-1, 4), *np.array([d[1:] for d in row]).reshape(-1, 2).T)
        for row in detections
    ]
    return metric.compute(metric.update(metric.init(), rows, np.array(targets, float)))


def test_overlap():
    assert overlap(np.array(A), np.array([A, [5, 0, 15, 10], FAR])) == pytest.approx([1, 1 / 3, 0])


@pytest.mark.parametrize(
    ("detections", "expected"),
    [
        ([(A, 0.9, 0), (B, 0.8, 0)], 1.0),
        ([(A, 0.9, 0)], 0.5),
        ([(FAR, 0.9, 0), (A, 0.8, 0), (B, 0.7, 0)], 2 / 3),  # precisions 0, 1/2, 2/3, made monotone
        ([(A, 0.9, 0), (A, 0.8, 0), (B, 0.7, 0)], 0.5 + 0.5 * 2 / 3),  # the second of one box is wrong
        ([(A, 0.9, 1), (B, 0.8, 1)], 0.0),
        ([], 0.0),
    ],
)
def test_two_boxes_of_one_class(detections, expected):
    assert score([detections], [[[*A, 0], [*B, 0]]]) == pytest.approx(expected)


def test_classes_count_alike_and_padding_does_not_count():
    assert score([[(A, 0.9, 0)]], [[[*A, 0], [*B, 3], [0, 0, 0, 0, -1]]]) == pytest.approx(0.5)
    assert math.isnan(score([[(A, 0.9, 0)]], [[[0, 0, 0, 0, -1]]]))


def test_rows_that_count_several_times_are_like_repeated_rows():
    random = np.random.default_rng(0)
    rows, targets = [], np.full((30, 4, 5), -1.0)
    for row in range(30):
        corners = random.integers(0, 40, (4, 2))
        targets[row, :3] = np.hstack([corners[:3], corners[:3] + 10, random.integers(0, 3, (3, 1))])
        boxes = np.hstack([corners, corners + 10]) + random.integers(-2, 3, (4, 4))
        rows.append((boxes, random.random(4), random.integers(0, 3, 4)))
    metric = MeanAveragePrecision(decode=lambda outputs: outputs)
    counted = metric.counted(metric.update(metric.init(), rows, targets))
    for _ in range(5):
        chosen = random.integers(0, 30, 30)
        repeated = metric.compute(metric.update(metric.init(), [rows[i] for i in chosen], targets[chosen]))
        assert counted(np.bincount(chosen, minlength=30)) == pytest.approx(repeated)
    assert math.isnan(counted(np.zeros(30, int)))
