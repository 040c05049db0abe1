"""Keep of AdamW's state the second moment alone, as the means of a matrix's rows and columns: nothing beside the weights.

Source: Shazeer and Stern, "Adafactor: adaptive learning rates with sublinear memory cost", arXiv 1804.04235.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from delest.methods import Configs, Settings, Stage
    from delest.records.plan import Keeps

STAGE: Stage = "optimizer"
SETTINGS: Settings = {}


def keeps(config: dict[str, Any], *, batch_statistics: bool) -> Keeps:
    return "changed"


def conflicts(config: dict[str, Any], others: Configs) -> str | None:
    if "optimizer_state" in others:
        return "a second moment of rows and columns leaves no moments to keep in fewer bits."
    optimizer = others.get("optimizer", {}).get("name", "adamw")
    if optimizer not in ("adamw", "factoredadamw"):
        return f"AdamW's second moment is what is factored, and the optimizer is {optimizer}."
    return None


def code(config: dict[str, Any]) -> str:
    return (
        "optimizer = transformers.Adafactor(\n"
        "    model.parameters(), lr=lr, weight_decay=decay, scale_parameter=False, relative_step=False\n"
        ")  # the nearest public one; delest's own needs no transformers and no room for a whole update"
    )
