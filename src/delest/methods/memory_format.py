"""Keep the channels of images last in memory, where convolutions are faster that way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from delest.methods import Configs, Settings, Stage
    from delest.records.plan import Keeps

STAGE: Stage = "build"
SETTINGS: Settings = {"format": ("channels_last",)}


def keeps(config: dict[str, Any], *, batch_statistics: bool) -> Keeps:
    return "rounding"


def conflicts(config: dict[str, Any], others: Configs) -> str | None:
    return None


def code(config: dict[str, Any]) -> str:
    return f"model.to(memory_format=torch.{config['format']})  # and the images"
