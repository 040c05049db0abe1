"""Keep only the inputs of chosen modules; run their forward again when the backward pass needs what is inside.

The second forward draws the same random numbers and leaves buffers alone, so nothing changes but time and memory.
Source: Chen et al., "Training deep nets with sublinear memory cost", arXiv 1604.06174.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from delest.methods import Configs, Settings, Stage
    from delest.records.plan import Keeps

STAGE: Stage = "wrap"
SETTINGS: Settings = {"modules": list}


def keeps(config: dict[str, Any], *, batch_statistics: bool) -> Keeps:
    return "bitwise"


def conflicts(config: dict[str, Any], others: Configs) -> str | None:
    return None


def code(config: dict[str, Any]) -> str:
    names = ", ".join(repr(name) for name in config["modules"])
    return (
        f"import functools, torch.utils.checkpoint\nfor name in ({names},):\n"
        "    module = model.get_submodule(name)\n"
        "    module.forward = functools.partial(torch.utils.checkpoint.checkpoint, module.forward, use_reentrant=False)"
        "  # batch statistics then move twice a step"
    )
