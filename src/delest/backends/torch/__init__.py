"""PyTorch behind the `Backend` protocol."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from delest.backends.torch.session import TorchSession

if TYPE_CHECKING:
    from delest.job import Job
    from delest.records.plan import Plan
    from delest.records.source import Schema


class TorchBackend:
    """The PyTorch backend."""

    name = "torch"

    def session(self, job: Job, plan: Plan, schema: Schema) -> TorchSession:
        return TorchSession(job, plan, schema)

    def export(self, session: TorchSession, inputs: Any, path: Path) -> None:
        from delest.backends.torch.export import export_network

        export_network(session.exportable(), inputs, path)
