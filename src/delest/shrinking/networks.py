"""The networks that may ship: the trained one, and narrower ones that were made from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TRAINED = "trained"


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network with its weights, in a session."""

    name: str
    session: Any
    parameters: int
    architecture: Mapping[str, Any] | None = None  # how it differs from what the factory builds

    def form(self, kind: str) -> str:
        """The name of a form ("fp32", "int8", "dynamic", "weights") of this network."""
        return kind if self.name == TRAINED else self.name if kind == "fp32" else f"{self.name}-{kind}"
