"""A float ONNX network with QuantizeLinear and DequantizeLinear around its layers, which ONNX Runtime turns into int8 kernels."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType, TensorsData
from onnxruntime.quantization.quant_utils import load_model_with_shape_infer
from onnxruntime.quantization.shape_inference import quant_pre_process

from delest import storage

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

    from delest.shrinking.calibration import Ranges

COMPUTE = ("Conv", "MatMul", "Gemm")
# Relu and Clip compute nothing in int8: they disappear into the range of the quantisation before them, which is what lets
# ONNX Runtime hand 8-bit values from one convolution to the next.
FOLLOWERS = ("Relu", "Clip")


def prepare(network: Path, folder: Path) -> ModelProto:
    """The network optimised, with the types of its tensors and a name for every node; `folder` holds files meanwhile."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary, quiet():
        prepared = Path(temporary, "prepared.onnx")
        # Symbolic shape inference takes seconds and finds nothing that a convolution or matrix product needs.
        quant_pre_process(network, prepared, skip_symbolic_shape=True)
        model = load_model_with_shape_infer(prepared)
    for place, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{place}"
    return model


def activations(model: ModelProto) -> list[str]:
    """Names of the float tensors that layers take and give, in the order of computing."""
    graph = model.graph
    floats = {
        value.name
        for value in (*graph.input, *graph.value_info, *graph.output)
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    } - {weight.name for weight in graph.initializer}
    nodes = [node for node in graph.node if node.op_type in (*COMPUTE, *FOLLOWERS)]
    return list(dict.fromkeys(name for node in nodes for name in (*node.input, *node.output) if name in floats))


def insert(
    model: ModelProto, ranges: Ranges, *, reduce_range: bool, only: Collection[str] = (), without: Collection[str] = ()
) -> ModelProto:
    """A copy of a prepared network in int8: activations uint8 over `ranges`, weights int8, symmetric and by channel.

    `only` and `without` name nodes. Scores stay in fp32: in 256 steps, those of two classes can become equal.
    """
    spans = {name: (np.float32(low), np.float32(high)) for name, (low, high) in ranges.items()}
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    with quiet():
        quantizer = QDQQuantizer(
            copy,
            True,  # weights by channel
            reduce_range,
            QuantType.QInt8,
            QuantType.QUInt8,
            TensorsData(CalibrationMethod.MinMax, spans),
            list(only),
            list(without),
            [*COMPUTE, *FOLLOWERS],
            {"WeightSymmetric": True, "ActivationSymmetric": False},
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
    quantised = quantizer.model.model
    _keep_float(quantised, without)
    _free_outputs(quantised)
    return quantised


def save(model: ModelProto, out: Path) -> None:
    """Write a network without the inferred shapes, which in a small one outweigh the weights."""
    del model.graph.value_info[:]
    storage.write_atomic(out, model.SerializeToString())


def node_layer(node: NodeProto, weight: str | None) -> str:
    """Name of the layer that a node computes: that of its weight in training, or operator and node where it has none."""
    return layer_name(weight) if weight else f"{node.op_type} {node.name}".rstrip()


def layer_name(weight: str) -> str:
    """The layer that a weight of an exported network belongs to, as it is named in training."""
    weight = re.sub(r"(_Transposed(_\d+)?)?(_quantized)?$", "", weight)  # what the quantiser appends
    return weight.removeprefix("network.").removesuffix(".weight")


@contextmanager
def quiet() -> Iterator[None]:
    """ONNX Runtime logs advice to preprocess the model, also where that was done."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)


def _keep_float(model: ModelProto, names: Collection[str]) -> None:
    """Part nodes that are to stay float from the DequantizeLinear before them by a Clip that changes nothing.

    Between int8 neighbours, ONNX Runtime would else quantise their weights when it loads the file (`WeightBiasQuantization` in its optimiser).
    """
    if not names:
        return
    lowest = onnx.numpy_helper.from_array(np.asarray(np.finfo(np.float32).min), "lowest_float")
    model.graph.initializer.append(lowest)
    weights = {weight.name for weight in model.graph.initializer}
    back = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] not in weights}
    parted: set[str] = set()
    nodes = []
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if node.name not in names or name not in back:
                continue
            if name not in parted:
                nodes.append(onnx.helper.make_node("Clip", [name, lowest.name], [f"{name}_float"], name=f"{name}_float"))
                parted.add(name)
            node.input[place] = f"{name}_float"
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _free_outputs(model: ModelProto) -> None:
    """Take the quantisation away from the network's outputs."""
    outputs = {value.name for value in model.graph.output}
    makers = {name: node for node in model.graph.node for name in node.output}
    readers = [name for node in model.graph.node for name in node.input]
    for name in outputs:
        back = makers.get(name)
        forth = makers.get(back.input[0]) if back is not None and back.op_type == "DequantizeLinear" else None
        if back is None or forth is None or forth.op_type != "QuantizeLinear":
            continue
        source = makers.get(forth.input[0])
        if source is None or readers.count(forth.input[0]) > 1 or readers.count(forth.output[0]) > 1:
            continue
        source.output[list(source.output).index(forth.input[0])] = name
        model.graph.node.remove(back)
        model.graph.node.remove(forth)
    used = {name for node in model.graph.node for name in node.input}
    unused = [weight for weight in model.graph.initializer if weight.name not in used]
    for weight in unused:
        model.graph.initializer.remove(weight)
