"""Split each batch into parts whose gradients add up to the whole batch's."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from delest.backends.torch.session import TorchSession


def apply(session: TorchSession, config: dict[str, Any]) -> None:
    session.parts = math.ceil(session.job.batch_size / config["rows"])
    session.evaluation_rows = config["rows"]
