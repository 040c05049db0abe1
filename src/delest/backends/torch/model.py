"""Building the user's model, or a starter where only data are given."""

from __future__ import annotations

import hashlib
import traceback
from typing import Any

from torch import nn

from delest import errors
from delest.backends.torch import starters
from delest.job import Job, takes_schema
from delest.records.source import Schema


def build(job: Job, schema: Schema) -> nn.Module:
    """The model of a job; weights that its factory loads are kept. Raises `BadInput` where the factory raises, and for layers without a shape."""
    if job.model is None:
        return starters.choose(schema)
    assert callable(job.model), "a file is never torch's"
    try:
        model = job.model(schema) if takes_schema(job.model) else job.model()
    except errors.DelestError:
        raise
    except Exception as error:
        raise errors.BadInput(f"building the model failed: {where(error)}") from error
    if any(kind.__module__.partition(".")[0] == "keras" for kind in type(model).__mro__):  # on torch, also an nn.Module
        raise errors.BadInput(
            f"the model factory gave a {type(model).__name__} of Keras where a torch module was expected: a Keras job's file imports keras at its top, "
            "and its factory gives a keras.Model."
        )
    if not isinstance(model, nn.Module):
        raise errors.BadInput(f"the model factory gave a {type(model).__name__}, not a torch.nn.Module.")
    lazy = [f"{name} ({type(part).__name__})" for name, part in model.named_modules() if _is_shapeless(part)]
    if lazy:
        raise errors.BadInput(
            f"these layers have no shape before a first batch: {', '.join(lazy)}. Give them their sizes, or let the factory call the model "
            "once on two rows as it receives them, as in model(torch.zeros(2, 1, 28, 28)), before it returns it."
        )
    return model


def _is_shapeless(module: nn.Module) -> bool:
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return any(nn.parameter.is_lazy(tensor) for tensor in own)


def where(error: BaseException) -> str:
    """An error of the user's code in one line: kind, message, file and line of its innermost frame outside libraries."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename and "/delest/" not in frame.filename]
    place = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {str(error).strip()}{place}"


def call(model: Any, inputs: Any) -> Any:
    """`model(inputs)`, `model(*inputs)` for a tuple, `model(**inputs)` for a mapping."""
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(inputs)


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """By what a plan knows its model again: how many `parameters` in how many `tensors`, and the SHA-256 of their `shapes`, in
    order; not their names, which differ from loop to loop."""
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tensors": len(shapes),
        "shapes": hashlib.sha256(repr(shapes).encode()).hexdigest(),
    }
