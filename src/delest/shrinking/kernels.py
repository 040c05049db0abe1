"""Which layers ONNX Runtime really computes in int8, read from the graph that it runs.

A quantised file only asks for int8: where a pattern is not one that ONNX Runtime knows, it converts to float and computes in
float, and says nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import onnx
import onnxruntime

from delest.shrinking.calibration import open_session
from delest.shrinking.qdq import node_layer

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

# Operators that multiply by a weight, and which of their inputs is the weight.
_INT8 = {
    "QLinearConv": 3,
    "QLinearMatMul": 3,
    "QGemm": 3,
    "ConvInteger": 1,
    "MatMulInteger": 1,
    "MatMulIntegerToFloat": 1,
    "DynamicQuantizeMatMul": 1,
    "DynamicQuantizeLSTM": 1,
    "QAttention": 1,
}
_FLOAT = {
    "Conv": 1,
    "FusedConv": 1,
    "ConvTranspose": 1,
    "MatMul": 1,
    "FusedMatMul": 1,
    "Gemm": 1,
    "FusedGemm": 1,
    "Attention": 1,
    "LSTM": 1,
    "GRU": 1,
    "RNN": 1,
}


class Kernels(NamedTuple):
    """Layers by their names in training (nodes without a weight: operator and name of the node), in the order of computing."""

    int8: list[str]
    float: list[str]


def list_kernels(network: Path) -> Kernels:
    """Which products and convolutions of a bare network run in int8 on this machine, and which in float.

    Read from ONNX Runtime's own optimised graph (`optimized_model_filepath` in its page "Graph Optimizations"), at the level
    "extended", where int8 kernels are put in; the level above only changes the layout of memory, and weights' names with it.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "optimised.onnx")
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(path)
        open_session(str(network), options)
        model = onnx.load(path)
    # A node keeps its name where ONNX Runtime gives its weight another one.
    asked = {node.name: (node, weight) for node, weight in _products(onnx.load(network)) if node.name}
    kernels = Kernels([], [])
    for node, weight in _products(model):
        written, written_weight = asked.get(node.name, (node, None))
        (kernels.int8 if node.op_type in _INT8 else kernels.float).append(node_layer(written, written_weight or weight))
    return kernels


def _products(model: ModelProto) -> Iterator[tuple[NodeProto, str | None]]:
    """Each product and convolution, and its weight where it has one."""
    weights = {weight.name: weight.name for weight in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in weights:  # a weight that is dequantised is still that weight
            weights[node.output[0]] = node.input[0]
    for node in model.graph.node:
        place = _INT8.get(node.op_type, _FLOAT.get(node.op_type))
        if place is not None:
            yield node, weights.get(node.input[place])
