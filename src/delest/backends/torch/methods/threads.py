"""Compute in so many threads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from delest.backends.torch.methods import Training


def apply(training: Training, config: dict[str, Any]) -> None:
    torch.set_num_threads(config["count"])
