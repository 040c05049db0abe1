"""A trained Keras network, made narrower step by step, as `shrinking` sees it: NumPy and names, no tensors."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from delest import errors
from delest.frameworks.keras import building, engines
from delest.frameworks.keras.building import where
from delest.frameworks.keras.layers import named_weights
from delest.frameworks.keras.pruning.architecture import clone, describe, rebuild, shapes_of, size_key
from delest.frameworks.keras.pruning.channels import Channels, Ids, sides, walk
from delest.frameworks.keras.session import KerasSession
from delest.job import Job
from delest.records.pruning import Layer, Width

_TAKING_AXIS = -2  # of kernels: channels that are taken in are the last axis but one, those that are made the last


@dataclass(frozen=True, kw_only=True)
class Found:
    """What can be made narrower, why the rest cannot, and the roots of each unit by width."""

    widths: tuple[Width, ...]
    whole: dict[str, str]
    layers: dict[str, Layer]
    units: dict[str, list[int]]


class Pruner:
    """A network being cut, and the session whose loss judges it."""

    def __init__(self, session: KerasSession, job: Job, architecture: Mapping[str, Any] | None, inputs: Any):
        """`session` has the trained network, `architecture` what it is already narrower by than the factory of `job` builds it; `inputs` are two rows as a
        `Feed` gives them. The session's network is not touched."""
        self.session, self._inputs = session, inputs
        fresh = building.build(job, session.schema)
        self._shapes = shapes_of(fresh)
        self._sizes: dict[str, dict[str, Any]] = {} if architecture is None else dict(architecture["layers"])
        self.model = fresh if architecture is None else rebuild(fresh, architecture)
        _fill(self.model, [keras.ops.convert_to_numpy(variable.value) for variable in session.model.weights])
        self._channels: Channels | None = None
        self._found: Found | None = None

    @property
    def widths(self) -> tuple[Width, ...]:
        return self.found.widths

    @property
    def layers(self) -> dict[str, Layer]:
        return self.found.layers

    @property
    def found(self) -> Found:
        """What can be made narrower. Without the first unit of each width the network is built once; where that fails nothing can."""
        if self._found is None:
            self._channels = walk(self.model)
            self._found = _find(self._channels)
            try:
                if self._found.widths:
                    self._narrowed({width.name: [0] for width in self._found.widths})
            except Exception as error:
                why = {**self._found.whole, self.model.name: f"without some of its units it cannot be built: {where(error)}"}
                self._found = Found(widths=(), whole=why, layers=self._found.layers, units={})
        return self._found

    def score(self, feed: Any, batches: int) -> dict[str, NDArray]:
        """What each unit is worth, float64 [units] by width: the mean over batches of the squared change in loss that a first-order expansion expects if
        it went (Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, section 3)."""
        found, session, model = self.found, self.session, self.model
        assert self._channels is not None
        places = _taken(self._channels)
        scores = {width.name: np.zeros(width.size) for width in found.widths}
        engine = engines.choose(model, session.optimizer, session.loss.mean, None)
        moving = [(variable, keras.ops.convert_to_numpy(variable.value)) for variable in model.non_trainable_variables]
        count = 0
        for batch in itertools.islice(feed.ordered(), batches):
            inputs, targets = session._tensors(batch.inputs), building.tensors(batch.targets)
            _, gradients = engine.gradient([(inputs, targets, 1.0)])
            change: dict[int, float] = {}
            for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
                if (place := places.get(variable.path)) is None:
                    continue
                weight = np.asarray(keras.ops.convert_to_numpy(variable.value), np.float64)
                product = np.moveaxis(weight * keras.ops.convert_to_numpy(gradient), place.axis, 0)
                for root, value in zip(place.roots, product.reshape(len(place.roots), -1).sum(1), strict=True):
                    change[int(root)] = change.get(int(root), 0.0) + float(value)
            for name, roots in found.units.items():
                scores[name] += np.square([change.get(root, 0.0) for root in roots])
            count += 1
        for variable, value in moving:  # statistics of normalisation, which a step in training mode moves
            variable.assign(value)
        return {name: score / max(1, count) for name, score in scores.items()}

    def cut(self, cuts: Mapping[str, Sequence[int]]) -> None:
        """Cut units off. Raises what stands in the way; the network is as before then."""
        self.model, self._sizes = self._narrowed(cuts)
        self._found = self._channels = None

    def parameters(self) -> int:
        return int(self.model.count_params())

    def architecture(self) -> dict[str, Any]:
        """How the network differs from what the factory builds, for `architecture.rebuild`."""
        return describe(self._sizes, self._shapes, self.model)

    def weights(self) -> dict[str, NDArray]:
        """Weights by path, copied; bf16 as uint16."""
        arrays = {name: keras.ops.convert_to_numpy(variable.value) for name, variable in named_weights(self.model).items()}
        return {name: np.array(one.view(np.uint16) if one.dtype.name == "bfloat16" else one) for name, one in arrays.items()}

    def _narrowed(self, cuts: Mapping[str, Sequence[int]]) -> tuple[keras.Model, dict[str, dict[str, Any]]]:
        """A model without these units, with the weights of what is left, and the sizes of its layers that are not the factory's."""
        found, channels = self.found, self._channels
        assert channels is not None
        if missing := [name for name in cuts if name not in found.units]:
            raise errors.BadInput(f"there is no width {', '.join(missing)}.")
        gone = {found.units[name][unit] for name, units in cuts.items() for unit in units}
        left = {(layer, side): np.array([int(root) not in gone for root in roots]) for layer, side, roots in sides(channels)}
        sizes = {name: dict(changed) for name, changed in self._sizes.items()}
        for path, layer in channels.layers.items():
            if isinstance(layer, keras.layers.Reshape):
                kept = int(np.isin(channels.roots(channels.through[path]), list(gone), invert=True).sum())
                sizes[path] = {"target_shape": [*layer.target_shape[:-1], kept]}
            elif path in channels.made and not left[path, "out"].all():
                sizes[path] = {size_key(layer): int(left[path, "out"].sum())}
        narrower = clone(self.model, sizes)
        arrays = []
        for variable in self.model.weights:
            array = keras.ops.convert_to_numpy(variable.value)
            path, _, name = variable.path.rpartition("/")
            for axis, side in _axes(channels.layers.get(path), name, array.ndim):
                if (path, side) in left:
                    array = np.compress(left[path, side], array, axis)
            arrays.append(array)
        _fill(narrower, arrays)
        return narrower, sizes


@dataclass(frozen=True)
class _Place:
    """Where channels are taken in: an axis of a kernel, and the root of each."""

    axis: int
    roots: Ids


def _find(channels: Channels) -> Found:
    """Channels that can go, by what takes and makes them."""
    where_of: dict[int, dict[tuple[str, str], None]] = {}
    makers: dict[int, str] = {}
    taken: set[int] = set()
    for layer, side, roots in sides(channels):
        for root in dict.fromkeys(int(one) for one in roots):
            where_of.setdefault(root, {})[layer, side] = None
            if side == "out" and layer in channels.made:
                makers.setdefault(root, layer)
            if side == "in":
                taken.add(root)
    groups: dict[tuple[str, tuple[tuple[str, str], ...]], list[int]] = {}
    for root, layer in makers.items():
        if root in taken and not channels.is_kept(root):
            groups.setdefault((layer, tuple(where_of[root])), []).append(root)
    widths: list[Width] = []
    units: dict[str, list[int]] = {}
    for (layer, both), members in groups.items():
        if len(members) < 2:
            continue
        name = layer if layer not in units else f"{layer}:{len(units)}"
        widths.append(Width(name=name, kind="channels", size=len(members), unit=1, sides=both))  # type: ignore[arg-type]
        units[name] = members
    return Found(widths=tuple(widths), whole=channels.whole, layers=channels.seen, units=units)


def _taken(channels: Channels) -> dict[str, _Place]:
    """By the path of a kernel, the axis on which it takes channels in."""
    found = {}
    for path, ids in channels.taken.items():
        for variable in channels.layers[path].weights:
            for axis, side in _axes(channels.layers[path], variable.path.rpartition("/")[2], len(variable.shape)):
                if side == "in":
                    found[variable.path] = _Place(axis, channels.roots(ids))
    return found


def _axes(layer: Any, name: str, rank: int) -> list[tuple[int, str]]:
    """(axis, side) of a layer's weight that go with its channels."""
    layers = keras.layers
    if layer is None:
        return []
    if isinstance(layer, layers.Embedding):
        return [(1, "out")]
    if isinstance(layer, (layers.DepthwiseConv1D, layers.DepthwiseConv2D)):
        return [(_TAKING_AXIS % rank if "kernel" in name else 0, "out")]
    if isinstance(layer, (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)):
        return [(rank - 2, "out"), (rank - 1, "in")] if name == "kernel" else [(0, "out")]
    if isinstance(layer, (layers.SeparableConv1D, layers.SeparableConv2D)):
        if name == "depthwise_kernel":
            return [(rank - 2, "in")] if layer.depth_multiplier == 1 else []
        return [(rank - 2, "in"), (rank - 1, "out")] if name == "pointwise_kernel" else [(0, "out")]
    return [(rank - 2, "in"), (rank - 1, "out")] if rank > 1 else [(0, "out")]


def _fill(model: keras.Model, arrays: Sequence[Any]) -> None:
    """Give a model weights in the order in which it has them. Raises `ValueError` where a shape is another."""
    for variable, array in zip(model.weights, arrays, strict=True):
        if tuple(variable.shape) != array.shape:
            raise ValueError(f"{variable.path} has shape {tuple(variable.shape)}, and would be given {array.shape}")
        variable.assign(keras.ops.convert_to_tensor(array, dtype=variable.dtype))
