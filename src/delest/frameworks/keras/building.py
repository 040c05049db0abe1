"""From a job to a `keras.Model`: by its factory, or from a `.keras` file, of which nothing is run that is not Keras's own."""

from __future__ import annotations

import json
import random
import re
import traceback
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras.src.utils.naming import reset_uids  # the public clear_session forgets the dtype policy as well

from delest import errors
from delest.job import Job, takes_schema
from delest.records.source import Schema

_CODE = {"Lambda", "__lambda__", "TorchModuleWrapper"}  # layers and values that hold Python code or pickles
_PACKAGES = ("keras", "builtins")  # of what a file may name; builtins is how Keras writes its own functions


@dataclass(frozen=True, kw_only=True)
class KerasSchema(Schema):
    """The schema as a factory of a Keras model sees it: images are [B, H, W, C] where Keras has the channels last."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        if self.is_image and channels_last():
            return self.inputs[0].shape
        return super().input_shape


def channels_last() -> bool:
    """Whether images reach the model as [B, H, W, C] (keras.json, `keras.config.set_image_data_format`)."""
    return bool(keras.config.image_data_format() == "channels_last")


def build(job: Job, schema: Schema) -> keras.Model:
    """The model of a job, built and called once on two rows of zeros; weights that its factory or its file brings are kept.

    Names of layers are counted anew, so that each build in a process gives the same names. Raises `BadInput` where the
    factory raises, for a file that holds code, and for a model that does not take its inputs or ends in a softmax.
    """
    reset_uids()
    _seed_all(job.seed)
    model = _load(Path(job.model)) if isinstance(job.model, (str, Path)) else _make(job, schema)
    if not isinstance(model, keras.Model):
        raise errors.BadInput(f"the model factory gave a {type(model).__name__}, not a keras.Model.")
    outputs = _try(model, schema)
    if not model.trainable_variables:
        raise errors.BadInput("the model has no trainable weights: there is nothing to train.")
    _check_outputs(model, outputs, job, schema)
    _seed_all(job.seed)
    return model


def _seed_all(seed: int) -> None:
    """As `keras.utils.set_random_seed`, which loads TensorFlow wherever it is installed: 2 s and 200 MiB on JAX and torch."""
    under = keras.backend.backend()
    if under == "tensorflow":
        keras.utils.set_random_seed(seed)
        return
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if under == "torch":
        import torch

        torch.manual_seed(seed)


def _make(job: Job, schema: Schema) -> Any:
    assert callable(job.model)
    seen = KerasSchema(inputs=schema.inputs, target=schema.target)
    try:
        return job.model(seen) if takes_schema(job.model) else job.model()
    except errors.DelestError:
        raise
    except Exception as error:
        raise errors.BadInput(f"building the model failed: {where(error)}") from error


def where(error: BaseException) -> str:
    """An error of the user's code in one line: kind, first line, file and line of its innermost frame outside libraries."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename and "/delest/" not in frame.filename]
    place = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
    words = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # Keras prints in bold
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    kind = type(error).__name__
    if lines and lines[0] == "in user code:":  # TensorFlow tells its trace first
        first = next((place for place, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception|BadInput): ", line)), 0)
        named, _, words = lines[first].partition(": ")
        kind, lines = named.rpartition(".")[2], [words, *lines[first + 1 :]]
    return f"{kind}: {' '.join(lines[:2])}{place}"


def _try(model: keras.Model, schema: Schema) -> Any:
    """Outputs for two rows of zeros, by name or, where a model takes several arrays so, in order."""
    inputs = example(schema)
    forms = [inputs, tuple(inputs.values())] if isinstance(inputs, dict) and not schema.is_table else [inputs]
    faults = []
    for given in forms:
        try:
            return _answer(model, tensors(received(given, schema)))
        except Exception as error:
            faults.append(error)
    raise errors.BadInput(
        f"the model does not take its inputs ({_shapes(received(inputs, schema))}): {where(faults[0])}"
    ) from faults[0]


def _answer(model: keras.Model, inputs: Any) -> Any:
    """Outputs in evaluation mode; on JAX compiled as one, which takes a fifth of the time of compiling each operation."""
    if keras.backend.backend() != "jax" or not model.built:
        return model(inputs, training=False)
    import jax

    def answered(values: Any, given: Any) -> Any:
        with keras.StatelessScope(zip(model.variables, values, strict=True)):
            return model(given, training=False)

    return jax.jit(answered)([variable.value for variable in model.variables], inputs)


def _check_outputs(model: keras.Model, outputs: Any, job: Job, schema: Schema) -> None:
    """Raise `BadInput` for what a named loss cannot judge: it takes one tensor of scores before any softmax or sigmoid."""
    target = schema.target
    if target is None or not isinstance(job.loss, str):
        return
    if not hasattr(outputs, "shape"):
        raise errors.BadInput(
            f"the model gives a {type(outputs).__name__}; the loss {job.loss} takes one tensor: give the Job a loss of your own."
        )
    if target.kind == "number":
        return
    last = model.layers[-1] if model.layers else None
    activation = getattr(getattr(last, "activation", None), "__name__", type(last).__name__.lower())
    if activation not in ("softmax", "sigmoid") and _are_shares(outputs):
        activation = "softmax"  # in a layer inside another, or an operation
    if activation in ("softmax", "sigmoid"):
        raise errors.BadInput(
            f"the model ends in a {activation}, and the loss and the exported bundle apply one themselves: leave it out of the last layer "
            "(keras.layers.Dense(classes) without activation)."
        )
    wanted = {schema.outputs, 1} if schema.outputs == 2 and not schema.is_text else {schema.outputs}
    if len(outputs.shape) < 2 or outputs.shape[-1] not in wanted or (target.kind == "class" and len(outputs.shape) > 2):
        raise errors.BadInput(
            f"the model gives {tuple(outputs.shape[1:])} values a row; there are {schema.outputs} classes: let the last layer give [B, {schema.outputs}]."
        )


def _are_shares(outputs: Any) -> bool:
    """Whether each row of [B, K] is a distribution over classes."""
    values = keras.ops.convert_to_numpy(keras.ops.cast(outputs, "float32"))
    return values.ndim == 2 and values.shape[1] > 1 and bool((values >= 0).all()) and np.allclose(values.sum(1), 1, atol=1e-4)


# What a model receives


def example(schema: Schema) -> Any:
    """Two rows of zeros as a `Feed` gives them."""
    if schema.is_table:
        rows = {}
        if schema.number_width:
            rows["numbers"] = np.zeros((2, schema.number_width), np.float32)
        if not schema.categories:
            return rows["numbers"]
        return {**rows, "categories": np.zeros((2, len(schema.categories)), np.int64)}
    if len(schema.inputs) == 1:
        column = schema.inputs[0]
        shape = schema.input_shape if column.kind == "image" else column.shape
        return np.zeros((2, *shape), _dtype(column))
    return {column.name: np.zeros((2, *column.shape), _dtype(column)) for column in schema.inputs}


def _dtype(column: Any) -> str:
    whole = column.kind == "tokens" or (column.kind == "array" and column.dtype.startswith("int"))
    return "int64" if whole else "float32"


def received(inputs: Any, schema: Schema) -> Any:
    """A batch's inputs, NumPy, as the model receives them: images with the channels where Keras has them, a tuple as a list."""
    if isinstance(inputs, tuple):
        return list(inputs)
    if schema.is_image and channels_last():
        return np.ascontiguousarray(inputs.transpose(0, 2, 3, 1))
    return inputs


def tensors(value: Any) -> Any:
    """Tensors of the framework in place of NumPy arrays."""
    return keras.tree.map_structure(keras.ops.convert_to_tensor, value)


def _shapes(inputs: Any) -> str:
    if isinstance(inputs, dict):
        return ", ".join(f"{name} {list(array.shape)}" for name, array in inputs.items())
    return str(list(inputs.shape))


# Files


def _load(path: Path) -> Any:
    """The model of a `.keras` file, in safe mode; its configuration is read first, and refused before Keras sees it."""
    config = _config_of(path)
    if faults := list(dict.fromkeys(_code_in(config))):
        raise errors.BadInput(
            f"{path} is refused and nothing of it was run: it names {'; '.join(faults)}. Only layers of Keras are loaded from a file, and "
            "classes that the job's file registers with keras.saving.register_keras_serializable; for others, give a factory as the model."
        )
    try:
        return keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:
        raise errors.BadInput(f"{path} could not be loaded: {where(error)}") from error


def _config_of(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            return json.loads(archive.read("config.json"))
    except (OSError, zipfile.BadZipFile, KeyError, ValueError) as error:
        raise errors.BadInput(f"{path} is no .keras file of Keras 3: {type(error).__name__}: {error}") from error


def _code_in(config: Any) -> Iterator[str]:
    """What in a configuration is no object of Keras, in words."""
    if isinstance(config, list):
        for item in config:
            yield from _code_in(item)
    if not isinstance(config, dict):
        return
    name, module, registered = config.get("class_name"), config.get("module"), config.get("registered_name")
    known = isinstance(registered, str) and keras.saving.get_registered_object(registered) is not None
    if name in _CODE:
        yield f"a {name}, which holds code"
    elif name is not None and isinstance(module, str) and module.partition(".")[0] not in _PACKAGES and not known:
        yield f"{module}.{name}, which is not Keras's own"
    for value in config.values():
        yield from _code_in(value)
