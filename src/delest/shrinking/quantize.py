"""Static int8 quantisation of an ONNX network: 8-bit activations and weights around each matrix product and convolution."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from delest import storage

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from onnx import ModelProto

_COMPUTE = ("Conv", "MatMul", "Gemm")
# Relu and Clip compute nothing in int8: they disappear into the range of the quantisation before them, which is what lets
# ONNX Runtime hand 8-bit values from one convolution to the next.
_QUANTISED = (*_COMPUTE, "Relu", "Clip")


def quantize(network: Path, calibration: Iterable[Mapping[str, NDArray]], out: Path, *, reduce_range: bool) -> list[str]:
    """Write the int8 form of a bare network; returns the layers that now compute in int8, none where there is nothing to quantise.

    `calibration` are batches by ONNX input name: the range of each activation is the least and the largest value seen.
    Activations become uint8, weights int8, symmetric and by channel. `reduce_range` leaves weights one bit less: without the VNNI instructions
    the sum of two products of 8 bits overflows 16 (see "When and why do I need to try U8U8" and "reduce_range" in ONNX Runtime's
    page "Quantize ONNX Models"). Embeddings, and everything that is no convolution or matrix product, stay in fp32.
    """
    with tempfile.TemporaryDirectory(dir=out.parent) as folder, _quiet():
        prepared = Path(folder, "prepared.onnx")
        # Symbolic shape inference takes seconds and finds nothing that a convolution or matrix product needs.
        quant_pre_process(network, prepared, skip_symbolic_shape=True)
        quantised = Path(folder, "quantised.onnx")
        quantize_static(
            prepared,
            quantised,
            _Batches(calibration),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(_QUANTISED),
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"WeightSymmetric": True, "ActivationSymmetric": False},
        )
        model = onnx.load(quantised)
    _free_outputs(model)
    del model.graph.value_info[:]
    storage.write_atomic(out, model.SerializeToString())
    return _int8_layers(model)


class _Batches(CalibrationDataReader):
    """Batches as ONNX Runtime's calibration asks for them."""

    def __init__(self, batches: Iterable[Mapping[str, NDArray]]):
        self._batches = iter(batches)

    def get_next(self) -> dict[str, NDArray] | None:
        batch = next(self._batches, None)
        return None if batch is None else dict(batch)


def _free_outputs(model: ModelProto) -> None:
    """Leave the network's outputs in fp32: in 256 steps, scores of two classes can become equal."""
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


def _int8_layers(model: ModelProto) -> list[str]:
    """Names of the layers whose input and weight are 8-bit, as the weights are named in training."""
    weights = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    return [
        weights[node.input[1]].removesuffix("_quantized").removeprefix("network.").removesuffix(".weight")
        for node in model.graph.node
        if node.op_type in _COMPUTE and node.input[0] in weights and node.input[1] in weights
    ]


@contextmanager
def _quiet() -> Iterator[None]:
    """ONNX Runtime logs advice to preprocess the model, also where that was done."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)
