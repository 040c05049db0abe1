"""What memory holds, in the one order, wording and look that the terminal and the page share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Look:
    """How a category is shown."""

    words: str
    block: str  # of the terminal's bar: patterns, since lines of text have no colours
    color: str  # a name that the page turns into its own


# What stays comes first, so that in a stack the moving parts lie on top of it. Blocks alternate in weight and direction: neighbours
# differ. The colours are those of Okabe and Ito's set (https://jfly.uni-koeln.de/color/), told apart with any colour vision.
LOOKS = {
    "runtime": Look("runtime", "░", "@quiet"),
    "parameters": Look("parameters", "█", "@parameters"),
    "buffers": Look("buffers", "▌", "@buffers"),
    "gradients": Look("gradients", "▒", "@gradients"),
    "optimizer": Look("optimizer state", "▀", "@optimizer"),
    "activations": Look("activations", "▓", "@activations"),
    "temporaries": Look("temporaries", "▚", "@temporaries"),
    "data": Look("data", "▄", "@data"),
}


def look(category: str) -> Look:
    return LOOKS.get(category) or Look(category.replace("_", " "), "▞", "@ink3")


def ordered(categories: Iterable[str]) -> list[str]:
    """Known categories in their order, then any others as they come."""
    found = list(categories)
    return [name for name in LOOKS if name in found] + [name for name in found if name not in LOOKS]
