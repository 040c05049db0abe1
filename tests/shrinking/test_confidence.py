import math
import warnings

import numpy as np
import pytest

from delest import metrics
from delest.shrinking.confidence import bound_drop, paired_bound, resampled_bound, rows_needed
from delest.training.evaluate import Evaluation


def evaluation(metric, outputs, targets):
    rows = None if metric.rows is None else metric.rows(outputs, targets)
    score = metric.compute(metric.update(metric.init(), outputs, targets))
    return Evaluation(score=score, loss=0.0, rows=rows, index=np.arange(len(targets)), outputs=outputs, targets=targets)


def test_the_bound_is_the_closed_form():
    reference = np.array([1.0, 1, 1, 0, 1, 1, 0, 1])
    candidate = np.array([1.0, 0, 1, 0, 1, 1, 1, 0])
    difference = np.array([0, 1, 0, 0, 0, 0, -1, 1])
    bound = paired_bound(reference, candidate, True)
    assert bound.drop == difference.mean() == 0.125
    assert bound.upper == pytest.approx(0.125 + 1.645 * math.sqrt(difference.var(ddof=1) / 8))
    assert (bound.rows, bound.disagreeing) == (8, 3 / 8)


def test_the_sign_turns_where_lower_is_better():
    bound = paired_bound(np.array([1.0, 2, 3]), np.array([2.0, 3, 4]), False)
    assert (bound.drop, bound.upper) == (1.0, 1.0)


def test_equal_rows_have_no_drop():
    bound = paired_bound(np.ones(50), np.ones(50), True)
    assert (bound.drop, bound.upper, bound.disagreeing) == (0.0, 0.0, 0.0)


def test_one_row_proves_nothing():
    assert paired_bound(np.ones(1), np.zeros(1), True).upper == math.inf


def test_resampling_agrees_with_the_closed_form_for_a_mean():
    random = np.random.default_rng(0)
    targets = random.integers(0, 2, 2000)
    right = random.random(2000) < 0.9
    worse = right & (random.random(2000) < 0.95)
    scores = [np.eye(2)[np.where(good, targets, 1 - targets)] for good in (right, worse)]
    accuracy = metrics.named("accuracy")
    reference, candidate = (evaluation(accuracy, each, targets) for each in scores)
    closed, resampled = bound_drop(accuracy, reference, candidate), resampled_bound(accuracy, reference, candidate)
    assert closed == paired_bound(reference.rows, candidate.rows, True)
    assert resampled.drop == pytest.approx(closed.drop)
    assert resampled.upper == pytest.approx(closed.upper, rel=0.1)
    assert resampled.disagreeing == closed.disagreeing
    assert resampled == resampled_bound(accuracy, reference, candidate)  # seeded


def test_rmse_is_bounded_in_its_own_unit():
    random = np.random.default_rng(0)
    targets = random.normal(size=1000) * 100
    rmse = metrics.named("rmse")
    reference = evaluation(rmse, targets + random.normal(size=1000) * 10, targets)
    candidate = evaluation(rmse, targets + random.normal(size=1000) * 11, targets)
    bound = bound_drop(rmse, reference, candidate)
    assert bound.drop == pytest.approx(candidate.score - reference.score)
    assert bound.drop < bound.upper < bound.drop + 1  # squared errors would be in the hundreds


def test_auc_is_resampled_whole():
    random = np.random.default_rng(0)
    targets = random.integers(0, 2, 400)
    auc = metrics.named("auc")
    reference = evaluation(auc, targets + random.normal(size=400), targets)
    candidate = evaluation(auc, targets + 2 * random.normal(size=400), targets)
    bound = bound_drop(auc, reference, candidate)
    assert bound.drop == pytest.approx(reference.score - candidate.score)
    assert bound.drop < bound.upper < bound.drop + 0.1


def test_a_loss_alone_judges_nothing():
    metric = metrics.LossMetric()
    judged = evaluation(metric, np.ones((4, 2)), np.ones(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bound_drop(metric, judged, judged) is None


def test_rows_needed_prove_the_drop():
    random = np.random.default_rng(0)
    reference = np.ones(400)
    candidate = (random.random(400) > 0.01).astype(float)
    bound = paired_bound(reference, candidate, True)
    assert bound.drop < 0.02 < bound.upper + 0.01
    needed = rows_needed(bound, bound.drop + 0.002)
    spread = (bound.upper - bound.drop) * math.sqrt(400)
    assert spread / math.sqrt(needed) <= 0.002 < spread / math.sqrt(needed - 1)
    assert rows_needed(bound, bound.upper) == 400
    assert rows_needed(bound, bound.drop) is None


def test_no_disagreement_on_few_rows_proves_nothing():
    bound = paired_bound(np.ones(20), np.ones(20), True)
    assert rows_needed(bound, 0.005) == 600  # 0.995**600 is 5 %
    assert rows_needed(bound, 0.0) is None


def test_few_rows_that_are_worse_are_bounded_exactly():
    """One of 150 is seen in one case of twenty where 3.12 % are worse (Clopper and Pearson); the normal distribution would say 1.8 %."""
    answers = np.ones(150)
    answers[7] = 0
    assert paired_bound(np.ones(150), answers, True).upper == pytest.approx(0.0312, abs=1e-4)
    errors = 1 - answers
    assert paired_bound(np.zeros(150), errors, False).upper == pytest.approx(0.0312, abs=1e-4)
    before = np.ones(150)
    before[:2] = 0  # two that were wrong are right now
    assert paired_bound(before, answers, True).upper == pytest.approx(0.0312 - 2 / 150, abs=1e-4)


def test_a_metric_that_counts_rows_takes_each_in_once():
    class Mean:
        name, higher_is_better, rows, updates = "mean", True, None, 0

        def init(self):
            return []

        def update(self, state, outputs, targets):
            self.updates += 1
            return [*state, *(outputs[:, 0, 0] == targets)]

        def compute(self, state):
            return np.mean(state)

        def counted(self, state):
            return lambda counts: np.average(state, weights=counts)

    random = np.random.default_rng(0)
    targets = np.ones(300)
    outputs = [(random.random((300, 1, 1)) < share).astype(float) for share in (0.9, 0.8)]
    metric = Mean()
    reference, candidate = (evaluation(metric, each, targets) for each in outputs)
    metric.updates = 0
    bound = bound_drop(metric, reference, candidate)
    assert metric.updates == 2
    plain = type("Plain", (Mean,), {"counted": None})()
    assert bound == resampled_bound(plain, reference, candidate)
    assert bound.drop < bound.upper < bound.drop + 0.1
