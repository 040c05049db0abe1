"""The recipe's optimizer as one of Keras, with the settings of the torch optimizer of that name where Keras's differ."""

from __future__ import annotations

from typing import Any

import keras

from delest import errors
from delest.job import Recipe, unknown

# As for torch jobs (backends/torch/optimizers.py says where they come from), so that one recipe means the same.
DEFAULT_LR = {"adamw": 2e-3, "adam": 2e-3, "sgd": 0.05, "adadelta": 1.0}
DEFAULT_DECAY = {"adamw": 0.01, "sgd": 5e-4}


def build(model: keras.Model, recipe: Recipe) -> keras.optimizers.Optimizer:
    """The optimizer of a recipe, its state allocated. Weight decay is decoupled, and acts on matrices and kernels alone.

    Raises `BadInput` for an optimizer that has no counterpart in Keras, and settings that it does not take.
    """
    name = recipe.optimizer.lower()
    if name not in DEFAULT_LR:
        known = tuple(DEFAULT_LR)
        if name == "muon":
            raise errors.BadInput(
                "the optimizer muon of Keras scales its updates otherwise than delest's, so that no setting would carry over: "
                f"for a Keras job use one of {', '.join(known)}."
            )
        raise errors.BadInput(unknown("optimizer of a Keras job", recipe.optimizer, known))
    if recipe.momentum is not None and name != "sgd":
        raise errors.BadInput(f"momentum is {recipe.momentum:g}, which {name} does not take: leave it out, or use sgd.")
    settings: dict[str, Any] = {"learning_rate": DEFAULT_LR[name] if recipe.lr is None else recipe.lr}
    decay = DEFAULT_DECAY.get(name, 0.0) if recipe.weight_decay is None else recipe.weight_decay
    settings["weight_decay"] = decay or None
    if name == "adamw":
        optimizer = keras.optimizers.AdamW(epsilon=1e-8, **{**settings, "weight_decay": decay})
    elif name == "adam":
        optimizer = keras.optimizers.Adam(epsilon=1e-8, **settings)
    elif name == "sgd":
        momentum = 0.9 if recipe.momentum is None else recipe.momentum
        optimizer = keras.optimizers.SGD(momentum=momentum, nesterov=momentum > 0, **settings)
    else:
        optimizer = keras.optimizers.Adadelta(rho=0.9, epsilon=1e-6, **settings)
    optimizer.exclude_from_weight_decay(var_list=_undecayed(model))
    optimizer.build(model.trainable_variables)
    return optimizer


def _undecayed(model: keras.Model) -> list[Any]:
    """Biases, normalisation weights and embeddings, where decay has no regularising meaning."""
    embedded = {
        id(variable)
        for layer in layers_of(model)
        if isinstance(layer, keras.layers.Embedding)
        for variable in layer.trainable_variables
    }
    return [variable for variable in model.trainable_variables if len(variable.shape) < 2 or id(variable) in embedded]


def layers_of(layer: Any) -> list[Any]:
    """A layer and all layers inside it."""
    return list(layer._flatten_layers(include_self=True, recursive=True))
