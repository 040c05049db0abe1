"""Bundles of texts: scores of tokens, judged window by window, and asked about files."""

import json

import numpy as np
import onnx
import pytest
from networks import bigram_network

from delest import errors, metrics
from delest.bundle.inputs import predict_rows
from delest.training.evaluate import evaluate

CONTEXT = 5


@pytest.fixture
def bigrams(bundle, tmp_path):
    """(model, feed, scores) of a text of a, b and c."""
    path = tmp_path / "book.txt"
    path.write_text("".join("abc"[number] for number in np.random.default_rng(0).integers(0, 3, 240)))
    scores = np.random.default_rng(1).normal(size=(4, 4)).astype(np.float32) * 3
    return *bundle(bigram_network(scores, CONTEXT), path, context=CONTEXT), scores


def expected_losses(scores, before, after):
    """Cross-entropy of each token [...]."""
    probabilities = np.exp(scores.astype(np.float64)) / np.exp(scores.astype(np.float64)).sum(1, keepdims=True)
    return -np.log(probabilities[before, after])


def test_a_bundle_carries_its_vocabulary_and_takes_ids(bigrams):
    model, _, scores = bigrams
    assert model.description["head"] == "logits"
    assert model.description["inputs"] == [{"name": "tokens", "dtype": "int64", "shape": ["batch", CONTEXT]}]
    assert model.description["outputs"] == [{"name": "logits", "dtype": "float32", "shape": ["batch", CONTEXT, 4]}]
    assert model.labels == ["\ufffd", "a", "b", "c"] == json.loads((model.folder / "labels.json").read_text())["labels"]
    ids = np.array([[1, 2, 3, 0, 1]])
    np.testing.assert_array_equal(model.predict({"tokens": ids}), scores[ids])
    metadata = {entry.key: entry.value for entry in onnx.load(model.folder / "model.onnx").metadata_props}
    assert json.loads(metadata["labels"]) == model.labels


def test_each_window_is_judged_by_the_mean_loss_of_its_tokens(bigrams):
    model, feed, scores = bigrams
    rows = feed.source.read(feed.index)
    expected = expected_losses(scores, rows["tokens"], rows["next"]).mean(1)
    found = evaluate(model, feed, metrics.chosen("auto", "tokens"))
    np.testing.assert_allclose(found.rows, expected, rtol=1e-5)
    assert found.score == found.loss == pytest.approx(expected.mean())
    assert found.outputs is None  # scores of all windows would take too much
    assert evaluate(model, feed, metrics.LossMetric()).rows is None


def test_a_file_is_answered_window_by_window(bigrams, tmp_path):
    model, _, scores = bigrams
    (tmp_path / "new.txt").write_text("abcab\N{SNOWMAN}a")
    first, second = predict_rows(model, [tmp_path / "new.txt"])
    assert [first["input"], second["input"]] == [f"{tmp_path / 'new.txt'}:0", f"{tmp_path / 'new.txt'}:1"]
    ids = np.array([1, 2, 3, 1, 2, 0, 1])
    assert first["label"] == model.labels[scores[2].argmax()]
    assert second["label"] == model.labels[scores[1].argmax()]
    assert first["probability"] == pytest.approx(np.exp(-expected_losses(scores, 2, scores[2].argmax())), rel=1e-5)
    assert first["loss"] == pytest.approx(expected_losses(scores, ids[:4], ids[1:5]).mean(), rel=1e-5)
    assert second["loss"] == pytest.approx(expected_losses(scores, 0, 1), rel=1e-5)


def test_a_single_token_has_no_loss(bigrams, tmp_path):
    (tmp_path / "new.txt").write_text("a")
    (answer,) = predict_rows(bigrams[0], [tmp_path / "new.txt"])
    assert answer["loss"] is None


def test_files_that_hold_no_text_are_named_together(bigrams, tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(errors.BadInput) as raised:
        predict_rows(bigrams[0], [tmp_path / "empty.txt", tmp_path / "latin.txt"])
    assert len(raised.value.faults) == 2
    with pytest.raises(errors.BadInput, match="name a text file"):
        predict_rows(bigrams[0], [tmp_path])
