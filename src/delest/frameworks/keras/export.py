"""A Keras network as ONNX: by torch's exporter on torch, by tf2onnx on TensorFlow. On JAX, which has no exporter, and where the own one does not know an operation, it
is built again on another framework, in a process of its own, with the same weights.
"""

from __future__ import annotations

import importlib.util
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras

from delest import errors, processes, storage, tensors
from delest.frameworks.keras import building
from delest.frameworks.keras.optimizers import layers_of
from delest.frameworks.keras.pruning.architecture import NarrowFactory
from delest.frameworks.keras.session import KerasSession
from delest.job import Job
from delest.records.form import from_json, to_json
from delest.records.plan import Plan
from delest.records.source import Schema

_OPSET = 18  # torch's exporter's


def export_session(session: KerasSession, inputs: Any, path: Path) -> None:
    """Write a session's bare network as ONNX with a dynamic batch; its inputs are those of a `Feed`, images [B, C, H, W].

    Raises `BadInput` where the network has no ONNX form, or cannot be built on torch.
    """
    if half := sorted({layer.compute_dtype for layer in layers_of(session.model)} & {"bfloat16", "float16"}):
        raise errors.BadInput(
            f"the network computes in {half[0]} (its dtype policy), which ONNX Runtime has no layers for on a CPU. The trained model is kept; its "
            "weights fit the same network under the policy float32, as --init-from."
        )
    under = keras.backend.backend()
    faults: list[errors.DelestError] = []
    if under == "jax" and session.job.origin is None:
        raise errors.BadInput(
            "a network of Keras on JAX is exported by another process that builds it on torch, and a job given as Python objects cannot "
            "be built there: put it in a file, or train with KERAS_BACKEND=torch or tensorflow."
        )
    for other in sorted(_EXPORTERS, key=lambda name: name != under):
        try:
            if other == under:
                _EXPORTERS[under](session, inputs, path)
            elif session.job.origin is None or importlib.util.find_spec(other) is None:
                continue
            else:
                _export_under(other, session, inputs, path)
            return
        except (errors.BadInput, errors.ProbeFailed) as error:
            faults.append(error)
    raise faults[0]


def _export_under(other: str, session: KerasSession, inputs: Any, path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="delest-") as folder:
        weights = Path(folder, "weights.safetensors")
        with storage.written_atomically(weights) as file:
            tensors.write(file, session.weights())
        processes.call(
            "delest.frameworks.keras.export:export_rebuilt",
            session.job,
            environment={"KERAS_BACKEND": other},
            schema=to_json(session.schema),
            architecture=getattr(session.job.model, "architecture", None),
            weights=str(weights),
            path=str(path),
            positional=isinstance(inputs, tuple),
        )


def export_rebuilt(
    job: Job, *, schema: dict[str, Any], architecture: dict[str, Any] | None, weights: str, path: str, positional: bool
) -> dict[str, Any]:
    """`export_session` in a process whose Keras computes with torch or TensorFlow, for weights that were trained on another framework."""
    known = from_json(Schema, schema)
    if architecture is not None:
        job = replace(job, model=NarrowFactory(job, known, architecture))
    try:
        session = KerasSession(job, Plan(batch_size=job.batch_size, micro_batch=job.batch_size), known)
        session.load_weights(tensors.Arrays(Path(weights)))
    except errors.BadInput as error:
        raise errors.BadInput(
            f"the network is exported through {keras.backend.backend()}, where it could not be built again: {error} Write its layers "
            "with keras.ops to get a bundle; the trained model is kept."
        ) from error
    inputs = building.example(known)
    _EXPORTERS[keras.backend.backend()](session, tuple(inputs.values()) if positional else inputs, Path(path))
    return {}


def _from_tensorflow(session: KerasSession, inputs: Any, path: Path) -> None:
    """By names and layouts as `backends.torch.export.export_network` has them."""
    import tensorflow as tf
    import tf2onnx
    from keras.src.export.tf2onnx_lib import patch_tf2onnx  # for NumPy 2

    patch_tf2onnx()
    named = inputs if isinstance(inputs, dict) else {"x": inputs}
    if isinstance(inputs, tuple):
        named = {f"x{place}": array for place, array in enumerate(inputs)}
    signature = [tf.TensorSpec((None, *array.shape[1:]), array.dtype, name=name) for name, array in named.items()]

    def answer(*given: Any) -> Any:
        if isinstance(inputs, dict):
            return session.model(dict(zip(named, given, strict=True)), training=False)
        if isinstance(inputs, tuple):
            return session.model(list(given), training=False)
        turned = session.schema.is_image and building.channels_last()
        return session.model(tf.transpose(given[0], (0, 2, 3, 1)) if turned else given[0], training=False)

    try:
        proto, _ = tf2onnx.convert.from_function(
            tf.function(answer, input_signature=signature, autograph=False), signature, opset=_OPSET
        )
    except Exception as error:
        raise _no_form(error) from error
    used = {node.domain for node in proto.graph.node} | {""}
    kept = [one for one in proto.opset_import if one.domain in used]
    del proto.opset_import[:]
    proto.opset_import.extend(kept)
    if len(proto.graph.output) == 1 and "output" not in named:
        last = proto.graph.output[0].name
        proto.graph.output[0].name = "output"
        for node in proto.graph.node:
            for ends in (node.input, node.output):
                ends[:] = ["output" if name == last else name for name in ends]
    storage.write_atomic(path, proto.SerializeToString())


def _from_torch(session: KerasSession, inputs: Any, path: Path) -> None:
    import torch

    from delest.backends.torch.export import export_network

    class Network(torch.nn.Module):
        """The Keras model behind the inputs that a bundle's preprocessing gives: a torch.nn.Module as well, on torch."""

        def __init__(self) -> None:
            super().__init__()
            self.network = session.model

        def forward(self, *inputs: Any, **named: Any) -> Any:
            given: Any = named or (inputs[0] if len(inputs) == 1 else list(inputs))
            if session.schema.is_image and building.channels_last():
                given = given.permute(0, 2, 3, 1)
            return self.network(given, training=False)

    try:
        export_network(Network(), inputs, path)
    except errors.BadInput as error:
        raise _no_form(error.__cause__ or error) from error


def _no_form(error: BaseException) -> errors.BadInput:
    return errors.BadInput(
        f"the network cannot be written as ONNX: {building.where(error)}. The trained model is kept; replace that operation to get a bundle."
    )


_EXPORTERS = {"torch": _from_torch, "tensorflow": _from_tensorflow}
