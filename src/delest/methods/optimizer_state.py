"""Keep AdamW's two moments in 8 or 4 bits each, with a scale for every block of elements: 2 bytes a parameter, or 1, in place of 8.

Sources: Dettmers et al., "8-bit optimizers via block-wise quantization", arXiv 2110.02861; Li, Chen and Zhu, "Memory efficient optimizers
with 4-bit states", arXiv 2309.01507.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from delest.methods import Configs, Settings, Stage
    from delest.records.plan import Keeps

STAGE: Stage = "optimizer"
SETTINGS: Settings = {"bits": (8, 4)}
BLOCKS = {8: 256, 4: 128}  # elements that share a scale, by the number of bits: the sources'
LEAST = 4096  # elements; the moments of smaller tensors stay in fp32, as in section 2 of the first source


def keeps(config: dict[str, Any], *, batch_statistics: bool) -> Keeps:
    return "changed"


def conflicts(config: dict[str, Any], others: Configs) -> str | None:
    optimizer = others.get("optimizer", {}).get("name", "adamw")
    if optimizer not in ("adamw", f"adamw{config.get('bits', 8)}bit"):
        return f"moments in few bits are AdamW's, and the optimizer is {optimizer}."
    return None


def code(config: dict[str, Any]) -> str:
    return (
        f"optimizer = torchao.optim.AdamW{config['bits']}bit(model.parameters())  "
        "# the nearest public one; delest's own needs no torchao"
    )
