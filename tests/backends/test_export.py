import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from delest import errors
from delest.backends.torch.export import export_network


class Mixed(nn.Module):
    """Numbers and categories by keyword."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.linear = nn.Linear(3 + 4, 2)

    def forward(self, numbers, categories):
        return self.linear(torch.cat([numbers, self.embedding(categories[:, 0])], 1))


class AnyInputs(nn.Module):
    """Inputs reach another network through `*inputs` and `**named`."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, *inputs, **named):
        return self.network(*inputs, **named)


def run(path, inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def mixed_inputs(rows):
    random = np.random.default_rng(0)
    return {"categories": random.integers(0, 5, (rows, 1)), "numbers": random.normal(size=(rows, 3)).astype(np.float32)}


def test_an_image_network_takes_any_batch(tmp_path, capfd):
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(8 * 36, 4))
    network(torch.randn(16, 3, 8, 8))  # running statistics that differ from 0 and 1
    network[1].eval()  # frozen by the user, the rest trains
    before = {name: value.clone() for name, value in network.state_dict().items()}
    x = np.random.default_rng(0).normal(size=(5, 3, 8, 8)).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_network(network, x[:2], tmp_path / "network.onnx")
    assert capfd.readouterr() == ("", "")
    assert [part.training for part in network] == [True, False, True, True, True, True]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    model = onnx.load(tmp_path / "network.onnx")
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["x", "output"]
    assert not model.graph.value_info
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert any(weight.name.endswith("0.weight") for weight in model.graph.initializer)
    with torch.no_grad():
        expected = network.eval()(torch.as_tensor(x)).numpy()
    for rows in (1, 5):
        np.testing.assert_allclose(run(tmp_path / "network.onnx", {"x": x[:rows]})[0], expected[:rows], atol=1e-5)


@pytest.mark.parametrize("wrap", [lambda network: network, AnyInputs], ids=["named", "any"])
def test_inputs_by_name_and_by_place(tmp_path, wrap):
    network = wrap(Mixed())
    inputs = mixed_inputs(3)
    expected = network(**{name: torch.as_tensor(array) for name, array in inputs.items()}).detach().numpy()
    export_network(network, {name: array[:2] for name, array in inputs.items()}, tmp_path / "named.onnx")
    np.testing.assert_allclose(run(tmp_path / "named.onnx", inputs)[0], expected, atol=1e-6)
    placed = inputs["numbers"], inputs["categories"]
    export_network(network, tuple(array[:2] for array in placed), tmp_path / "placed.onnx")
    np.testing.assert_allclose(
        run(tmp_path / "placed.onnx", dict(zip(("x0", "x1"), placed, strict=True)))[0], expected, atol=1e-6
    )


def test_several_outputs(tmp_path):
    class Two(nn.Module):
        def forward(self, x):
            return x * 2, x.sum(1)

    x = np.ones((3, 4), np.float32)
    export_network(Two(), x[:2], tmp_path / "network.onnx")
    doubled, total = run(tmp_path / "network.onnx", {"x": x})
    assert doubled.tolist() == (x * 2).tolist()
    assert total.tolist() == [4, 4, 4]


def test_an_operator_without_onnx_form_is_named(tmp_path, capfd):
    class Bessel(nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x)

    with pytest.raises(errors.BadInput, match=r"(?s)bessel_j0 has no ONNX form.*trained model is kept") as caught:
        export_network(Bessel(), np.ones((2, 3), np.float32), tmp_path / "network.onnx")
    assert caught.value.exit_status == 2
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_a_fixed_batch_is_explained(tmp_path):
    class Fixed(nn.Module):
        def forward(self, x):
            return x.view(2, 3) * 2

    with pytest.raises(errors.BadInput, match="static shape of 2"):
        export_network(Fixed(), np.ones((2, 3), np.float32), tmp_path / "network.onnx")


def test_what_the_model_raises_is_passed_on(tmp_path):
    class Broken(nn.Module):
        def forward(self, x):
            raise ValueError("no such thing")

    network = Broken()
    with pytest.raises(errors.BadInput, match="ValueError: no such thing"):
        export_network(network, np.ones((2, 3), np.float32), tmp_path / "network.onnx")
    assert network.training


def test_weights_of_layers_over_tokens_keep_their_names(tmp_path):
    """The exporter stores them transposed, under a number."""
    network = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3, bias=False))
    x = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
    export_network(network, x, tmp_path / "network.onnx")
    model = onnx.load(tmp_path / "network.onnx")
    products = [node.input[1] for node in model.graph.node if node.op_type == "MatMul"]
    assert products == ["network.0.weight_Transposed", "network.2.weight_Transposed"]
    stored = {weight.name: onnx.numpy_helper.to_array(weight) for weight in model.graph.initializer}
    np.testing.assert_array_equal(stored[products[0]], network[0].weight.detach().T)
    np.testing.assert_allclose(run(tmp_path / "network.onnx", {"x": x})[0], network(torch.as_tensor(x)).detach(), atol=1e-6)
