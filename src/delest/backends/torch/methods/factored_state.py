"""Put AdamW with a factored second moment in place of torch's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from delest.backends.torch.factored import FactoredAdamW
from delest.backends.torch.methods.optimizer_state import replace_adamw

if TYPE_CHECKING:
    from delest.backends.torch.methods import Training


def apply(training: Training, config: dict[str, Any]) -> None:
    """Raises `BadInput` for another optimizer than AdamW, or settings that ours does not have."""
    replace_adamw(training, "factored_state", FactoredAdamW, ("params", "lr", "weight_decay", "initial_lr"))
