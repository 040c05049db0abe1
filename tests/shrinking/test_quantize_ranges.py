import numpy as np
import onnx
import pytest
from onnx_networks import random_weights, save_dense

from delest import errors
from delest.shrinking import calibration, qdq
from delest.shrinking.calibration import measure_ranges

RANDOM = np.random.default_rng(0)


@pytest.fixture
def model(tmp_path):
    return onnx.load(save_dense(tmp_path / "network.onnx", *random_weights(16, 32, 4)))


def ranges_of(model, x, size=64):
    return {
        method: ranges["x"]
        for method, ranges in measure_ranges(
            model, ["x"], lambda: [{"x": x[k : k + size]} for k in range(0, len(x), size)]
        ).items()
    }


def test_values_without_outliers_are_spanned_almost_whole(model):
    x = RANDOM.uniform(-1, 3, (2000, 16)).astype(np.float32)
    ranges = ranges_of(model, x)
    assert ranges["min_max"] == (x.min(), x.max())
    assert ranges["percentile"] == pytest.approx((-1, 3), abs=0.01)
    assert ranges["entropy"] == pytest.approx((-1, 3), abs=0.2)


def test_one_outlier_stretches_only_the_range_of_all_values(model):
    x = RANDOM.normal(size=(3000, 16)).astype(np.float32)
    x[7, 3] = 80
    ranges = ranges_of(model, x)
    assert ranges["min_max"][1] == 80
    assert 3 < ranges["percentile"][1] < 6
    assert 3 < ranges["entropy"][1] < 40
    assert ranges["percentile"][0] == pytest.approx(-4, abs=1)


def test_zeros_after_a_relu_do_not_decide_the_range(model):
    x = np.maximum(RANDOM.normal(size=(3000, 16)), 0).astype(np.float32)
    x[RANDOM.random(x.shape) < 0.9] = 0
    low, high = ranges_of(model, x)["entropy"]
    assert low == 0
    assert high > 2.5


def test_values_that_are_not_finite_do_not_count(model):
    x = RANDOM.uniform(-1, 1, (500, 16)).astype(np.float32)
    x[0, :3] = np.nan, np.inf, -np.inf
    for low, high in ranges_of(model, x).values():
        assert -1 <= low < -0.7
        assert 0.7 < high <= 1


def test_constant_and_empty_activations_have_a_range(model):
    assert set(ranges_of(model, np.full((8, 16), 2, np.float32)).values()) == {(2, 2)}
    nothing = np.full((8, 16), np.nan, np.float32)
    assert set(ranges_of(model, nothing).values()) == {(0, 0)}


def test_few_bytes_at_once_give_the_same_ranges(model, monkeypatch):
    x = RANDOM.normal(size=(100, 16)).astype(np.float32)
    tensors = ["x", "sum0", "rectified0", "output"]
    whole = measure_ranges(model, tensors, lambda: [{"x": x}])
    sizes = []
    monkeypatch.setattr(calibration, "_PIECE_BYTES", 7 * 4 * (16 + 32 + 32 + 4))
    in_parts = calibration.Activations(model, tensors)
    for values in in_parts.read([{"x": x}]):
        sizes.append(len(values["sum0"]))
    assert sizes == [1, *[7] * 14, 1]
    pieces = measure_ranges(model, tensors, lambda: [{"x": x}])
    for method, ranges in whole.items():
        for name in tensors:
            assert pieces[method][name] == pytest.approx(ranges[name], rel=0.01, abs=1e-5), (method, name)


def test_a_network_of_fixed_batch_is_read_whole(tmp_path, monkeypatch):
    model = onnx.load(save_dense(tmp_path / "network.onnx", *random_weights(16, 4)))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 8
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 8
    monkeypatch.setattr(calibration, "_PIECE_BYTES", 1)
    read = calibration.Activations(model, ["output"]).read([{"x": np.ones((8, 16), np.float32)}] * 2)
    assert [len(values["output"]) for values in read] == [8, 8]


def test_no_rows_are_refused(model):
    with pytest.raises(errors.BadInput, match="at least one calibration batch"):
        measure_ranges(model, ["x"], list)


def test_activations_are_what_layers_take_and_give(tmp_path):
    network = save_dense(tmp_path / "network.onnx", *random_weights(16, 32, 4))
    assert qdq.activations(qdq.prepare(network, tmp_path)) == ["x", "sum0", "rectified0", "output"]
