"""Put our AdamW with moments of 8 or 4 bits in place of torch's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from delest import errors
from delest.backends.torch.piecewise import PiecewiseOptimizer
from delest.backends.torch.quantised_adamw import AdamW4bit, AdamW8bit

if TYPE_CHECKING:
    from delest.backends.torch.methods import Training

_KINDS = {8: AdamW8bit, 4: AdamW4bit}


def apply(training: Training, config: dict[str, Any]) -> None:
    """Raises `BadInput` for another number of bits than 8 or 4, another optimizer than AdamW, or settings that ours does not have."""
    if config["bits"] not in _KINDS:
        raise errors.BadInput(f"optimizer_state: moments of {config['bits']} bits are not there, 8 and 4 are.")
    replace_adamw(
        training, "optimizer_state", _KINDS[config["bits"]], ("params", "lr", "betas", "eps", "weight_decay", "initial_lr")
    )


def replace_adamw(training: Training, method: str, kind: Callable[..., PiecewiseOptimizer], settings: Sequence[str]) -> None:
    """Each AdamW of a training becomes one of this kind, with its groups and those of its settings that the kind has."""
    training.optimizers[:] = [one if type(one) is kind else like(one, method, kind, settings) for one in training.optimizers]


def like(
    given: torch.optim.Optimizer, method: str, kind: Callable[..., PiecewiseOptimizer], settings: Sequence[str]
) -> PiecewiseOptimizer:
    """An optimizer with the given AdamW's groups and settings, and with its state as far as the kind keeps it.

    Raises `BadInput`, naming the `method`, for another optimizer and for settings that have no such form.
    """
    if type(given) is not torch.optim.AdamW:
        raise errors.BadInput(f"{method}: it takes the place of AdamW, and the optimizer is {type(given).__name__}.")
    for setting in ("amsgrad", "maximize", "differentiable"):
        if any(group.get(setting) for group in given.param_groups):
            raise errors.BadInput(f"{method}: AdamW with {setting} has no such form here.")
    made = kind([{name: group[name] for name in settings if name in group} for group in given.param_groups])
    for group in given.param_groups:
        for parameter in group["params"]:
            if "exp_avg" in given.state.get(parameter, {}):
                made.take_over(parameter, given.state[parameter], group)
    return made
