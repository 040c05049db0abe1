import numpy as np
import pytest

from delest.bundle import Model
from delest.data import Feed, Preprocessing, open_source
from delest.shrinking.parity import largest_difference


class Answers:
    """A session, or a bundle, that answers with the same rows for any batch."""

    def __init__(self, answers, head="none", preprocessing=None):
        self.answers, self.description, self.preprocessing = answers, {"head": head}, preprocessing

    def predict(self, inputs):
        return self.answers


@pytest.fixture
def feed():
    source = open_source((np.arange(8.0, dtype=np.float32).reshape(4, 2), np.arange(4) / 2))
    return Feed(source, np.arange(4), Preprocessing(schema=source.schema, mean={"x": (0, 0)}, std={"x": (1, 1)}), batch_size=4)


def test_classes_are_compared_as_probabilities(feed):
    logits = np.array([[0.0, np.log(3)]] * 4)
    assert largest_difference(Answers(logits), Answers(np.array([[0.25, 0.75]] * 4), "softmax"), feed) == pytest.approx(
        0, abs=1e-12
    )
    assert largest_difference(Answers(logits), Answers(np.array([[0.3, 0.7]] * 4), "softmax"), feed) == pytest.approx(0.05)
    single = np.full((4, 1), np.log(3))
    assert largest_difference(Answers(single), Answers(np.array([[0.25, 0.75]] * 4), "sigmoid"), feed) == pytest.approx(
        0, abs=1e-12
    )


def test_numbers_are_compared_standardised(feed):
    preprocessing = Preprocessing(schema=feed.source.schema, target_mean=1000.0, target_std=100.0)
    given = Answers(np.array([1000.0, 1100, 900, 1001]), "value", preprocessing)
    assert largest_difference(Answers(np.array([[0.0], [1], [-1], [0]])), given, feed) == pytest.approx(0.01)


def test_other_outputs_are_compared_part_by_part_and_large_ones_relatively(feed):
    trained = Answers({"boxes": np.array([1000.0, -500]), "scores": (np.array([0.5]),)})
    assert largest_difference(trained, Answers((np.array([1001.0, -500]), np.array([0.5]))), feed) == pytest.approx(0.001)
    assert largest_difference(trained, Answers((np.array([1000.0, -500]), np.array([0.7]))), feed) == pytest.approx(0.2)


def test_nan_on_one_side_is_infinite(feed):
    holes = np.array([1.0, np.nan])
    assert largest_difference(Answers(holes), Answers(holes), feed) == 0
    assert largest_difference(Answers(holes), Answers(np.ones(2)), feed) == np.inf
    assert largest_difference(Answers(np.ones(2)), Answers(holes), feed) == np.inf


def test_a_bundle_has_what_is_compared():
    assert {"predict", "outputs"} <= set(vars(Model))
