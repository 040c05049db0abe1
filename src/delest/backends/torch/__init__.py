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
