"""Large weights stored as int8 and multiplied as float: a small file whose answers take as long as those of the float network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from delest import storage
from delest.shrinking.qdq import layer_name

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from onnx import GraphProto, NodeProto

_USERS = {
    "Conv",
    "ConvTranspose",
    "Gather",
    "Gemm",
    "GRU",
    "LSTM",
    "MatMul",
    "RNN",
}  # what takes a weight, not a mask or a table


def quantize_weights(network: Path, out: Path, *, least_bytes: int = 4096) -> list[str]:
    """Write a bare network whose float32 weights of `least_bytes` and more are int8 in the file, symmetric and by channel or row;
    returns the layers that they belong to, as named in training, the largest first.

    Rows of an embedding become float after they are looked up. All other weights become float by a cast and a product, which
    ONNX Runtime computes once, when it loads the file ("Constant Folding" in its page "Graph Optimizations"); a DequantizeLinear
    of a weight it would compute at every call. Weights that are int8 already stay: after `best_static`, this stores the embeddings
    that it leaves in fp32.
    """
    model = onnx.load(network)
    graph = model.graph
    nested = any(
        attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for node in graph.node for attribute in node.attribute
    )
    front: list[NodeProto] = []
    replaced: dict[str, list[NodeProto]] = {}
    stored = []
    for weight in _weights(graph, least_bytes):
        users = [node for node in graph.node if weight.name in node.input]
        lookups = [node for node in users if _is_lookup(node, weight.name)]
        axes = (0,) if lookups else _kept_axes(users[0], weight.name, len(weight.dims))
        values, steps = _quantised(numpy_helper.to_array(weight), axes)
        int8, scale = f"{weight.name}_int8", f"{weight.name}_step"
        graph.initializer.remove(weight)
        graph.initializer.extend([numpy_helper.from_array(values, int8), numpy_helper.from_array(steps, scale)])
        replaced |= {node.output[0]: _look_up(node, int8, scale) for node in lookups}
        if len(lookups) < len(users) or nested:
            front += _to_float(int8, scale, weight.name)
        stored.append((values.size, layer_name(weight.name)))
    nodes = [part for node in graph.node for part in replaced.get(node.output[0], [node])]
    del graph.node[:]
    graph.node.extend([*front, *nodes])
    storage.write_atomic(out, model.SerializeToString())
    return [name for _, name in sorted(stored, key=lambda item: -item[0])]


def _weights(graph: GraphProto, least_bytes: int) -> list[TensorProto]:
    """Large float32 tensors that nothing but layers takes."""
    users: dict[str, set[str]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, set()).add(node.op_type)
    given = {value.name for value in graph.input}
    return [
        weight
        for weight in graph.initializer
        if weight.data_type == TensorProto.FLOAT
        and len(weight.dims) > 1
        and 4 * np.prod(weight.dims) >= least_bytes
        and weight.name not in given
        and users.get(weight.name, {""}) <= _USERS
        and np.isfinite(numpy_helper.to_array(weight)).all()
    ]


def _is_lookup(node: NodeProto, weight: str) -> bool:
    return node.op_type == "Gather" and node.input[0] == weight and all(attribute.i == 0 for attribute in node.attribute)


def _kept_axes(node: NodeProto, weight: str, rank: int) -> tuple[int, ...]:
    """Axes of a weight along which each entry has a step of its own: the node's output channels."""
    if node.op_type == "MatMul":
        return (rank - 1,) if node.input[1] == weight else (rank - 2,)
    if node.op_type == "Gemm":
        transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        return (0,) if transposed else (1,)
    if node.op_type == "ConvTranspose":
        return (1,)
    return (0, 1) if node.op_type in ("LSTM", "GRU", "RNN") else (0,)


def _quantised(weight: NDArray, axes: tuple[int, ...]) -> tuple[NDArray, NDArray]:
    """int8 values and the float32 size of a step, of which there is one for each place along `axes`."""
    others = tuple(axis for axis in range(weight.ndim) if axis not in axes)
    largest = np.abs(weight).max(axis=others, keepdims=True)
    step = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    return np.rint(weight / step).astype(np.int8), step


def _look_up(node: NodeProto, int8: str, scale: str) -> list[NodeProto]:
    """Rows of an int8 table and their steps, multiplied."""
    output = node.output[0]
    rows, steps = f"{output}_int8", f"{output}_step"
    return [
        helper.make_node("Gather", [int8, node.input[1]], [rows], axis=0),
        helper.make_node("Gather", [scale, node.input[1]], [steps], axis=0),
        *_to_float(rows, steps, output),
    ]


def _to_float(int8: str, scale: str, output: str) -> list[NodeProto]:
    return [
        helper.make_node("Cast", [int8], [f"{int8}_float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{int8}_float", scale], [output]),
    ]
