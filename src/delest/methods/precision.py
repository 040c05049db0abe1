"""Run matrix products and convolutions in bf16 under autocast; weights and optimizer stay in fp32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from delest.methods import Configs, Settings, Stage
    from delest.records.plan import Keeps

STAGE: Stage = "build"
SETTINGS: Settings = {"dtype": ("bf16",)}


def keeps(config: dict[str, Any], *, batch_statistics: bool) -> Keeps:
    return "changed"


def conflicts(config: dict[str, Any], others: Configs) -> str | None:
    return None


def code(config: dict[str, Any]) -> str:
    return "with torch.autocast('cpu', dtype=torch.bfloat16):\n    outputs = model(x)"
