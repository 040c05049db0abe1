"""How a narrower Keras network differs from the one that its factory builds, as JSON, and building it again from that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras
from keras import layers

from delest import errors
from delest.frameworks.keras.building import build, where
from delest.frameworks.keras.layers import named_weights, path_of
from delest.job import Job
from delest.records.source import Schema

_SIZES = ("filters", "units", "output_dim")  # of channels that a layer makes


@dataclass(frozen=True)
class NarrowFactory:
    """Builds the narrower network of a job, with fresh weights; another process can be told its architecture."""

    job: Job
    schema: Schema
    architecture: Mapping[str, Any]

    def __call__(self) -> keras.Model:
        return rebuild(build(self.job, self.schema), self.architecture)


def shapes_of(model: keras.Model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(variable.shape) for name, variable in named_weights(model).items()}


def size_key(layer: Any) -> str:
    """Which entry of a layer's configuration says how many channels it makes."""
    return next(key for key in _SIZES if hasattr(layer, key))


def clone(model: keras.Model, sizes: Mapping[str, Mapping[str, Any]]) -> keras.Model:
    """A functional or sequential model with other entries in the configurations of some layers, by path, and fresh weights."""

    def cloned(layer: Any) -> Any:
        if not isinstance(layer, layers.Layer):
            return layer  # an operation, which holds nothing
        config = layer.get_config()
        if (changed := sizes.get(path_of(layer))) is not None:
            config = {**config, **changed}
        made = type(layer).from_config(config)
        made.trainable = layer.trainable
        return made

    return keras.models.clone_model(model, clone_function=cloned, recursive=True)


def describe(
    sizes: Mapping[str, Mapping[str, Any]], before: Mapping[str, tuple[int, ...]], model: keras.Model
) -> dict[str, Any]:
    """What a network has become since it had the shapes `before`: `layers` (entries of configurations) and `tensors` (shape before and now)."""
    now = shapes_of(model)
    tensors = {name: {"before": list(before[name]), "now": list(shape)} for name, shape in now.items() if shape != before[name]}
    return {"layers": {name: dict(changed) for name, changed in sizes.items()}, "tensors": tensors}


def rebuild(model: keras.Model, architecture: Mapping[str, Any]) -> keras.Model:
    """The network of `describe`, with fresh weights, from the one that its factory builds. Raises `BadInput` naming what does not fit."""
    shapes = shapes_of(model)
    faults = [f"{name} is not in it" for name in architecture["tensors"] if name not in shapes]
    faults += [
        f"{name} has shape {list(shapes[name])}, {change['before']} was expected"
        for name, change in architecture["tensors"].items()
        if name in shapes and list(shapes[name]) != change["before"]
    ]
    if not faults:
        try:
            narrower = clone(model, architecture["layers"])
        except Exception as error:
            raise errors.BadInput(f"the narrower network cannot be built again: {where(error)}") from error
        now = shapes_of(narrower)
        faults += [
            f"{name} becomes {list(now.get(name, ()))}, {change['now']} was expected"
            for name, change in architecture["tensors"].items()
            if list(now.get(name, ())) != change["now"]
        ]
    if faults:
        raise errors.BadInput(
            f"the factory builds another network than the one that was made narrower: {'; '.join(faults[:5])}. Give the factory that the run was "
            "trained with."
        )
    return narrower
