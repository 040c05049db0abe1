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

    def warm(self) -> None:
        """Load what the first optimizer step would load (about 100 MB and a second), so that readings of memory start after it."""
        import torch

        layer = torch.nn.Linear(8, 8)
        optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
        for _ in range(2):
            layer(torch.ones(4, 8)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    def session(self, job: Job, plan: Plan, schema: Schema) -> TorchSession:
        return TorchSession(job, plan, schema)

    def export(self, session: TorchSession, inputs: Any, path: Path) -> None:
        from delest.backends.torch.export import export_network

        export_network(session.exportable(), inputs, path)
