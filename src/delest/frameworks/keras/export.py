"""A Keras network as ONNX, always through torch's exporter: on TensorFlow and JAX it is built again on torch, in a process of its own,
with the same weights. (tf2onnx writes graphs with transpositions around every convolution, and JAX has no way to ONNX but through TensorFlow.)
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import keras

from delest import errors, processes, storage, tensors
from delest.frameworks.keras import building
from delest.frameworks.keras.session import KerasSession
from delest.job import Job
from delest.records.form import from_json, to_json
from delest.records.plan import Plan
from delest.records.source import Schema


def export_session(session: KerasSession, inputs: Any, path: Path) -> None:
    """Write a session's bare network as ONNX with a dynamic batch; its inputs are those of a `Feed`, images [B, C, H, W].

    Raises `BadInput` where the network has no ONNX form, or cannot be built on torch.
    """
    if keras.backend.backend() == "torch":
        _export(session, inputs, path)
        return
    under = keras.backend.backend()
    if session.job.origin is None:
        raise errors.BadInput(
            f"a network of Keras on {under} is exported by another process that builds it on torch, and a job given as Python objects cannot "
            "be built there: put it in a file, or train with KERAS_BACKEND=torch."
        )
    with tempfile.TemporaryDirectory(prefix="delest-") as folder:
        weights = Path(folder, "weights.safetensors")
        with storage.written_atomically(weights) as file:
            tensors.write(file, session.weights())
        processes.call(
            "delest.frameworks.keras.export:export_rebuilt",
            session.job,
            environment={"KERAS_BACKEND": "torch"},
            schema=to_json(session.schema),
            weights=str(weights),
            path=str(path),
            under=under,
            positional=isinstance(inputs, tuple),
        )


def export_rebuilt(
    job: Job, *, schema: dict[str, Any], weights: str, path: str, under: str, positional: bool
) -> dict[str, Any]:
    """`export_session` in a process whose Keras computes with torch, for weights that were trained `under` another framework."""
    known = from_json(Schema, schema)
    try:
        session = KerasSession(job, Plan(batch_size=job.batch_size, micro_batch=job.batch_size), known)
        session.load_weights(tensors.Arrays(Path(weights)))
    except errors.BadInput as error:
        raise errors.BadInput(
            f"the network was trained on {under} and is exported through torch, where it could not be built again: {error} Write its layers "
            "with keras.ops to get a bundle; the trained model is kept."
        ) from error
    inputs = building.example(known)
    _export(session, tuple(inputs.values()) if positional else inputs, Path(path))
    return {}


def _export(session: KerasSession, inputs: Any, path: Path) -> None:
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

    export_network(Network(), inputs, path)
