import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_networks import quantize, random_weights, run, save, save_dense

from delest.shrinking.kernels import list_kernels
from delest.shrinking.weights import quantize_weights

RANDOM = np.random.default_rng(0)


def save_embedding(path, rows=1000, width=64):
    """tokens int64 [B, T] looked up in a table and summed by a layer with a weight per output: [B, T, 4]."""
    table = RANDOM.normal(size=(rows, width)) * RANDOM.uniform(0.001, 10, (rows, 1))
    weights = {
        "network.table.weight": table.astype(np.float32),
        "network.head.weight": RANDOM.normal(size=(width, 4)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Gather", ["network.table.weight", "tokens"], ["rows"], axis=0),
        helper.make_node("MatMul", ["rows", "network.head.weight"], ["output"]),
    ]
    tokens = {"tokens": (["batch", "t"], TensorProto.INT64)}
    return save(path, nodes, weights, tokens, {"output": (["batch", "t", 4],)})


def test_an_embedding_is_stored_in_a_byte_a_value(tmp_path):
    network = save_embedding(tmp_path / "fp32.onnx")
    assert quantize_weights(network, tmp_path / "small.onnx") == ["table"]
    assert 3.5 < network.stat().st_size / (tmp_path / "small.onnx").stat().st_size < 4
    tokens = RANDOM.integers(0, 1000, (50, 20))
    expected, given = run(network, {"tokens": tokens}), run(tmp_path / "small.onnx", {"tokens": tokens})
    size = np.abs(expected).max(2)  # of each token: its row has a step of its own
    assert (np.abs(given - expected).max(2) < 0.05 * size + 1e-6).all()
    assert 0 < np.square(given - expected).mean() < 1e-4 * np.square(expected).mean()


def test_rows_become_float_after_they_are_looked_up(tmp_path):
    quantize_weights(save_embedding(tmp_path / "fp32.onnx"), tmp_path / "small.onnx")
    table = next(w for w in onnx.load(tmp_path / "small.onnx").graph.initializer if list(w.dims) == [1000, 64])
    assert table.data_type == TensorProto.INT8
    optimised = optimise(tmp_path / "small.onnx", tmp_path / "optimised.onnx")
    floats = sorted(list(w.dims) for w in optimised.graph.initializer if w.data_type == TensorProto.FLOAT)
    assert floats == [[64, 4], [1000, 1]]


def optimise(network, path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(str(network), options, providers=["CPUExecutionProvider"])
    return onnx.load(path)


def test_layers_multiply_in_float_and_cost_nothing_more_at_a_call(tmp_path):
    network = save_dense(tmp_path / "fp32.onnx", *random_weights(64, 256, 128, 8))
    assert quantize_weights(network, tmp_path / "small.onnx") == ["1", "0", "2"]
    assert 3.3 < network.stat().st_size / (tmp_path / "small.onnx").stat().st_size < 4
    x = RANDOM.normal(size=(64, 64)).astype(np.float32)
    expected, given = run(network, {"x": x}), run(tmp_path / "small.onnx", {"x": x})
    assert 0 < np.square(given - expected).mean() < 1e-3 * np.square(expected).mean()
    assert list_kernels(tmp_path / "small.onnx") == list_kernels(network) == ([], ["0", "1", "2"])
    before, after = (optimise(path, tmp_path / "optimised.onnx") for path in (network, tmp_path / "small.onnx"))
    assert [node.op_type for node in after.graph.node] == [node.op_type for node in before.graph.node]


def test_small_weights_and_what_is_no_weight_stay(tmp_path):
    mask = np.where(np.tri(64), 0, -np.inf).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "network.0.weight"], ["sum"]),
        helper.make_node("Add", ["sum", "mask"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["output"], axis=-1),
    ]
    weights = {"network.0.weight": RANDOM.normal(size=(64, 64)).astype(np.float32), "mask": mask}
    network = save(tmp_path / "fp32.onnx", nodes, weights, {"x": (["batch", 64, 64],)}, {"output": (["batch", 64, 64],)})
    assert quantize_weights(network, tmp_path / "small.onnx", least_bytes=4 * 64 * 64 + 1) == []
    assert quantize_weights(network, tmp_path / "small.onnx", least_bytes=4 * 64 * 64) == ["0"]
    kept = {w.name: onnx.numpy_helper.to_array(w) for w in onnx.load(tmp_path / "small.onnx").graph.initializer}
    np.testing.assert_array_equal(kept["mask"], mask)


def test_a_tied_embedding_is_stored_once(tmp_path):
    nodes = [
        helper.make_node("Gather", ["network.table.weight", "tokens"], ["rows"], axis=0),
        helper.make_node("Gemm", ["rows", "network.table.weight"], ["output"], transB=1),
    ]
    weights = {"network.table.weight": RANDOM.normal(size=(300, 32)).astype(np.float32)}
    network = save(
        tmp_path / "fp32.onnx",
        nodes,
        weights,
        {"tokens": (["batch"], TensorProto.INT64)},
        {"output": (["batch", 300],)},
    )
    assert quantize_weights(network, tmp_path / "small.onnx") == ["table"]
    assert network.stat().st_size > 3 * (tmp_path / "small.onnx").stat().st_size
    tokens = np.arange(300)
    expected, given = run(network, {"tokens": tokens}), run(tmp_path / "small.onnx", {"tokens": tokens})
    assert np.abs(given - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("kind", "shape", "x", "attributes"),
    [
        ("Conv", (32, 8, 3, 3), (2, 8, 9, 9), {}),
        ("ConvTranspose", (8, 32, 3, 3), (2, 8, 9, 9), {}),
        ("Gemm", (48, 32), (5, 48), {}),
        ("MatMul", (48, 32), (5, 48), {}),
    ],
)
def test_each_output_channel_has_a_step_of_its_own(tmp_path, kind, shape, x, attributes):
    weight = RANDOM.normal(size=shape).astype(np.float32)
    axis = 0 if kind == "Conv" else 1
    size = 10.0 ** np.linspace(-3, 3, 32)
    weight *= size.reshape([-1 if place == axis else 1 for place in range(len(shape))]).astype(np.float32)
    nodes = [helper.make_node(kind, ["x", "network.0.weight"], ["output"], **attributes)]
    rank = [None] * len(x)
    network = save(tmp_path / "fp32.onnx", nodes, {"network.0.weight": weight}, {"x": (rank,)}, {"output": (rank,)})
    assert quantize_weights(network, tmp_path / "small.onnx") == ["0"]
    inputs = {"x": RANDOM.normal(size=x).astype(np.float32)}
    expected, given = run(network, inputs), run(tmp_path / "small.onnx", inputs)
    others = tuple(place for place in range(len(x)) if place != 1)
    assert (np.abs(given - expected).max(others) < 0.05 * np.abs(expected).max(others)).all()


def test_after_int8_the_embeddings_follow(tmp_path):
    network = save_embedding(tmp_path / "fp32.onnx")
    tokens = {"tokens": RANDOM.integers(0, 1000, (50, 20))}
    assert quantize(network, [tokens], tmp_path / "int8.onnx") == ["head"]
    assert quantize_weights(tmp_path / "int8.onnx", tmp_path / "small.onnx") == ["table"]
    assert network.stat().st_size > 3.5 * (tmp_path / "small.onnx").stat().st_size
    kernels = list_kernels(tmp_path / "int8.onnx")
    assert kernels == list_kernels(tmp_path / "small.onnx")
    expected, given = run(tmp_path / "int8.onnx", tokens), run(tmp_path / "small.onnx", tokens)
    assert np.square(given - expected).mean() < 1e-3 * np.square(expected).mean()
