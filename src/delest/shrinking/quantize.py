"""Int8 forms of a bare ONNX network: static, with ranges and layers chosen by how well they do, and dynamic."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import onnx
from onnxruntime import quantization

from delest.shrinking import qdq
from delest.shrinking.calibration import measure_ranges
from delest.shrinking.kernels import list_kernels
from delest.shrinking.sensitivity import rank_layers

if TYPE_CHECKING:
    from delest.shrinking.calibration import Batches, Ranges


class Static(NamedTuple):
    """What `best_static` wrote."""

    ranges: str  # how the activations' ranges were chosen
    score: float
    scores: dict[str, float]  # with all layers in int8, by ranges
    int8: list[str]  # layers that really compute in int8
    left_float: list[str]  # layers left in float since they lose most, the worst first


def best_static(
    network: Path,
    batches: Callable[[], Batches],
    out: Path,
    *,
    reduce_range: bool,
    judge: Callable[[Path], float],
    allowed: float = math.inf,
) -> Static:
    """Write the int8 form of a bare network that `judge` likes best.

    Activations become uint8, weights int8, symmetric and by channel. `reduce_range` leaves weights one bit less: without the VNNI instructions
    the sum of two products of 8 bits overflows 16 (see "When and why do I need to try U8U8" and "reduce_range" in ONNX Runtime's
    page "Quantize ONNX Models"). Embeddings, and everything that is no convolution or matrix product, stay in fp32.

    `batches()` gives calibration batches by ONNX input name, the same ones each time: it is called three times at most. `judge` scores a bare
    network, higher is better; it is asked about three choices of ranges (see `calibration`), and where the best of them scores more
    than `allowed` below the float network, with the layers that lose most left in float: at most a quarter of them, by bisection,
    so no more than 2 + log2(layers) times again. The fewest layers within `allowed` are left, or whatever scores highest.

    Raises `BadInput` where there is no calibration row.
    """
    model = qdq.prepare(network, out.parent)
    measured = measure_ranges(model, qdq.activations(model), batches) if qdq.activations(model) else {"min_max": {}}
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:

        def score(ranges: Ranges, left: Collection[str] = ()) -> float:
            trial = Path(folder, "trial.onnx")
            qdq.save(qdq.insert(model, ranges, reduce_range=reduce_range, without=left), trial)
            value = judge(trial)
            return value if not math.isnan(value) else -math.inf

        scores = {method: score(ranges) for method, ranges in measured.items()}
        method = max(scores, key=lambda name: scores[name])
        ranges, left, best = measured[method], list[str](), scores[method]
        floor = judge(network) - allowed if allowed < math.inf else -math.inf
        if best < floor:
            worst = [name for name, _ in rank_layers(model, ranges, next(iter(batches())), reduce_range=reduce_range)]
            count, best = _fewest(lambda count: score(ranges, worst[:count]), best, max(1, len(worst) // 4), floor)
            left = worst[:count]
    qdq.save(qdq.insert(model, ranges, reduce_range=reduce_range, without=left), out)
    weights = {weight.name for weight in model.graph.initializer}
    layers = {
        node.name: qdq.node_layer(node, node.input[1] if node.input[1] in weights else None)
        for node in model.graph.node
        if node.op_type in qdq.COMPUTE
    }
    return Static(method, best, scores, list_kernels(out).int8, [layers[name] for name in left])


def quantize_dynamic(network: Path, out: Path, *, reduce_range: bool) -> list[str]:
    """Write a bare network whose matrix products with a weight take their input's range anew at each call; returns their layers.

    It needs no calibration, and suits transformers, whose activations vary much from row to row and in which such products
    dominate ("Dynamic quantization" in ONNX Runtime's page "Quantize ONNX Models"). Convolutions stay in fp32.
    """
    with tempfile.TemporaryDirectory(dir=out.parent) as folder, qdq.quiet():
        dynamic = Path(folder, "dynamic.onnx")
        quantization.quantize_dynamic(
            qdq.prepare(network, out.parent),
            dynamic,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            reduce_range=reduce_range,
            weight_type=quantization.QuantType.QInt8,
        )
        model = onnx.load(dynamic)
    qdq.save(model, out)
    return [qdq.layer_name(node.input[1]) for node in model.graph.node if node.op_type == "MatMulInteger"]


def products_dominate(network: Path) -> bool:
    """Whether most weights that a network multiplies by are those of matrix products, so that dynamic int8 may pay."""
    graph = onnx.load(network).graph
    sizes = {weight.name: math.prod(weight.dims) for weight in graph.initializer}
    weights = {
        kinds: sum(sizes.get(node.input[1], 0) for node in graph.node if node.op_type in kinds)
        for kinds in (("MatMul", "Gemm"), ("Conv", "ConvTranspose"))
    }
    products, convolutions = weights.values()
    return products > convolutions


def _fewest(score: Callable[[int], float], none: float, most: int, floor: float) -> tuple[int, float]:
    """The least count in 1 to `most` whose score reaches `floor`, and that score; the best of those tried (0 scores `none`) where
    `most` does not. Scores are taken to rise with the count."""
    scores = {0: none, most: score(most)}
    if scores[most] < floor:
        return max(scores.items(), key=lambda item: item[1])
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        scores[middle] = score(middle)
        low, high = (low, middle) if scores[middle] >= floor else (middle, high)
    return high, scores[high]
