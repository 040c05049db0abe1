"""Run the forward pass under autocast; weights, gradients and optimizer stay in fp32.

Source: https://docs.pytorch.org/docs/stable/amp.html
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from delest.backends.torch.methods import Training


def apply(training: Training, config: dict[str, Any]) -> None:
    training.autocast = {"bf16": torch.bfloat16}[config["dtype"]]
