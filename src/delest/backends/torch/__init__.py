"""PyTorch behind the `Backend` protocol."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from delest.backends.torch import optimizers, randomness
from delest.backends.torch.lean import bare_step
from delest.backends.torch.session import TorchSession
from delest.job import Recipe

if TYPE_CHECKING:
    from collections.abc import Mapping

    from delest.backends.torch.distillation import StudentSession, Teacher
    from delest.backends.torch.pruning.pruner import Pruner
    from delest.job import Job
    from delest.records.plan import Plan
    from delest.records.source import Schema


class TorchBackend:
    """The PyTorch backend."""

    name = "torch"
    runtime = "PyTorch eager"

    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__}

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
        """What makes a session's network narrower; see `pruning.pruner`. A loss that draws random numbers draws the same ones each time."""
        from delest.backends.torch.pruning.pruner import Pruner

        randomness.seed_all(job.seed)
        return Pruner(session, job, architecture, inputs)

    def narrower(self, job: Job, schema: Schema, architecture: Mapping[str, Any]) -> Job:
        """The job with a factory of the narrower network."""
        from delest.backends.torch.pruning.pruner import narrower_job

        return narrower_job(job, schema, architecture)

    def teacher(self, session: TorchSession, feed: Any, *, keep: bool) -> Teacher:
        """A trained session as it teaches the rows of a feed; `keep` as `distillation.Teacher` has it."""
        from delest.backends.torch.distillation import Teacher

        teacher = Teacher(session, rows=int(max(feed.index)) + 1, keep=keep)
        teacher.answer_all(feed)
        return teacher

    def student(self, job: Job, plan: Plan, schema: Schema, teacher: Teacher) -> StudentSession:
        """A session that learns from targets and from a teacher."""
        from delest.backends.torch.distillation import StudentSession

        return StudentSession(job, plan, schema, teacher)
