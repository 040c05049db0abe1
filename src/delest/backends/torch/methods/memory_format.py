"""Keep images and convolution weights with the channels last in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from delest.backends.torch.session import TorchSession


def apply(session: TorchSession, config: dict[str, Any]) -> None:
    session.memory_format = getattr(torch, config["format"])
    session.model.to(memory_format=session.memory_format)  # type: ignore[call-overload]
