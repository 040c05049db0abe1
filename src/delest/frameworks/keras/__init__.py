"""Keras behind the `Backend` protocol, on whichever of TensorFlow, JAX and torch Keras was loaded with (KERAS_BACKEND)."""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras

from delest.frameworks.keras.session import KerasSession

if TYPE_CHECKING:
    from collections.abc import Mapping

    from delest.frameworks.keras.pruning.pruner import Pruner
    from delest.job import Job
    from delest.records.plan import Plan
    from delest.records.source import Schema

_DISTRIBUTIONS = {"tensorflow": ("tensorflow", "tensorflow-cpu"), "jax": ("jax",), "torch": ("torch",)}


class KerasBackend:
    """The Keras backend."""

    name = "keras"

    @property
    def runtime(self) -> str:
        """What runs the trained network, in words."""
        return f"Keras on {keras.backend.backend()}"

    def versions(self) -> dict[str, str]:
        """Versions of Keras and of what it computes with."""
        under = keras.backend.backend()
        return {"keras": keras.__version__, under: _version(under)}

    def warm(self) -> None:
        """Load what a first step loads."""
        keras.ops.exp(keras.ops.ones((8, 8)))

    def session(self, job: Job, plan: Plan, schema: Schema) -> KerasSession:
        return KerasSession(job, plan, schema)

    def pruner(self, session: KerasSession, job: Job, architecture: Mapping[str, Any] | None, inputs: Any) -> Pruner:
        """What makes a session's network narrower; see `pruning.pruner`."""
        from delest.frameworks.keras.pruning.pruner import Pruner

        return Pruner(session, job, architecture, inputs)

    def narrower(self, job: Job, schema: Schema, architecture: Mapping[str, Any]) -> Job:
        """The job with a factory of the narrower network, with fresh weights."""
        from delest.frameworks.keras.pruning.architecture import NarrowFactory

        return replace(job, model=NarrowFactory(job, schema, architecture))

    def teacher(self, session: KerasSession, feed: Any, *, keep: bool) -> KerasSession:
        """A trained session, which answers when it is asked."""
        return session

    def student(self, job: Job, plan: Plan, schema: Schema, teacher: KerasSession) -> KerasSession:
        """A session that learns from targets and from a teacher."""
        from delest.frameworks.keras.distillation import StudentSession

        return StudentSession(job, plan, schema, teacher)

    def export(self, session: KerasSession, inputs: Any, path: Path) -> None:
        from delest.frameworks.keras.export import export_session

        export_session(session, inputs, path)


def _version(framework: str) -> str:
    for name in _DISTRIBUTIONS.get(framework, (framework,)):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"
