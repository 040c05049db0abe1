"""Bundles of tiny networks over real sources."""

import numpy as np
import onnx
import pytest

from delest.bundle import load
from delest.bundle.write import write_bundle
from delest.data import Feed, fit_preprocessing, open_source


@pytest.fixture
def bundle(tmp_path):
    """Writes and opens the bundle of a network for the data of a source: (model, feed of all rows)."""

    def make(network, data, **how):
        source = open_source(data, **how)
        index = np.arange(len(source))
        preprocessing = fit_preprocessing(source, index)
        onnx.save(network, tmp_path / "network.onnx")
        write_bundle(tmp_path / "bundle", tmp_path / "network.onnx", preprocessing, name="test", metric="accuracy")
        return load(tmp_path / "bundle", threads=1), Feed(source, index, preprocessing, batch_size=16)

    return make


@pytest.fixture
def pictures():
    """(images uint8 [40, 8, 8, 3], labels) of two classes that differ in red."""
    random = np.random.default_rng(0)
    labels = np.arange(40) % 2
    images = random.integers(0, 150, (40, 8, 8, 3)).astype(np.uint8)
    images[labels == 1, ..., 0] += 100
    return images, labels


@pytest.fixture
def table(tmp_path):
    """A CSV file with numbers (some missing), text, truth values and an unnamed column; its target is a number."""
    rows = ["price,colour,big,,target"]
    for i in range(30):
        price = "" if i % 7 == 3 else f"{i * 1.5}"
        rows.append(f"{price},{['red', 'blué', ''][i % 3]},{'true' if i % 2 else 'false'},{i * i},{i * 2.25 + 0.5}")
    path = tmp_path / "table.csv"
    path.write_text("\n".join(rows))
    return path
