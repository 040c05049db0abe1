"""Arrays in safetensors files: the same as the safetensors package has them, one at a time, damage named."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from delest import errors, tensors


def arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "weight": random.standard_normal((3, 5)).astype(np.float32),
        "turned": random.standard_normal((4, 6)).astype(np.float32).T,  # not contiguous
        "half": np.arange(7, dtype=np.float16),
        "bits": np.arange(5, dtype=np.uint16),
        "step": np.array(3.0),
        "seed": np.arange(9, dtype=np.uint8),
        "flag": np.array([True, False]),
        "none": np.empty((0, 4), np.int64),
    }


def same(found, expected) -> bool:
    return found.keys() == expected.keys() and all(
        np.array_equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype for name in expected
    )


def test_the_package_reads_what_is_written_here(tmp_path):
    with open(tmp_path / "a", "wb") as file:
        tensors.write(file, arrays(), {"step": "7"})
    assert same(load_file(tmp_path / "a"), arrays())


def test_what_the_package_wrote_is_read_here_and_can_be_changed(tmp_path):
    contiguous = {name: np.ascontiguousarray(array) if array.ndim else array for name, array in arrays().items()}
    save_file(contiguous, tmp_path / "a", metadata={"by": "them"})
    found = tensors.Arrays(tmp_path / "a")
    assert same(dict(found), arrays())
    found["weight"][0] = 0  # one's own copy
    assert found["weight"][0].any()


def test_a_file_that_is_replaced_is_read_to_its_end(tmp_path):
    def put(value: float) -> None:
        with open(tmp_path / "new", "wb") as file:
            tensors.write(file, {"a": np.full(4, value)})
        (tmp_path / "new").rename(tmp_path / "a")

    put(1.0)
    first = tensors.Arrays(tmp_path / "a")
    put(2.0)
    assert first["a"].tolist() == [1.0] * 4
    assert tensors.Arrays(tmp_path / "a")["a"].tolist() == [2.0] * 4


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda data: b"", "its header is cut off"),
        (lambda data: data[:-1], "bytes instead of"),
        (lambda data: data + b"0", "bytes instead of"),
        (lambda data: data.replace(b"[3,5]", b"[3,6]"), "weight does not have the size of its shape"),
        (lambda data: data.replace(b'"F32"', b'"F31"'), "F31"),
        (lambda data: b"x" * 500, "its header is cut off"),
    ],
)
def test_a_damaged_file_is_bad_input(tmp_path, harm, words):
    with open(tmp_path / "a", "wb") as file:
        tensors.write(file, arrays())
    (tmp_path / "a").write_bytes(harm((tmp_path / "a").read_bytes()))
    with pytest.raises(errors.BadInput, match=rf"a is no intact safetensors file \(.*{words}"):
        tensors.Arrays(tmp_path / "a")


def test_names_under_a_prefix(tmp_path):
    under = tensors.Under({"model.a": np.zeros(1), "model.b": np.ones(1), "other": np.zeros(2)}, "model.")
    assert list(under) == ["a", "b"]
    assert len(under) == 2
    assert under["b"] == 1
    assert "other" not in under
