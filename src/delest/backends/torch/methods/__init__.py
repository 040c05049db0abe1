"""How PyTorch applies each method of `delest.methods`, one file a method, by the same name."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from delest.backends.torch.session import TorchSession
    from delest.records.plan import Plan


def apply_all(plan: Plan, session: TorchSession) -> None:
    """Apply the plan's choices to a session, in the plan's order."""
    for choice in plan.choices:
        importlib.import_module(f"{__name__}.{choice.method}").apply(session, choice.config)
