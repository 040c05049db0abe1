"""PyTorch behind the `Backend` protocol."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from delest.backends.torch import optimizers
from delest.backends.torch.lean import bare_step
from delest.backends.torch.session import TorchSession
from delest.job import Recipe

if TYPE_CHECKING:
    from collections.abc import Mapping

    from delest.backends.torch.distillation import StudentSession
    from delest.backends.torch.pruning.pruner import Pruner
    from delest.job import Job
    from delest.records.plan import Plan
    from delest.records.source import Schema


class TorchBackend:
    """The PyTorch backend."""

    name = "torch"

    def warm(self) -> None:
        """Load what a first step loads, so that readings of memory start after it."""
        layer = torch.nn.Linear(8, 8)
        (optimizer,) = optimizers.build(layer, Recipe())
        layer(torch.ones(4, 8)).sum().backward()
        bare_step(optimizer)()

    def session(self, job: Job, plan: Plan, schema: Schema) -> TorchSession:
        return TorchSession(job, plan, schema)

    def export(self, session: TorchSession, inputs: Any, path: Path) -> None:
        from delest.backends.torch.export import export_network

        export_network(session.exportable(), inputs, path)

    def pruner(self, session: TorchSession, job: Job, architecture: Mapping[str, Any] | None, inputs: Any) -> Pruner:
        """What makes a session's network narrower; see `pruning.pruner`."""
        from delest.backends.torch.pruning.pruner import Pruner

        return Pruner(session, job, architecture, inputs)

    def narrower(self, job: Job, schema: Schema, architecture: Mapping[str, Any]) -> Job:
        """The job with a factory of the narrower network."""
        from delest.backends.torch.pruning.pruner import narrower_job

        return narrower_job(job, schema, architecture)

    def student(self, job: Job, plan: Plan, schema: Schema, teacher: TorchSession, *, rows: int, keep: bool) -> StudentSession:
        """A session that learns from targets and from a trained session; `rows` and `keep` as `distillation.Teacher` has them."""
        from delest.backends.torch.distillation import StudentSession, Teacher

        return StudentSession(job, plan, schema, Teacher(teacher, rows=rows, keep=keep))
