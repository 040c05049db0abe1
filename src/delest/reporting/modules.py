"""The modules of a footprint as a tree: which lies in which, and what each takes for itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from delest.records.footprint import Footprint, ModuleShare

# What a module's bytes can mostly be, with the category whose colour stands for it.
PARTS = {
    "parameters": "parameters",
    "optimizer": "gradients, optimizer state",
    "activations": "activations",
    "temporaries": "temporaries",
}


def parents(shares: Sequence[ModuleShare]) -> dict[str, str | None]:
    """The nearest module that each lies in and that is in the list too, None for those in no other."""
    names = {share.name for share in shares}
    found: dict[str, str | None] = {}
    for name in names:
        outer: str | None = name
        while outer:
            outer = outer.rpartition(".")[0]
            if outer in names:
                break
        found[name] = outer if outer in names and outer != name else None
    return found


def own_shares(shares: Sequence[ModuleShare]) -> list[ModuleShare]:
    """Each module with what it takes beyond the modules directly inside it, never below zero.

    A weight that two modules share counts in both, so that those inside may together exceed the one around them.
    """
    figures = ("parameter_bytes", "state_bytes", "activation_bytes", "peak_bytes", "seconds", "flops")
    outer = parents(shares)
    inside: dict[str | None, list[ModuleShare]] = {}
    for share in shares:
        inside.setdefault(outer[share.name], []).append(share)
    own = []
    for share in shares:
        changes: dict[str, Any] = {}
        for figure in figures:
            whole = getattr(share, figure)
            taken = sum(getattr(child, figure) or 0 for child in inside.get(share.name, ()))
            changes[figure] = None if whole is None else max(0, whole - taken)
        own.append(replace(share, **changes))
    return own


def weight(share: ModuleShare) -> int:
    """What modules are compared by: all that is live at the peak, or the parts that are known where the peak is not."""
    return share.peak_bytes or share.parameter_bytes + share.state_bytes + share.activation_bytes


def without_wrappers(shares: Sequence[ModuleShare]) -> list[ModuleShare]:
    """The modules that have any bytes, but not those that only hold one other; the whole model stays."""
    weighty = [share for share in shares if weight(share)]
    children = Counter(parents(weighty).values())
    own = zip(weighty, own_shares(weighty), strict=True)
    return [share for share, rest in own if not share.name or weight(rest) or children[share.name] != 1]


def hungriest(footprint: Footprint) -> list[ModuleShare]:
    """Modules by the bytes that they take for themselves, most first.

    Only what no module inside takes counts, so the rows add up, and one that merely wraps others does not appear.
    """
    own = [share for share in own_shares(footprint.modules) if weight(share)]
    return sorted(own, key=weight, reverse=True)


def mostly(share: ModuleShare) -> str:
    """The one of `PARTS` that most of a module's bytes are."""
    known = share.parameter_bytes + share.state_bytes + share.activation_bytes
    parts = {
        "parameters": share.parameter_bytes,
        "optimizer": share.state_bytes,
        "activations": share.activation_bytes,
        "temporaries": share.peak_bytes - known,
    }
    return max(parts, key=lambda part: parts[part])


def short_name(name: str, length: int) -> str:
    """A dotted name within a length, cut at its beginning: what tells modules apart is at the end."""
    if len(name) <= length:
        return name
    start = len(name) - length + 1
    whole_parts = name[name.find(".", start - 1) + 1 :]
    return "…" + (whole_parts if length // 2 <= len(whole_parts) < length else name[start:])
