"""Weights of a Keras model by name, and what each of its layers gives, seen while the model answers as it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

from delest.frameworks.keras import building
from delest.frameworks.keras.optimizers import layers_of

SEEN_ROWS = 4  # whose outputs of layers are compared


def path_of(layer: Any) -> str:
    """As its weights have it before their own names."""
    return str(getattr(layer, "path", None) or layer.name)


def named_weights(model: keras.Model) -> dict[str, Any]:
    """The model's weights by path; where layers share one, each further has its number behind it."""
    named: dict[str, Any] = {}
    for variable in model.weights:
        name, number = variable.path, 1
        while name in named:
            number += 1
            name = f"{variable.path}#{number}"
        named[name] = variable
    return named


def changing(model: keras.Model) -> list[Any]:
    """The variables that a forward pass may change: statistics and seeds, not weights that were frozen."""
    frozen = {id(variable) for layer in layers_of(model) for variable in layer._trainable_variables}
    return [variable for variable in model.non_trainable_variables if id(variable) not in frozen]


def leave_answers(session: Any, feed: Any, path: Path) -> float:
    """The mean loss of a feed's rows in evaluation mode; what each layer gives for the first few of them is written to `path`, an .npz with `names` in the
    order in which layers finish and their arrays a0, a1, ..."""
    losses = np.concatenate([outputs.losses for outputs in session.outputs(feed)])
    first = next(iter(feed.ordered())).inputs
    inputs = keras.tree.map_structure(lambda array: array[:SEEN_ROWS], building.received(first, session.schema))
    found = answers_of_layers(session.model, building.tensors(inputs))
    arrays = [keras.ops.convert_to_numpy(keras.ops.cast(output, "float32")) for _, output in found]
    named = {f"a{number}": array for number, array in enumerate(arrays)}
    np.savez(path, names=np.array([layer for layer, _ in found]), **named)
    return float(losses.mean())


def answers_of_layers(model: keras.Model, inputs: Any) -> list[tuple[str, Any]]:
    """(path, output) of each innermost layer in the order in which they finish, in evaluation mode, the framework's tensors.

    A layer with several outputs is there once for each, and once for each call. One that goes through time step by step is looked at as a whole: on JAX
    what is inside has no values.
    """
    with _watched(model) as found:
        model(inputs, training=False)
    return found


@contextlib.contextmanager
def _watched(model: keras.Model) -> Iterator[list[tuple[str, Any]]]:
    found: list[tuple[str, Any]] = []
    stepping = [layer for layer in layers_of(model) if isinstance(layer, (keras.layers.RNN, keras.layers.TimeDistributed))]
    inside = {id(part) for layer in stepping for part in layers_of(layer) if part is not layer}
    innermost = [one for one in layers_of(model) if (one in stepping or len(layers_of(one)) == 1) and id(one) not in inside]
    for layer in innermost:
        object.__setattr__(layer, "call", _recording(layer, found))
    try:
        yield found
    finally:
        for layer in innermost:
            object.__delattr__(layer, "call")


def _traced(tensor: Any) -> bool:
    """Whether a tensor stands for values that are not there, as inside a loop on JAX."""
    if keras.backend.backend() != "jax":
        return False
    import jax

    return isinstance(tensor, jax.core.Tracer)


def _recording(layer: Any, found: list[tuple[str, Any]]) -> Any:
    called = layer.call

    def call(*args: Any, **kwargs: Any) -> Any:
        outputs = called(*args, **kwargs)
        found.extend((path_of(layer), one) for one in keras.tree.flatten(outputs) if hasattr(one, "shape") and not _traced(one))
        return outputs

    return call
