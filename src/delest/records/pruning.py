"""What of a network can be made narrower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Width:
    """Units of a network that can only go together: channels of layers that are added to one another, or heads of an attention."""

    name: str  # of the layer that makes them, or of the attention
    kind: Literal["channels", "heads"]
    size: int  # how many units there are
    unit: int  # channels a unit has in the layer that makes them: of grouped convolutions one of each group, of a head all of its own
    sides: tuple[tuple[str, Literal["out", "in"]], ...]  # layers with parameters that get narrower with it, and on which side


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer with parameters, as a forward pass saw it."""

    name: str
    kind: Literal["convolution", "depthwise", "linear", "other"]
    parameters: int
    inputs: tuple[int, ...]  # shape of what it is given, its batch first
    outputs: tuple[int, ...]
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
