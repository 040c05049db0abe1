"""Keep AdamW's two moments in 8 bits each with a scale for every 256 elements: 2 bytes a parameter in place of 8.

Source: Dettmers et al., "8-bit optimizers via block-wise quantization", arXiv 2110.02861.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from delest.methods import Configs, Settings, Stage
    from delest.records.plan import Keeps

STAGE: Stage = "optimizer"
SETTINGS: Settings = {"bits": (8,)}
BLOCK = 256  # elements that share a scale
LEAST = 4096  # elements; the moments of smaller tensors stay in fp32, as in section 2 of the source


def keeps(config: dict[str, Any], *, batch_statistics: bool) -> Keeps:
    return "changed"


def conflicts(config: dict[str, Any], others: Configs) -> str | None:
    optimizer = others.get("optimizer", {}).get("name", "adamw")
    if optimizer not in ("adamw", "adamw8bit"):
        return f"8-bit moments are AdamW's, and the optimizer is {optimizer}."
    return None


def code(config: dict[str, Any]) -> str:
    return "optimizer = torchao.optim.AdamW8bit(model.parameters())  # the nearest public one; delest's own needs no torchao"
