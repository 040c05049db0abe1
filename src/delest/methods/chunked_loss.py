"""Take the last linear layer and cross-entropy together, some rows of logits at a time: those of the whole batch are never there.

Each chunk's logits are differentiated as soon as they are made, and only the gradients of what enters the layer and of its weight are
kept, so nothing is computed twice. With tens of thousands of classes (a vocabulary) logits, their logarithms and their gradients are
most of what a step holds. Sums are taken in another order, nothing else changes. In training nobody else gets to see the logits.
Sources: Hsu et al., "Liger kernel", arXiv 2410.10989, section 3.2 (FusedLinearCrossEntropy); Wijmans et al., "Cut your losses in
large-vocabulary language models", arXiv 2411.09009.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from delest.methods import Configs, Settings, Stage
    from delest.records.plan import Keeps

STAGE: Stage = "loss"
SETTINGS: Settings = {"module": str, "parts": int}


def keeps(config: dict[str, Any], *, batch_statistics: bool) -> Keeps:
    return "rounding"


def conflicts(config: dict[str, Any], others: Configs) -> str | None:
    module = config.get("module", "")
    for method in ("activation_checkpointing", "layered_accumulation"):
        for block in others.get(method, {}).get("modules", ()):
            if block == "" or f"{module}.".startswith(f"{block}."):
                return (
                    f"the layer {module!r} is in {block!r}, which {method} recomputes: its outputs must go into the loss alone."
                )
    return None


def code(config: dict[str, Any]) -> str:
    return (
        f"head = model.get_submodule({config['module']!r}); x = hidden.detach().requires_grad_()  # what enters it\n"
        f"for part, targets in zip(x.chunk({config['parts']}), y.chunk({config['parts']})):\n"
        "    (cross_entropy(head(part), targets, reduction='sum') / len(y)).backward()\n"
        "hidden.backward(x.grad)"
    )
