"""Tiny ONNX networks made by hand, so that the tests of bundles need no torch."""

import numpy as np
from onnx import TensorProto, helper, numpy_helper


def make_network(nodes, inputs, outputs, weights):
    """A model from nodes, {name: (dtype, shape)} of inputs and outputs, and {name: array} of weights."""
    values = [
        [helper.make_tensor_value_info(name, dtype, ["s0", *shape]) for name, (dtype, shape) in each.items()]
        for each in (inputs, outputs)
    ]
    graph = helper.make_graph(nodes, "main", *values, [numpy_helper.from_array(array, name) for name, array in weights.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def image_network(channels, outputs, last=None):
    """Scores from the mean of each channel: [B, C, H, W] to [B, outputs]."""
    weight = np.arange(channels * outputs, dtype=np.float32).reshape(channels, outputs) / 3 - 0.5
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["pooled"], name="pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], name="flatten"),
        helper.make_node("MatMul", ["flat", "network.head.weight"], ["output" if last is None else "scores"], name="head"),
    ]
    if last is not None:
        nodes.append(helper.make_node(last, ["scores"], ["output"], name="last"))
    shapes = {"x": (TensorProto.FLOAT, [channels, "h", "w"])}, {"output": (TensorProto.FLOAT, [outputs])}
    return make_network(nodes, *shapes, {"network.head.weight": weight})


def number_network(width, outputs=1):
    """A weighted sum of numbers: [B, width] to [B, outputs]."""
    weight = (np.arange(width * outputs, dtype=np.float32).reshape(width, outputs) + 1) / 4
    nodes = [helper.make_node("MatMul", ["x", "weight"], ["output"])]
    shapes = {"x": (TensorProto.FLOAT, [width])}, {"output": (TensorProto.FLOAT, [outputs])}
    return make_network(nodes, *shapes, {"weight": weight})


def table_network(width, categories):
    """Sum of numbers and codes: `numbers` [B, width] and `categories` [B, categories] to [B, 1]."""
    nodes = [
        helper.make_node("Cast", ["categories"], ["codes"], to=TensorProto.FLOAT),
        helper.make_node("Concat", ["numbers", "codes"], ["all"], axis=1),
        helper.make_node("MatMul", ["all", "weight"], ["output"]),
    ]
    weight = (np.arange(width + categories, dtype=np.float32)[:, None] + 1) / 4
    shapes = (
        {"numbers": (TensorProto.FLOAT, [width]), "categories": (TensorProto.INT64, [categories])},
        {"output": (TensorProto.FLOAT, [1])},
    )
    return make_network(nodes, *shapes, {"weight": weight})


def bigram_network(scores, context):
    """Scores of the next token by the token before it, from a table [V, V]: ids [B, context] to [B, context, V]."""
    nodes = [helper.make_node("Gather", ["scores", "x"], ["output"], axis=0)]
    shapes = {"x": (TensorProto.INT64, [context])}, {"output": (TensorProto.FLOAT, [context, len(scores)])}
    return make_network(nodes, *shapes, {"scores": scores})


def run_network(network, inputs):
    """The network's outputs, straight from ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(network.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs if isinstance(inputs, dict) else {"x": inputs})[0]
