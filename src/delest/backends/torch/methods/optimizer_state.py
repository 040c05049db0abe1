"""Put our AdamW with 8-bit moments in place of torch's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from delest import errors
from delest.backends.torch.adamw8bit import AdamW8bit

if TYPE_CHECKING:
    from delest.backends.torch.methods import Training


def apply(training: Training, config: dict[str, Any]) -> None:
    """Raises `BadInput` for another number of bits than 8, another optimizer than AdamW, or settings that ours does not have."""
    if config["bits"] != 8:
        raise errors.BadInput(f"optimizer_state: moments of {config['bits']} bits are not there, 8 are.")
    for i, optimizer in enumerate(training.optimizers):
        if not isinstance(optimizer, AdamW8bit):
            training.optimizers[i] = like(optimizer)


def like(given: torch.optim.Optimizer) -> AdamW8bit:
    """An optimizer with the given AdamW's groups and settings; moments that it has already are taken over, rounded."""
    if type(given) is not torch.optim.AdamW:
        raise errors.BadInput(f"optimizer_state: 8-bit moments are AdamW's, and the optimizer is {type(given).__name__}.")
    for setting in ("amsgrad", "maximize", "differentiable"):
        if any(group.get(setting) for group in given.param_groups):
            raise errors.BadInput(f"optimizer_state: AdamW with {setting} has no 8-bit form here.")
    taken = ("params", "lr", "betas", "eps", "weight_decay", "initial_lr")
    made = AdamW8bit([{name: group[name] for name in taken if name in group} for group in given.param_groups])
    for group in made.param_groups:
        for parameter in group["params"]:
            if "exp_avg" in given.state.get(parameter, {}):
                made.take_over(parameter, given.state[parameter])
    return made
