"""Which layers lose most when they alone compute in int8 (Wu et al., "Integer Quantization for Deep Learning Inference",
arXiv 2004.09602, "Partial quantization")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime

from delest.shrinking.calibration import open_session
from delest.shrinking.qdq import COMPUTE, FOLLOWERS, insert

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from onnx import ModelProto

    from delest.shrinking.calibration import Ranges


def rank_layers(
    model: ModelProto, ranges: Ranges, batch: Mapping[str, NDArray], *, reduce_range: bool
) -> list[tuple[str, float]]:
    """Node names of a prepared network's layers and their errors, the worst first.

    The error is the squared difference that the layer's quantisation alone makes in the network's outputs over `batch`, as a share
    of the outputs' squares. A copy of the network is made and run for each layer, in simulated int8.
    """
    plain = _outputs(model, batch)
    power = sum(float(np.square(array).sum()) for array in plain) or 1.0
    ranked = []
    for node in model.graph.node:
        if node.op_type not in COMPUTE:
            continue
        followers = [other.name for other in model.graph.node if other.op_type in FOLLOWERS and other.input[0] in node.output]
        alone = _outputs(insert(model, ranges, reduce_range=reduce_range, only=[node.name, *followers]), batch)
        error = sum(float(np.square(given - wanted).sum()) for given, wanted in zip(alone, plain, strict=True)) / power
        ranked.append((node.name, error if np.isfinite(error) else np.inf))
    return sorted(ranked, key=lambda layer: -layer[1])


def _outputs(model: ModelProto, batch: Mapping[str, NDArray]) -> list[NDArray]:
    """Float outputs for a batch. Without optimisation, int8 is simulated in float: what is asked for is the rounding alone."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    outputs = open_session(model.SerializeToString(), options).run(None, dict(batch))
    return [array for array in outputs if array.dtype == np.float32]
