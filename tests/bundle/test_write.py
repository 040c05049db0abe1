import json
import os

import numpy as np
import onnx
import pytest
from networks import image_network
from safetensors.numpy import load_file

from delest import errors, storage
from delest.bundle import load, write
from delest.data import fit_preprocessing, open_source


@pytest.fixture
def preprocessing(pictures):
    source = open_source(pictures)
    return fit_preprocessing(source, np.arange(len(source)))


def write_one(folder, preprocessing, **changes):
    onnx.save(image_network(3, 2), folder / "network.onnx")
    given = {"name": "cats", "metric": "accuracy", "weights": {"head.weight": np.ones((2, 3), np.float32)}, **changes}
    write.write_bundle(folder / "bundle", folder / "network.onnx", preprocessing, **given)


def test_a_bundle_holds_everything_that_is_needed(tmp_path, preprocessing):
    write_one(tmp_path, preprocessing, extra={"parity": np.float32(0.5)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "network.onnx"]
    names = sorted(path.name for path in (tmp_path / "bundle").iterdir())
    assert names == ["bundle.json", "labels.json", "model.onnx", "weights.safetensors"]
    description = json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    assert description["format"] == 1
    assert (description["name"], description["metric"], description["head"]) == ("cats", "accuracy", "softmax")
    assert description["labels"] == ["0", "1"] == json.loads((tmp_path / "bundle" / "labels.json").read_text())["labels"]
    assert description["parity"] == 0.5
    assert description["files"] == {
        name: storage.checksum(tmp_path / "bundle" / name) for name in ("labels.json", "model.onnx", "weights.safetensors")
    }
    assert load_file(tmp_path / "bundle" / "weights.safetensors")["head.weight"].tolist() == [[1, 1, 1], [1, 1, 1]]


def test_weights_can_be_left_out(tmp_path, preprocessing):
    write_one(tmp_path, preprocessing, weights=None)
    assert not (tmp_path / "bundle" / "weights.safetensors").exists()
    load(tmp_path / "bundle")


@pytest.mark.parametrize("exchange", [True, False])
def test_an_old_bundle_is_replaced(tmp_path, preprocessing, monkeypatch, exchange):
    write_one(tmp_path, preprocessing, name="old")
    (tmp_path / "bundle" / "stray").write_text("")
    if not exchange:
        monkeypatch.setattr(write, "_exchange", lambda new, old: False)
    write_one(tmp_path, preprocessing, name="new")
    assert load(tmp_path / "bundle").description["name"] == "new"
    assert not (tmp_path / "bundle" / "stray").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "network.onnx"]


def test_a_full_disk_leaves_the_old_bundle(tmp_path, preprocessing, monkeypatch):
    write_one(tmp_path, preprocessing, name="old")

    def refuse(descriptor):
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refuse)
        with pytest.raises(errors.DiskFull):
            write_one(tmp_path, preprocessing, name="new")
    assert load(tmp_path / "bundle").description["name"] == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "network.onnx"]
