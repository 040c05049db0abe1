import numpy as np
import onnx
import pytest
import torch
from onnx_networks import quantize, run
from sessions import Network, Table
from torch import nn

from delest.backends.torch.export import export_network
from delest.records.source import Column, Schema


def operators(path):
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("reduce_range", [True, False])
def test_a_convolutional_network_becomes_int8(tmp_path, reduce_range):
    x = np.random.default_rng(0).normal(size=(64, 3, 8, 8)).astype(np.float32)
    network = Network(3, 4)
    network(torch.as_tensor(x))  # running statistics
    export_network(network, x[:2], tmp_path / "fp32.onnx")
    layers = quantize(
        tmp_path / "fp32.onnx",
        [{"x": x[k : k + 16]} for k in range(0, 64, 16)],
        tmp_path / "int8.onnx",
        reduce_range=reduce_range,
    )
    assert layers == ["first", "second", "head"]
    expected, given = run(tmp_path / "fp32.onnx", {"x": x}), run(tmp_path / "int8.onnx", {"x": x})
    assert np.abs(given - expected).max() < 0.15 * (expected.max() - expected.min())
    assert not np.array_equal(given, expected)
    assert (tmp_path / "int8.onnx").stat().st_size < 0.6 * (tmp_path / "fp32.onnx").stat().st_size
    weights = {w.name: onnx.numpy_helper.to_array(w) for w in onnx.load(tmp_path / "int8.onnx").graph.initializer}
    kernel = weights["network.second.weight_quantized"]
    assert kernel.dtype == np.int8
    assert np.abs(kernel.astype(int)).max() == (64 if reduce_range else 127)
    assert len(weights["network.second.weight_scale"]) == 64  # by channel
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp32.onnx", "int8.onnx"]


def test_scores_stay_in_fp32(tmp_path):
    x = np.random.default_rng(0).normal(size=(256, 20)).astype(np.float32)
    export_network(nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 1)), x[:2], tmp_path / "fp32.onnx")
    quantize(tmp_path / "fp32.onnx", [{"x": x}], tmp_path / "int8.onnx")
    assert operators(tmp_path / "int8.onnx")[-1] == "Gemm"
    assert len(np.unique(run(tmp_path / "int8.onnx", {"x": x}))) > 250


def test_a_table_network_keeps_its_embeddings(tmp_path):
    columns = (Column(name="n", kind="number"), Column(name="c", kind="category", categories=("a", "b")))
    random = np.random.default_rng(0)
    inputs = {"numbers": random.normal(size=(64, 1)).astype(np.float32), "categories": random.integers(0, 3, (64, 1))}
    export_network(Table(Schema(inputs=columns)), {name: array[:2] for name, array in inputs.items()}, tmp_path / "fp32.onnx")
    assert quantize(tmp_path / "fp32.onnx", [inputs], tmp_path / "int8.onnx") == ["hidden", "head"]
    weights = {w.name: onnx.numpy_helper.to_array(w).dtype for w in onnx.load(tmp_path / "int8.onnx").graph.initializer}
    assert weights["network.embeddings.0.weight"] == np.float32
    expected, given = run(tmp_path / "fp32.onnx", inputs), run(tmp_path / "int8.onnx", inputs)
    assert np.abs(given - expected).max() < 0.15 * (expected.max() - expected.min())


def test_a_network_without_products_has_no_int8_layers(tmp_path):
    x = np.ones((4, 3), np.float32)
    export_network(nn.Sequential(nn.ReLU(), nn.Softmax(1)), x[:2], tmp_path / "fp32.onnx")
    assert quantize(tmp_path / "fp32.onnx", [{"x": x}], tmp_path / "int8.onnx") == []
