"""Take chosen blocks one after the other over the parts of the batch: forward keeping only what enters a block, then, from the last
block to the first, forward again and backward part by part.

The activations of one block for one part are there at a time, and a block's gradients are complete as soon as its parts have gone:
updates in the backward pass go with it at the effective batch, which they do not with micro-batches. The parts' gradients add up to
the whole batch's, only the order of additions changes. Rows must not depend on each other within a block: layers that normalise over
the batch are refused, and the first step compares a few rows taken whole with the same rows taken in parts.
Sources: Lamy-Poirier, "Layered gradient accumulation and modular pipeline parallelism", arXiv 2106.02679, section 3; the order of
execution on one device: Pudipeddi et al., "Training large neural networks with constant memory using a new execution algorithm",
arXiv 2002.05645.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from delest.methods import Configs, Settings, Stage
    from delest.records.plan import Keeps

STAGE: Stage = "wrap"
SETTINGS: Settings = {"modules": list, "parts": int}


def keeps(config: dict[str, Any], *, batch_statistics: bool) -> Keeps:
    return "rounding"


def conflicts(config: dict[str, Any], others: Configs) -> str | None:
    if "micro_batch" in others:
        return "the batch is taken in parts block by block already; parts of the whole step would only be divided once more."
    mine = config.get("modules", ())
    theirs = others.get("activation_checkpointing", {}).get("modules", ())
    for name in mine:
        for other in theirs:
            if (
                name == other
                or name == ""
                or other == ""
                or f"{name}.".startswith(f"{other}.")
                or f"{other}.".startswith(f"{name}.")
            ):
                return f"the block {name!r} is recomputed part by part already, and activation_checkpointing names {other!r}: choose one for it."
    return None


def code(config: dict[str, Any]) -> str:
    return (
        "with torch.no_grad():  # keep what enters each block\n"
        "    for block in blocks:\n"
        "        entered.append(x)\n"
        f"        x = torch.cat([block(part) for part in x.chunk({config['parts']})])\n"
        "x.requires_grad_(); loss(head(x), y).backward(); gradient = x.grad\n"
        "for block, x in zip(reversed(blocks), reversed(entered)):  # dropout must draw again what it drew\n"
        f"    parts = [part.detach().requires_grad_() for part in x.chunk({config['parts']})]\n"
        "    for part, its in zip(parts, gradient.chunk(len(parts))):\n"
        "        block(part).backward(its)\n"
        "    gradient = torch.cat([part.grad for part in parts])  # the block's own gradients are complete: update here"
    )
