"""How long single layers take in ONNX Runtime on this machine: by these seconds, not by operations, cuts are weighed."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from delest.records.pruning import Layer

_CALLS, _LONGEST_SECONDS = 15, 0.15  # a layer is called so often, or for so long
_KINDS = ("convolution", "depthwise", "linear")


def time_layers(layers: Mapping[str, Layer], *, batch: int = 1, threads: int = 1) -> dict[str, float]:
    """Seconds of an answer that go with a layer's widths, by name, for `batch` rows: what it takes more than with half its inputs and outputs,
    times 4/3 (of a depthwise one half its channels, times 2). Layers of one shape are timed once."""
    known: dict[tuple[Any, ...], float] = {}
    found = {}
    for name, layer in layers.items():
        if layer.kind in _KINDS and min(_widths(layer)) >= 2:
            key = (
                layer.kind,
                layer.inputs[1:],
                layer.outputs[1:],
                layer.kernel,
                layer.stride,
                layer.padding,
                layer.dilation,
                layer.groups,
            )
            if key not in known:
                known[key] = _with_widths(layer, batch, threads)
            found[name] = known[key]
    return found


def suitable_step(threads: int = 1) -> int:
    """Of how many channels widths should be a multiple here, 4, 8 or 16: the smallest at which a convolution of 3 x 3 takes no longer a channel, beyond
    5 %, than at multiples of 16."""

    def layer(width: int) -> Layer:
        shape = (1, width, 14, 14)
        return Layer(
            name="",
            kind="convolution",
            parameters=0,
            inputs=shape,
            outputs=shape,
            kernel=(3, 3),
            stride=(1, 1),
            padding=(1, 1),
            dilation=(1, 1),
        )

    by_channel = dict.fromkeys((60, 56, 48, 64), 0.0)
    sessions = {width: _session(layer(width), width, width, 1, threads) for width in by_channel}
    times: dict[int, list[float]] = {width: [] for width in by_channel}
    for _ in range(_CALLS):
        for width, call in sessions.items():
            times[width].append(_seconds(call))
    by_channel = {width: statistics.median(values) / width**2 for width, values in times.items()}
    best = min(by_channel[48], by_channel[64])
    return 4 if by_channel[60] <= 1.05 * best else 8 if by_channel[56] <= 1.05 * best else 16


def _with_widths(layer: Layer, batch: int, threads: int) -> float:
    inner, outer = _widths(layer)
    whole = _session(layer, inner, outer, batch, threads)
    half = _session(layer, max(1, inner // 2), max(1, outer // 2), batch, threads)
    times: dict[str, list[float]] = {"whole": [], "half": []}
    began = time.perf_counter()
    for number in itertools.count():
        times["whole"].append(_seconds(whole))
        times["half"].append(_seconds(half))
        if number >= _CALLS or (number >= 3 and time.perf_counter() - began > _LONGEST_SECONDS):
            break
    more = statistics.median(times["whole"]) - statistics.median(times["half"])
    return max(0.0, more) * (2.0 if layer.kind == "depthwise" else 4 / 3)


def _widths(layer: Layer) -> tuple[int, int]:
    if layer.kind == "linear":
        return layer.inputs[-1], layer.outputs[-1]
    return layer.inputs[1], layer.outputs[1]


def _session(layer: Layer, inner: int, outer: int, batch: int, threads: int) -> Callable[[], object]:
    """A call of a layer like this one with other widths."""
    random = np.random.default_rng(0)
    if layer.kind == "linear":
        shape: tuple[int, ...] = (batch, *layer.inputs[1:-1], inner)
        weight = random.standard_normal((inner, outer), np.float32)
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
    else:
        shape = (batch, inner, *layer.inputs[2:])
        groups = (
            inner
            if layer.kind == "depthwise"
            else layer.groups
            if inner % layer.groups == 0 and outer % layer.groups == 0
            else 1
        )
        outer = outer // inner * inner if layer.kind == "depthwise" else outer
        weight = random.standard_normal((outer, inner // groups, *layer.kernel), np.float32)
        attributes: dict[str, Any] = {
            "kernel_shape": list(layer.kernel),
            "strides": list(layer.stride),
            "pads": [*layer.padding, *layer.padding],
            "dilations": list(layer.dilation),
            "group": groups,
        }
        node = helper.make_node("Conv", ["x", "w"], ["y"], **attributes)
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    given = {"x": random.standard_normal(shape, np.float32)}
    session.run(None, given)
    return lambda: session.run(None, given)


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
