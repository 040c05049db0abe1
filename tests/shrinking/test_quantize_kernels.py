import numpy as np
import onnx
import torch
from onnx_networks import quantize, random_weights, run, save_attention, save_dense
from sessions import Network
from torch import nn

from delest.backends.torch.export import export_network
from delest.shrinking import qdq
from delest.shrinking.calibration import Activations, min_max
from delest.shrinking.kernels import list_kernels

RANDOM = np.random.default_rng(0)


def test_a_float_network_computes_in_float(tmp_path):
    network = save_dense(tmp_path / "fp32.onnx", *random_weights(8, 8, 4))
    assert list_kernels(network) == ([], ["0", "1"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp32.onnx"]


def test_int8_layers_are_named_as_in_training(tmp_path):
    x = RANDOM.normal(size=(32, 3, 8, 8)).astype(np.float32)
    torch.manual_seed(0)
    export_network(Network(3, 4).eval(), x[:2], tmp_path / "fp32.onnx")
    quantize(tmp_path / "fp32.onnx", [{"x": x}], tmp_path / "int8.onnx")
    kernels = list_kernels(tmp_path / "int8.onnx")
    assert sorted(kernels.int8) == ["first", "head", "second"]
    assert kernels.float == []


def test_a_layer_that_only_looks_quantised_is_listed_as_float(tmp_path, capfd):
    """A convolution whose output stays in fp32 is no pattern that ONNX Runtime has a kernel for."""
    x = RANDOM.normal(size=(32, 3, 8, 8)).astype(np.float32)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
    export_network(module, x[:2], tmp_path / "fp32.onnx")
    assert quantize(tmp_path / "fp32.onnx", [{"x": x}], tmp_path / "int8.onnx") == ["0"]
    weights = {weight.name for weight in onnx.load(tmp_path / "int8.onnx").graph.initializer}
    assert "network.2.weight_quantized" in weights
    assert list_kernels(tmp_path / "int8.onnx") == (["0"], ["2"])
    assert capfd.readouterr() == ("", "")


def test_what_is_left_in_float_runs_in_float_between_int8_neighbours(tmp_path):
    """ONNX Runtime quantises such a layer's weight by itself, unless something stands between the layer and its neighbour."""
    x = RANDOM.normal(size=(16, 3, 8, 8)).astype(np.float32)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    export_network(nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 4)), x[:2], tmp_path / "fp32.onnx")
    model = qdq.prepare(tmp_path / "fp32.onnx", tmp_path)
    ranges = min_max(Activations(model, qdq.activations(model)), [{"x": x}])
    middle = next(node.name for node in model.graph.node if "network.2.weight" in node.input)
    for left, expected in (((), (["0", "2", "4", "7"], [])), ([middle], (["0", "4", "7"], ["2"]))):
        qdq.save(qdq.insert(model, ranges, reduce_range=True, without=left), tmp_path / "int8.onnx")
        assert list_kernels(tmp_path / "int8.onnx") == expected
        given, wanted = run(tmp_path / "int8.onnx", {"x": x}), run(tmp_path / "fp32.onnx", {"x": x})
        assert np.square(given - wanted).mean() < 0.01 * np.square(wanted).mean()


def test_a_product_of_activations_can_be_left_in_float(tmp_path):
    network = save_attention(tmp_path / "fp32.onnx")
    x = RANDOM.normal(size=(4, 6, 32)).astype(np.float32)
    model = qdq.prepare(network, tmp_path)
    ranges = min_max(Activations(model, qdq.activations(model)), [{"x": x}])
    qdq.save(qdq.insert(model, ranges, reduce_range=True, without=["scores"]), tmp_path / "int8.onnx")
    kernels = list_kernels(tmp_path / "int8.onnx")
    assert [name.split()[-1].split("/")[0] for name in kernels.float] == ["scores"]
    assert sorted(kernels.int8) == ["MatMul mix", "key", "last", "query", "value"]
