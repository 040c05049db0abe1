"""Which channels of a functional model are the same thing, by one walk through its graph.

Each layer that makes channels (a convolution, a dense layer, an embedding) gets a number for each of them. Layers that handle every channel by itself hand the numbers
on; an addition makes two numbers one; a concatenation puts them behind one another; flattening repeats them. What a layer without a rule here is given, or gives, is kept
as it is. Channels with the same number in the end can only go together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import layers
from numpy.typing import NDArray

from delest.frameworks.keras.layers import path_of
from delest.records.pruning import Layer

Ids = NDArray[np.int64]  # of the last axis of a tensor, one for each channel

_MAKING = (layers.Dense, layers.Conv1D, layers.Conv2D, layers.Conv3D)
_TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
_SEPARABLE = (layers.SeparableConv1D, layers.SeparableConv2D)
_DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
_NORMS = (layers.BatchNormalization,)
_MERGES = (layers.Add, layers.Subtract, layers.Multiply, layers.Average, layers.Maximum, layers.Minimum)
_EACH_BY_ITSELF = (
    layers.Activation,
    layers.ReLU,
    layers.LeakyReLU,
    layers.ELU,
    layers.Identity,
    layers.ActivityRegularization,
    layers.Dropout,
    layers.SpatialDropout1D,
    layers.SpatialDropout2D,
    layers.SpatialDropout3D,
    layers.GaussianDropout,
    layers.GaussianNoise,
    layers.MaxPooling1D,
    layers.MaxPooling2D,
    layers.MaxPooling3D,
    layers.AveragePooling1D,
    layers.AveragePooling2D,
    layers.AveragePooling3D,
    layers.GlobalMaxPooling1D,
    layers.GlobalMaxPooling2D,
    layers.GlobalMaxPooling3D,
    layers.GlobalAveragePooling1D,
    layers.GlobalAveragePooling2D,
    layers.GlobalAveragePooling3D,
    layers.ZeroPadding1D,
    layers.ZeroPadding2D,
    layers.ZeroPadding3D,
    layers.Cropping1D,
    layers.Cropping2D,
    layers.Cropping3D,
    layers.UpSampling1D,
    layers.UpSampling2D,
    layers.UpSampling3D,
)
# Operations of keras.ops, by the names of their classes, which are not public.
_ELEMENTWISE = {
    "Relu",
    "Relu6",
    "Gelu",
    "Silu",
    "Sigmoid",
    "HardSigmoid",
    "HardSilu",
    "Tanh",
    "Elu",
    "LeakyRelu",
    "Abs",
    "Square",
}
_ELEMENTWISE_MERGES = {"Add", "Subtract", "Multiply", "Divide", "TrueDivide", "Maximum", "Minimum"}
_ACTIVATIONS = {  # that handle every channel by itself
    *(
        "",
        "linear",
        "relu",
        "relu6",
        "leaky_relu",
        "elu",
        "selu",
        "celu",
        "gelu",
        "silu",
        "swish",
        "sigmoid",
        "hard_sigmoid",
        "hard_silu",
    ),
    *(
        "hard_swish",
        "hard_tanh",
        "tanh",
        "tanh_shrink",
        "softplus",
        "softsign",
        "mish",
        "exponential",
        "log_sigmoid",
        "threshold",
    ),
    *("squareplus", "soft_shrink", "hard_shrink", "sparse_plus"),
}


@dataclass
class Channels:
    """What a walk found. `taken` and `made` are numbers by layer, on the sides of its kernel; `through` those that a layer handles one by one."""

    taken: dict[str, Ids] = field(default_factory=dict)
    made: dict[str, Ids] = field(default_factory=dict)
    through: dict[str, Ids] = field(default_factory=dict)
    layers: dict[str, Any] = field(default_factory=dict)  # by path, of those above and of reshapes
    seen: dict[str, Layer] = field(default_factory=dict)  # with the shapes of the first call
    whole: dict[str, str] = field(default_factory=dict)  # why channels are kept, by the layer that keeps them
    _parent: list[int] = field(default_factory=list)
    _kept: set[int] = field(default_factory=set)

    def new(self, count: int, *, kept: bool = False) -> Ids:
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        if kept:
            self._kept.update(range(first, first + count))
        return np.arange(first, first + count)

    def root(self, number: int) -> int:
        while self._parent[number] != number:
            self._parent[number] = self._parent[self._parent[number]]
            number = self._parent[number]
        return number

    def roots(self, ids: Ids) -> Ids:
        return np.array([self.root(int(one)) for one in ids], np.int64)

    def join(self, some: Ids, others: Ids) -> None:
        for one, other in zip(some, others, strict=True):
            a, b = self.root(int(one)), self.root(int(other))
            if a != b:
                self._parent[b] = a
                if b in self._kept:
                    self._kept.add(a)

    def keep(self, ids: Ids, layer: str, why: str) -> None:
        """None of these may go."""
        for one in ids:
            self._kept.add(self.root(int(one)))
        self.whole.setdefault(layer, why)

    def is_kept(self, root: int) -> bool:
        return root in self._kept


def walk(model: keras.Model) -> Channels:
    """The channels of a functional or sequential model; of another kind all are kept, and `whole` says so."""
    found = Channels()
    graph = _graph(model)
    if graph is None:
        found.whole[model.name] = (
            "only functional and sequential models of Keras can be made narrower, and this one has a `call` of its own"
        )
        return found
    if keras.config.image_data_format() != "channels_last":
        found.whole[model.name] = "models with the channels first cannot be made narrower: use channels_last"
        return found
    known = {id(tensor): found.new(_last(tensor.shape), kept=True) for tensor in graph.inputs}
    _walk(graph, known, found)
    for tensor in graph.outputs:
        found.keep(known[id(tensor)], model.name, "it makes the network's outputs")
    return found


def _graph(model: Any) -> Any:
    """The graph of a functional model; None where a model has none."""
    if isinstance(model, keras.Sequential):
        return model._functional
    if isinstance(model, keras.Model) and hasattr(model, "_nodes_by_depth"):
        return model
    return None


def _walk(graph: Any, known: dict[int, Ids], found: Channels) -> None:
    for depth in sorted(graph._nodes_by_depth, reverse=True):
        for node in graph._nodes_by_depth[depth]:
            if node.is_input or any(id(tensor) not in known for tensor in node.input_tensors):
                continue
            given = [known[id(tensor)] for tensor in node.input_tensors]
            for tensor, ids in zip(node.outputs, _outputs(node, given, found), strict=True):
                known[id(tensor)] = ids


def _outputs(node: Any, given: Sequence[Ids], found: Channels) -> list[Ids]:
    """Numbers of what an operation gives."""
    operation, shapes = node.operation, [tensor.shape for tensor in node.outputs]
    if (inner := _graph(operation)) is not None:
        known = {id(tensor): ids for tensor, ids in zip(inner.inputs, given, strict=True)}
        _walk(inner, known, found)
        return [known[id(tensor)] for tensor in inner.outputs]
    ids = _rule(operation, node, given, found) if len(shapes) == 1 else None
    if ids is None or len(ids) != _last(shapes[0]):
        name = path_of(operation)
        for one in given:
            found.keep(one, name, f"a {type(operation).__name__} takes its channels as they are")
        return [found.new(_last(shape), kept=True) for shape in shapes]
    return [ids]


def _rule(operation: Any, node: Any, given: Sequence[Ids], found: Channels) -> Ids | None:
    """Numbers of the only output; None where there is no rule."""
    kind, first = type(operation).__name__, given[0]
    last = getattr(operation, "data_format", "channels_last") == "channels_last"
    if not type(operation).__module__.startswith("keras.") or not last or _has_arrays(node):  # a subclass may do anything
        return None
    function = getattr(operation, "activation", None)
    if isinstance(operation, layers.Layer) and function is not None and _name_of(function) not in _ACTIVATIONS:
        return None
    if isinstance(operation, (*_MAKING, *_SEPARABLE, *_TRANSPOSED)):
        if getattr(operation, "groups", 1) != 1 or getattr(operation, "depth_multiplier", 1) != 1 or len(given) != 1:
            return None
        return _making(operation, node, first, found)
    if isinstance(operation, layers.Embedding):
        _see(operation, node, "other", found)
        return _made(operation, operation.output_dim, found)
    if isinstance(operation, _DEPTHWISE):
        if operation.depth_multiplier != 1:
            return None
        _see(operation, node, "depthwise", found)
        return _through(operation, first, found)
    if isinstance(operation, _NORMS):
        return _through(operation, first, found) if operation.axis in (-1, len(node.input_tensors[0].shape) - 1) else None
    if isinstance(operation, _EACH_BY_ITSELF) or (kind in _ELEMENTWISE and not isinstance(operation, layers.Layer)):
        return first
    if isinstance(operation, _MERGES) or (kind in _ELEMENTWISE_MERGES and not isinstance(operation, layers.Layer)):
        return _merged(given, found)
    if isinstance(operation, layers.Concatenate):
        rank = len(node.outputs[0].shape)
        if operation.axis in (-1, rank - 1):
            return np.concatenate(given)
        return _merged(given, found)
    if isinstance(operation, layers.Flatten):
        return np.tile(first, _last(node.outputs[0].shape) // max(1, len(first)))
    if isinstance(operation, layers.Reshape) and _last(node.outputs[0].shape) == len(first):
        found.through[path_of(operation)] = first  # its shape is part of how it is made
        found.layers[path_of(operation)] = operation
        return first
    return None


def _has_arrays(node: Any) -> bool:
    """Whether values for single channels are among what an operation is called with."""
    given = keras.tree.flatten([node.arguments.args, node.arguments.kwargs])
    return any(getattr(one, "ndim", 0) > 0 for one in given if not isinstance(one, keras.KerasTensor))


def _name_of(function: Any) -> str:
    """Of an activation of Keras's own; of another one that no rule knows."""
    return str(getattr(function, "__name__", "?")) if getattr(function, "__module__", "").startswith("keras.") else "?"


def _making(layer: Any, node: Any, ids: Ids, found: Channels) -> Ids:
    if path_of(layer) in found.taken:  # called before: what it is given then and now goes together
        found.join(found.taken[path_of(layer)], ids)
    else:
        found.taken[path_of(layer)] = ids
        kind = "linear" if isinstance(layer, layers.Dense) else "convolution" if isinstance(layer, layers.Conv2D) else "other"
        _see(layer, node, kind, found)
    return _made(layer, layer.units if isinstance(layer, layers.Dense) else layer.filters, found)


def _made(layer: Any, count: int, found: Channels) -> Ids:
    if path_of(layer) not in found.made:
        found.made[path_of(layer)], found.layers[path_of(layer)] = found.new(count), layer
    return found.made[path_of(layer)]


def _through(layer: Any, ids: Ids, found: Channels) -> Ids:
    if path_of(layer) in found.through:
        found.join(found.through[path_of(layer)], ids)
    found.through.setdefault(path_of(layer), ids)
    found.layers[path_of(layer)] = layer
    return ids


def _merged(given: Sequence[Ids], found: Channels) -> Ids | None:
    """One channel for all, where they have as many; a single one that is spread over the others is kept."""
    width = max(map(len, given))
    wide = [ids for ids in given if len(ids) == width]
    for ids in given:
        if len(ids) == 1 < width:
            found.keep(ids, "", "it is spread over other channels")
        elif len(ids) != width:
            return None
    for ids in wide[1:]:
        found.join(wide[0], ids)
    return wide[0]


def _see(layer: Any, node: Any, kind: Any, found: Channels) -> None:
    """Note a layer as it was called, with the channels in front as others have them."""
    before, after = node.input_tensors[0].shape, node.outputs[0].shape
    if any(size is None for size in (*before[1:], *after[1:])):
        kind = "other"
    is_convolution = kind in ("convolution", "depthwise")
    kernel = tuple(getattr(layer, "kernel_size", ()))
    dilation = tuple(getattr(layer, "dilation_rate", ()))
    same = getattr(layer, "padding", "valid") == "same"
    found.seen[path_of(layer)] = Layer(
        name=path_of(layer),
        kind=kind if kind != "depthwise" or isinstance(layer, layers.DepthwiseConv2D) else "other",
        parameters=layer.count_params(),
        inputs=_channels_first(before) if is_convolution else (1, *before[1:]),
        outputs=_channels_first(after) if is_convolution else (1, *after[1:]),
        kernel=kernel if is_convolution else (),
        stride=tuple(getattr(layer, "strides", ())) if is_convolution else (),
        padding=tuple(size // 2 if same else 0 for size in kernel) if is_convolution else (),
        dilation=dilation if is_convolution else (),
        groups=_last(before) if kind == "depthwise" else 1,
    )


def _channels_first(shape: Sequence[int]) -> tuple[int, ...]:
    return (1, shape[-1], *shape[1:-1])


def _last(shape: Sequence[int | None]) -> int:
    """The size of the last axis; 1 where there is none or it is not known."""
    return int(shape[-1] or 1) if len(shape) > 1 else 1


def sides(found: Channels) -> Iterator[tuple[str, str, Ids]]:
    """(layer, side, roots) for all sides of kernels, and of layers that handle channels one by one as their output."""
    for layer, ids in found.made.items():
        yield layer, "out", found.roots(ids)
    for layer, ids in found.taken.items():
        yield layer, "in", found.roots(ids)
    for layer, ids in found.through.items():
        if found.layers[layer].weights:
            yield layer, "out", found.roots(ids)
