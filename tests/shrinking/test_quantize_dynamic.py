import numpy as np
import onnx
import torch
from onnx_networks import random_weights, run, save_attention, save_dense
from sessions import Network

from delest.backends.torch.export import export_network
from delest.shrinking.kernels import list_kernels
from delest.shrinking.quantize import products_dominate, quantize_dynamic

RANDOM = np.random.default_rng(0)


def test_products_with_weights_become_int8_at_each_call(tmp_path):
    network = save_attention(tmp_path / "fp32.onnx")
    layers = quantize_dynamic(network, tmp_path / "int8.onnx", reduce_range=True)
    assert layers == ["query", "key", "value", "last"]
    kernels = list_kernels(tmp_path / "int8.onnx")
    assert sorted(kernels.int8) == sorted(layers)
    assert len(kernels.float) == 2  # scores and mix, which multiply activations
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp32.onnx", "int8.onnx"]
    for size in (1.0, 1000.0):  # no range is written into the file
        x = (size * RANDOM.normal(size=(4, 6, 32))).astype(np.float32)
        expected, given = run(network, {"x": x}), run(tmp_path / "int8.onnx", {"x": x})
        assert not np.array_equal(given, expected)
        if size == 1:
            assert np.square(given - expected).mean() < 0.01 * np.square(expected).mean()


def test_weights_have_a_scale_for_each_output(tmp_path):
    weights = random_weights(64, 48, 8)
    weights[0][0] *= 1000  # one output far larger than all others
    network = save_dense(tmp_path / "fp32.onnx", *weights)
    assert quantize_dynamic(network, tmp_path / "int8.onnx", reduce_range=True) == ["0", "1"]
    x = RANDOM.normal(size=(64, 64)).astype(np.float32)
    expected, given = run(network, {"x": x}), run(tmp_path / "int8.onnx", {"x": x})
    assert np.square(given - expected).mean() < 0.01 * np.square(expected).mean()
    sizes = {weight.name: weight.dims for weight in onnx.load(tmp_path / "int8.onnx").graph.initializer}
    assert [48] in sizes.values()
    assert (tmp_path / "int8.onnx").stat().st_size < 0.5 * network.stat().st_size


def test_reduced_range_leaves_a_bit(tmp_path):
    network = save_dense(tmp_path / "fp32.onnx", *random_weights(64, 48, 8))
    for reduce_range, largest in ((True, 64), (False, 127)):
        quantize_dynamic(network, tmp_path / "int8.onnx", reduce_range=reduce_range)
        weights = [onnx.numpy_helper.to_array(weight) for weight in onnx.load(tmp_path / "int8.onnx").graph.initializer]
        assert max(np.abs(array.astype(int)).max() for array in weights if array.dtype == np.int8) == largest


def test_where_products_dominate(tmp_path):
    assert products_dominate(save_attention(tmp_path / "attention.onnx"))
    x = np.zeros((2, 3, 8, 8), np.float32)
    export_network(Network(3, 4).eval(), x, tmp_path / "convolutions.onnx")
    assert not products_dominate(tmp_path / "convolutions.onnx")
    export_network(torch.nn.ReLU(), x, tmp_path / "nothing.onnx")
    assert not products_dominate(tmp_path / "nothing.onnx")
