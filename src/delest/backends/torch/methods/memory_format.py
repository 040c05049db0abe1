"""Keep images and convolution weights with the channels last in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from delest.backends.torch.methods import Training


def apply(training: Training, config: dict[str, Any]) -> None:
    training.memory_format = getattr(torch, config["format"])
    training.model.to(memory_format=training.memory_format)  # type: ignore[call-overload]
