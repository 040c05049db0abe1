"""Small ONNX networks with weights named as an export names them, and what they answer."""

from itertools import pairwise

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from delest.shrinking.quantize import best_static


def run(path, inputs):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, inputs)[0]


def quantize(network, batches, out, *, reduce_range=True):
    """The int8 form by the ranges of all values, and the layers that compute in it: a judge that likes all alike takes the first."""
    form = best_static(network, lambda: batches, out, reduce_range=reduce_range, judge=lambda _: 0.0)
    assert form.ranges == "min_max"
    return form.int8


def squared_error(network, inputs):
    """How far another network's answers are from those of `network`, as a score: higher is better."""
    expected = run(network, inputs)
    return lambda path: -float(np.square(run(path, inputs) - expected).mean())


def save(path, nodes, weights, inputs, outputs):
    """A network from nodes; `inputs` and `outputs` are shapes by name, float32 unless a dtype follows."""

    def values(shapes):
        return [
            helper.make_tensor_value_info(name, kind[0] if kind else TensorProto.FLOAT, shape)
            for name, (shape, *kind) in shapes.items()
        ]

    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "network", values(inputs), values(outputs), tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path


def save_dense(path, *weights, biases=None):
    """Linear layers `0`, `1`, ... with weights [out, in] and a ReLU between each two: x [B, in] to output [B, out]."""
    nodes, tensors, value = [], {}, "x"
    for place, weight in enumerate(weights):
        name, output = f"network.{place}", "output" if place == len(weights) - 1 else f"sum{place}"
        tensors[f"{name}.weight"] = weight.astype(np.float32)
        tensors[f"{name}.bias"] = np.zeros(len(weight), np.float32) if biases is None else biases[place].astype(np.float32)
        nodes.append(
            helper.make_node("Gemm", [value, f"{name}.weight", f"{name}.bias"], [output], name=f"node{place}", transB=1)
        )
        value = f"rectified{place}"
        if output != "output":
            nodes.append(helper.make_node("Relu", [output], [value], name=f"relu{place}"))
    return save(path, nodes, tensors, {"x": (["batch", weights[0].shape[1]],)}, {"output": (["batch", len(weights[-1])],)})


def random_weights(*widths, seed=0):
    """Weights [out, in] that keep the size of what goes through them and a ReLU."""
    random = np.random.default_rng(seed)
    return [random.normal(size=(b, a)) * (2 / a) ** 0.5 for a, b in pairwise(widths)]


def save_attention(path, width=32):
    """x [B, T, D] through query, key and value, and what they attend to through a last layer, all as MatMul."""
    random = np.random.default_rng(0)
    names = ("query", "key", "value", "last")
    weights = {f"network.{name}.weight": random.normal(size=(width, width)).astype(np.float32) / 6 for name in names}
    nodes = [helper.make_node("MatMul", ["x", f"network.{name}.weight"], [name], name=f"product_{name}") for name in names[:3]]
    nodes += [
        helper.make_node("Transpose", ["key"], ["keys"], perm=[0, 2, 1], name="transpose"),
        helper.make_node("MatMul", ["query", "keys"], ["scores"], name="scores"),
        helper.make_node("Softmax", ["scores"], ["shares"], axis=-1, name="softmax"),
        helper.make_node("MatMul", ["shares", "value"], ["mixed"], name="mix"),
        helper.make_node("MatMul", ["mixed", "network.last.weight"], ["output"], name="product_last"),
    ]
    shape = ["batch", "tokens", width]
    return save(path, nodes, weights, {"x": (shape,)}, {"output": (shape,)})
