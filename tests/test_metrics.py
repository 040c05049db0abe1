from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

from delest import errors, metrics

LOGITS = np.array([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0], [0.5, 0.0, 0.4], [0.0, 0.0, 9.0]], np.float32)  # chosen: 0, 1, 0, 2
LABELS = np.array([0, 1, 2, 2])
OF_CLASSES = [name for name in metrics.NAMES if name not in metrics.OF_NUMBERS]


def score(name: str, outputs, targets) -> float:
    metric = metrics.named(name)
    return metric.compute(metric.update(metric.init(), np.asarray(outputs), np.asarray(targets)))


def rows(name: str, outputs, targets) -> np.ndarray:
    judge = metrics.named(name).rows
    assert judge is not None
    return judge(outputs, targets)


# Values worked out by hand


def test_accuracy():
    assert score("accuracy", LOGITS, LABELS) == 0.75
    assert rows("accuracy", LOGITS, LABELS).tolist() == [1, 1, 0, 1]


def test_top5_accuracy():
    outputs = -np.abs(np.arange(8)[None] - np.array([[0], [7], [3]]))  # nearest class first
    assert rows("top5_accuracy", outputs, np.array([4, 2, 7])).tolist() == [1, 0, 0]
    assert score("top5_accuracy", LOGITS, LABELS) == 1.0  # three classes are all among the best five


def test_errors_of_numbers():
    outputs, targets = [[1.0], [2.0], [6.0], [4.0]], [1.0, 4.0, 3.0, 4.0]  # differences 0, -2, 3, 0
    assert score("mse", outputs, targets) == 13 / 4
    assert score("rmse", outputs, targets) == pytest.approx(math.sqrt(13 / 4))
    assert score("mae", outputs, targets) == 5 / 4
    assert score("r2", outputs, targets) == pytest.approx(1 - 13 / 6)  # the targets' squared deviations: 4 + 1 + 0 + 1
    assert rows("mae", np.array(outputs), np.array(targets)).tolist() == [0, 2, 3, 0]


def test_r2_of_a_perfect_and_of_a_constant_answer():
    targets = np.array([1.0, 2.0, 6.0])
    assert score("r2", targets, targets) == 1.0
    assert score("r2", np.full(3, 3.0), targets) == 0.0
    assert math.isnan(score("r2", targets, np.ones(3)))  # nothing to explain


def test_r2_of_float32_targets_far_from_zero():
    targets = (1e6 + np.arange(1000) % 5).astype(np.float32)
    outputs = targets + np.float32(1)
    assert score("r2", outputs, targets) == pytest.approx(1 - 1 / 2)  # the variance of 0 .. 4 is 2


def test_balanced_accuracy():
    # Class 0: 1 of 1 right, class 1: 1 of 1, class 2: 1 of 2.
    assert score("balanced_accuracy", LOGITS, LABELS) == pytest.approx((1 + 1 + 0.5) / 3)


def test_balanced_accuracy_counts_a_rare_class_as_much_as_a_frequent_one():
    outputs = np.tile([1.0, 0.0], (100, 1))  # always class 0
    targets = np.r_[np.zeros(99, int), 1]
    assert score("accuracy", outputs, targets) == 0.99
    assert score("balanced_accuracy", outputs, targets) == 0.5


def test_f1():
    # Class 0: precision 1/2, recall 1, F1 2/3; class 1: 1; class 2: precision 1, recall 1/2, F1 2/3.
    assert score("f1", LOGITS, LABELS) == pytest.approx((2 / 3 + 1 + 2 / 3) / 3)


def test_f1_of_a_class_that_is_never_right_is_zero():
    assert score("f1", np.array([[1.0, 0.0], [0.0, 1.0]]), [1, 0]) == 0.0


def test_f1_leaves_out_a_class_that_does_not_occur():
    assert score("f1", LOGITS[:2], [0, 1]) == 1.0
    # Class 0: precision 1, recall 1/2; the class 1 that was chosen instead occurs nowhere.
    assert score("f1", LOGITS[:2], [0, 0]) == pytest.approx(2 / 3)


def test_auc():
    assert score("auc", [0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]) == 0.75
    assert score("auc", [1.0, 2.0, 3.0], [0, 1, 1]) == 1.0
    assert score("auc", [3.0, 2.0, 1.0], [0, 1, 1]) == 0.0
    assert score("auc", [5.0, 5.0, 5.0], [0, 1, 1]) == 0.5  # all tied
    assert math.isnan(score("auc", [1.0, 2.0], [1, 1]))  # one class only


def test_auc_of_more_than_two_classes_is_refused():
    with pytest.raises(errors.BadInput, match="auc judges two classes, the model gives 3"):
        score("auc", LOGITS, LABELS)


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40))
def test_auc_is_the_share_of_pairs_in_the_right_order(pairs):
    outputs, targets = np.array([float(value) for value, _ in pairs]), np.array([int(label) for _, label in pairs])
    wins = [(p > n) + 0.5 * (p == n) for p in outputs[targets == 1] for n in outputs[targets == 0]]
    found = score("auc", outputs, targets)
    assert found == pytest.approx(sum(wins) / len(wins)) if wins else math.isnan(found)


@given(st.lists(st.tuples(st.lists(st.floats(-5, 5), min_size=4, max_size=4), st.integers(0, 3)), min_size=1, max_size=30))
def test_scores_of_classes_agree_with_a_confusion_matrix(pairs):
    outputs, targets = np.array([values for values, _ in pairs]), np.array([label for _, label in pairs])
    confusion = np.zeros((4, 4))
    np.add.at(confusion, (targets, outputs.argmax(1)), 1)
    occurs = confusion.sum(1) > 0
    right, true, chosen = confusion.diagonal()[occurs], confusion.sum(1)[occurs], confusion.sum(0)[occurs]
    recall = right / true
    precision = np.divide(right, chosen, out=np.zeros_like(right), where=chosen > 0)
    both = recall + precision
    assert score("balanced_accuracy", outputs, targets) == pytest.approx(recall.mean())
    expected = np.divide(2 * recall * precision, both, out=np.zeros_like(both), where=both > 0).mean()
    assert score("f1", outputs, targets) == pytest.approx(expected)


# What holds for all


def example(name: str, count: int = 37):
    random = np.random.default_rng(5)
    if name in metrics.OF_NUMBERS:
        return random.normal(size=(count, 1)), random.normal(size=count)
    classes = 2 if name == "auc" else 7
    return random.normal(size=(count, classes)).round(1), random.integers(0, classes, count)


@pytest.mark.parametrize("name", metrics.NAMES)
def test_updates_in_pieces_equal_one_of_the_whole(name):
    outputs, targets = example(name)
    metric = metrics.named(name)
    state = metric.init()
    for start, stop in ((0, 1), (1, 1), (1, 20), (20, 37)):  # the second is an empty batch
        state = metric.update(state, outputs[start:stop], targets[start:stop])
    assert metric.compute(state) == pytest.approx(score(name, outputs, targets), rel=1e-12)


@pytest.mark.parametrize("name", [name for name in metrics.NAMES if metrics.named(name).rows is not None])
def test_the_mean_of_rows_is_the_score(name):
    outputs, targets = example(name)
    values = rows(name, outputs, targets)
    assert values.shape == (37,)
    mean = values.mean()
    assert score(name, outputs, targets) == pytest.approx(math.sqrt(mean) if name == "rmse" else mean)


@pytest.mark.parametrize("name", metrics.NAMES)
def test_two_states_do_not_share_anything(name):
    outputs, targets = example(name)
    metric = metrics.named(name)
    metric.update(metric.init(), outputs[:5], targets[:5])
    assert metric.compute(metric.update(metric.init(), outputs, targets)) == score(name, outputs, targets)


@pytest.mark.parametrize("name", metrics.NAMES)
def test_no_rows_have_no_score(name):
    metric = metrics.named(name)
    assert math.isnan(metric.compute(metric.init()))


@pytest.mark.parametrize("name", metrics.NAMES)
def test_better_outputs_score_better(name):
    metric = metrics.named(name)
    if name in metrics.OF_NUMBERS:
        targets = np.arange(6.0)
        good, bad = targets[:, None], targets[::-1, None]
    else:
        targets = np.arange(6) % 2 if name == "auc" else np.arange(6)
        good = np.eye(2 if name == "auc" else 7)[targets]
        bad = -good
    difference = score(name, good, targets) - score(name, bad, targets)
    assert difference > 0 if metric.higher_is_better else difference < 0


@pytest.mark.parametrize("name", OF_CLASSES)
@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_a_single_logit_judges_like_the_two_of_its_classes(name, shape):
    random = np.random.default_rng(1)
    logit, targets = random.normal(size=50), random.integers(0, 2, 50)
    both = np.stack([np.zeros(50), logit], 1)
    assert score(name, logit.reshape(shape), targets) == pytest.approx(score(name, both, targets))


@pytest.mark.parametrize("name", OF_CLASSES)
def test_probabilities_judge_like_their_logits(name):
    outputs, targets = example(name)
    outputs = outputs + np.random.default_rng(6).normal(size=outputs.shape)  # no ties, which rounding would break
    powers = np.exp(outputs)
    assert score(name, powers / powers.sum(1, keepdims=True), targets) == pytest.approx(score(name, outputs, targets))


@pytest.mark.parametrize("name", metrics.OF_NUMBERS)
def test_numbers_may_be_flat_or_a_column(name):
    outputs, targets = example(name)
    assert score(name, outputs[:, 0], targets) == score(name, outputs, targets)


# Choosing


def test_a_metric_is_chosen_by_what_is_predicted():
    assert metrics.chosen("auto", "class").name == "accuracy"
    assert metrics.chosen("auto", "number").name == "rmse"
    assert metrics.chosen("f1", "class").name == "f1"
    own = metrics.Collected("own", True, lambda outputs, targets: 1.0)
    assert metrics.chosen(own, "class") is own


@pytest.mark.parametrize(("kind", "judged"), [("class", False), (None, True)])
def test_where_nothing_is_judged_the_loss_is_the_score(kind, judged):
    metric = metrics.chosen("auto", kind, judged)
    assert (metric.name, metric.higher_is_better, metric.rows) == ("loss", False, None)
    assert math.isnan(metric.compute(metric.update(metric.init(), LOGITS, LABELS)))


def test_an_unknown_name_is_a_key_error():
    with pytest.raises(KeyError):
        metrics.named("acuracy")
