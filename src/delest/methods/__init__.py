"""Training techniques, one file each: when one applies, what it does to the mathematics, how it reads in plain code.

Nothing here imports a framework. `delest.backends.torch.methods` holds a file of the same name that applies it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from delest.records.plan import Keeps

Stage = Literal["process", "build", "wrap", "loss", "optimizer", "backward", "step"]
NAMES = ("memory_format", "precision", "micro_batch")  # in the order in which they are applied


class Method(Protocol):
    """A module of this room."""

    STAGE: Stage

    def keeps(self, config: dict[str, Any], *, batch_statistics: bool) -> Keeps:
        """What the method does to the mathematics; `batch_statistics`: the model normalises over the batch."""

    def code(self, config: dict[str, Any]) -> str:
        """The equivalent plain PyTorch."""


def named(name: str) -> Any:
    """A method's module by its name."""
    return importlib.import_module(f"{__name__}.{name}")
