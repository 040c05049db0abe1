"""The graph that ships: preprocessing in front of the bare network, probabilities or units behind it.

Everything that stands between a raw row and the network's input in training is inside, so that a program which runs the
bundle cannot standardise wrongly.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import delest
from delest.bundle.lean import make_lean

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from onnx import ModelProto, NodeProto

    from delest.data import Preprocessing
    from delest.records.source import Column, Schema

# softmax, sigmoid: logits become probabilities; probabilities: the network gives them itself; value: back to the target's
# units; logits: those of a text's next tokens, as they are; none: outputs as they are.
Head = Literal["softmax", "sigmoid", "probabilities", "value", "logits", "none"]
_PREFIX = "network/"
_OPSET = 18  # the first whose Resize has antialias


def assemble(network: ModelProto, preprocessing: Preprocessing) -> ModelProto:
    """The bundle's model: raw inputs to `probabilities` float32 [B, K], `value` float32 [B], `logits` float32 [B, T, V] or the network's own outputs.

    `network` takes inputs as `Schema` says, by the names that the export gives them. Raw inputs are `image` uint8 [B, H, W, C];
    arrays and tokens (int64 [B, T]) by column name as stored; of a table each column, float64 [B] with NaN for missing or string [B].
    """
    schema = preprocessing.schema
    inner = onnx.compose.add_prefix(network, _PREFIX)
    front, back = _Nodes("/front"), _Nodes("/back")
    inputs = _put_in_front(front, preprocessing, inner.graph.input[0].name)
    outputs = _put_behind(back, head(network, schema), preprocessing, inner, {value.name for value in inputs})
    whole = helper.make_graph(
        [*front.nodes, *inner.graph.node, *back.nodes],
        "delest",
        inputs,
        outputs,
        [*front.constants, *inner.graph.initializer, *back.constants],
    )
    imports = {entry.domain: entry.version for entry in network.opset_import}
    imports[""] = max(imports.get("", 0), _OPSET)
    if schema.categories:
        imports["ai.onnx.ml"] = max(imports.get("ai.onnx.ml", 0), 3)
    model = helper.make_model(
        whole,
        functions=list(inner.functions),
        opset_imports=[helper.make_opsetid(domain, version) for domain, version in imports.items()],
        ir_version=network.ir_version,
        producer_name="delest",
        producer_version=delest.__version__,
    )
    helper.set_model_props(
        model, {"delest": delest.__version__, **({"labels": json.dumps(schema.classes)} if schema.classes else {})}
    )
    make_lean(model)
    onnx.checker.check_model(model)
    return model


def head(network: ModelProto, schema: Schema) -> Head:
    """What has to follow the network, by the target and the shape of its output."""
    if schema.target is None or schema.target.kind == "array" or len(network.graph.output) != 1:
        return "none"
    output = network.graph.output[0]
    shape = [dimension.dim_value or None for dimension in output.type.tensor_type.shape.dim]
    single = len(shape) == 1 or (len(shape) == 2 and shape[1] == 1)
    if schema.target.kind == "number":
        return "value" if single else "none"
    if schema.target.kind == "tokens":
        return "logits" if len(shape) == 3 and shape[2] == schema.outputs else "none"
    last = next((node.op_type for node in network.graph.node if output.name in node.output), "")
    classes = len(schema.classes or ())
    if len(shape) == 2 and shape[1] == classes:
        return "probabilities" if last == "Softmax" else "softmax"
    return "sigmoid" if single and classes == 2 and last != "Sigmoid" else "none"


def input_name(column: Column) -> str:
    """Name of a raw input in the graph: `image`, or the column's (`column` for a column without a name)."""
    return "image" if column.kind == "image" else column.name or "column"


class _Nodes:
    """Nodes and constants that are added to a graph, with names of their own."""

    def __init__(self, prefix: str):
        self.prefix = prefix
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []

    def constant(self, values: Any, dtype: Any = np.int64) -> str:
        name = f"{self.prefix}/constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def add(self, kind: str, *inputs: str, output: str | None = None, domain: str = "", **attributes: Any) -> str:
        """A node with one output, whose name is returned."""
        output = output or f"{self.prefix}/value{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], domain=domain, **attributes))
        return output


# In front


def _put_in_front(front: _Nodes, preprocessing: Preprocessing, first: str) -> list[onnx.ValueInfoProto]:
    """Nodes from raw inputs to the network's (`first` is the name of a single one); returns the raw inputs."""
    schema = preprocessing.schema
    if schema.is_image:
        return [_add_image(front, preprocessing, schema.inputs[0], first)]
    if schema.is_table:
        if schema.numbers:
            _add_numbers(front, preprocessing, _PREFIX + "numbers" if schema.categories else first)
        if schema.categories:
            _add_categories(front, schema.categories)
        return [
            _tensor(input_name(column), np.dtype("float64" if column.kind == "number" else object), ["batch"])
            for column in schema.inputs
        ]
    for column in schema.inputs:
        _add_array(front, preprocessing, column, first if len(schema.inputs) == 1 else _PREFIX + column.name)
    return [_tensor(input_name(column), np.dtype(column.dtype), ["batch", *column.shape]) for column in schema.inputs]


def _add_image(front: _Nodes, preprocessing: Preprocessing, column: Column, output: str) -> onnx.ValueInfoProto:
    height, width, channels = column.shape
    pixels = "image"
    sides: tuple[int | str, ...] = (height, width)
    if preprocessing.image_size is not None:
        pixels, sides = _add_fit(front, pixels, preprocessing.image_size), ("height", "width")
    planes = front.add("Transpose", front.add("Cast", pixels, to=TensorProto.FLOAT), perm=[0, 3, 1, 2])
    mean, scale = (values.reshape(-1, 1, 1) for values in _moments(preprocessing, column))
    scaled = front.add("Mul", planes, front.constant(scale, np.float32))
    front.add("Sub", scaled, front.constant(mean * scale, np.float32), output=output)
    return _tensor("image", np.dtype("uint8"), ["batch", *sides, channels])


def _add_fit(front: _Nodes, pixels: str, side: int) -> str:
    """Shorter side to `side` and the middle cut out, as `data.images.fit` does: uint8 [B, H, W, C] to [B, side, side, C].

    `exclude_outside` makes ONNX Runtime's antialiased filter that of Pillow (within one level of 255).
    """
    shape = front.add("Shape", pixels)
    sides = front.add("Slice", shape, front.constant([1]), front.constant([3]))
    shorter = front.add("ReduceMin", sides, keepdims=1)
    # In integers, since float32 rounds sides of large pictures: floor(sides * side / shorter + 1/2).
    doubled = front.add("Add", front.add("Mul", sides, front.constant([2 * side])), shorter)
    resized = front.add("Div", doubled, front.add("Mul", shorter, front.constant([2])))
    sizes = front.add(
        "Concat",
        front.add("Slice", shape, front.constant([0]), front.constant([1])),
        resized,
        front.add("Slice", shape, front.constant([3]), front.constant([4])),
        axis=0,
    )
    larger = front.add("Resize", pixels, "", "", sizes, mode="linear", antialias=1, exclude_outside=1)
    start = front.add("Div", front.add("Sub", resized, front.constant([side])), front.constant([2]))
    return front.add("Slice", larger, start, front.add("Add", start, front.constant([side])), front.constant([1, 2]))


def _add_numbers(front: _Nodes, preprocessing: Preprocessing, output: str) -> None:
    """Standardised number columns, 0 where missing, and behind them the 0/1 columns of `indicators`: float32 [B, D]."""
    columns = preprocessing.schema.numbers
    raw = _add_stack(front, [input_name(column) for column in columns])
    missing = front.add("IsNaN", raw)
    mean, scale = (
        np.concatenate(parts) for parts in zip(*(_moments(preprocessing, column) for column in columns), strict=True)
    )
    centred = front.add("Sub", raw, front.constant(mean, np.float64))
    scaled = front.add("Cast", front.add("Mul", centred, front.constant(scale, np.float64)), to=TensorProto.FLOAT)
    marked = [place for place, column in enumerate(columns) if column.name in preprocessing.indicators]
    numbers = front.add("Where", missing, front.constant(0, np.float32), scaled, output=None if marked else output)
    if marked:
        chosen = front.add("Gather", missing, front.constant(marked), axis=1)
        front.add("Concat", numbers, front.add("Cast", chosen, to=TensorProto.FLOAT), axis=1, output=output)


def _add_categories(front: _Nodes, columns: Sequence[Column]) -> None:
    """int64 codes [B, K] of string columns; what is not known is 0."""
    codes = [
        front.add(
            "LabelEncoder",
            input_name(column),
            domain="ai.onnx.ml",
            keys_strings=list(column.categories or ("",)),
            values_int64s=list(range(1, len(column.categories) + 1)) if column.categories else [0],
            default_int64=0,
        )
        for column in columns
    ]
    _add_stack(front, codes, output=_PREFIX + "categories")


def _add_array(front: _Nodes, preprocessing: Preprocessing, column: Column, output: str) -> None:
    if column.name not in preprocessing.mean:
        front.add("Cast", input_name(column), to=TensorProto.INT64, output=output)
        return
    mean, scale = (values.reshape(-1, *(1,) * (len(column.shape) - 1)) for values in _moments(preprocessing, column))
    exact = np.dtype("float64" if column.dtype == "int64" else "float32")
    floats = front.add("Cast", input_name(column), to=helper.np_dtype_to_tensor_dtype(exact))
    centred = front.add("Sub", floats, front.constant(mean, exact))
    scaled = front.add("Mul", centred, front.constant(scale, exact))
    front.add("Cast", scaled, to=TensorProto.FLOAT, output=output)


def _add_stack(front: _Nodes, columns: Sequence[str], output: str | None = None) -> str:
    """Columns [B] side by side, [B, len(columns)]: three nodes however many there are."""
    joined = front.add("Concat", *columns, axis=0)
    return front.add("Transpose", front.add("Reshape", joined, front.constant([len(columns), -1])), perm=[1, 0], output=output)


def _moments(preprocessing: Preprocessing, column: Column) -> tuple[NDArray, NDArray]:
    """Mean and 1 / deviation [channels or features] of a column."""
    mean, std = np.array(preprocessing.mean[column.name]), np.array(preprocessing.std[column.name])
    return mean, 1 / std


# Behind


def _put_behind(
    back: _Nodes, kind: Head, preprocessing: Preprocessing, network: ModelProto, taken: set[str]
) -> list[onnx.ValueInfoProto]:
    """Nodes from the network's outputs to the model's; returns those. An input of the same name gets precedence."""

    def free(name: str) -> str:
        return free(name + "_") if name in taken else name

    if kind == "none":
        outputs = []
        for value in network.graph.output:
            output = back.add("Identity", value.name, output=free(value.name.removeprefix(_PREFIX)))
            shape = [dimension.dim_value or None for dimension in value.type.tensor_type.shape.dim]
            dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            outputs.append(_tensor(output, dtype, ["batch", *shape[1:]] if shape else []))
        return outputs
    given = network.graph.output[0].name
    if kind == "logits":
        logits = back.add("Identity", given, output=free("logits"))
        return [
            _tensor(logits, np.dtype("float32"), ["batch", *preprocessing.schema.input_shape, preprocessing.schema.outputs])
        ]
    if kind == "value":
        spread = back.constant(preprocessing.target_std, np.float32)
        scaled = back.add("Mul", back.add("Reshape", given, back.constant([-1])), spread)
        value = back.add("Add", scaled, back.constant(preprocessing.target_mean, np.float32), output=free("value"))
        return [_tensor(value, np.dtype("float32"), ["batch"])]
    name = free("probabilities")
    if kind == "sigmoid":
        second = back.add("Sigmoid", back.add("Reshape", given, back.constant([-1, 1])))
        back.add("Concat", back.add("Sub", back.constant(1, np.float32), second), second, axis=1, output=name)
    else:
        back.add("Softmax" if kind == "softmax" else "Identity", given, output=name)
    return [_tensor(name, np.dtype("float32"), ["batch", len(preprocessing.schema.classes or ())])]


def _tensor(name: str, dtype: np.dtype[Any], shape: Sequence[str | int | None]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), list(shape))
