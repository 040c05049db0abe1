"""Split a batch into parts, forward and backward one after the other, and update once.

The parts' gradients are weighted by their rows, so they add up to the whole batch's: only the order of additions
changes. Statistics over the batch (batch normalisation) are then taken over a part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from delest.methods import Configs, Settings, Stage
    from delest.records.plan import Keeps

STAGE: Stage = "step"
SETTINGS: Settings = {"rows": int}


def keeps(config: dict[str, Any], *, batch_statistics: bool) -> Keeps:
    return "distribution" if batch_statistics else "rounding"


def conflicts(config: dict[str, Any], others: Configs) -> str | None:
    return None


def code(config: dict[str, Any]) -> str:
    return (
        f"for part in batch.split({config['rows']}):  # rows at once\n"
        "    (loss(model(part.x), part.y) * len(part) / len(batch)).backward()\n"
        "optimizer.step(); optimizer.zero_grad(set_to_none=True)"
    )
