"""Update each parameter as soon as its gradient is complete, and free the gradient: they are never all there at once.

Source: https://docs.pytorch.org/tutorials/intermediate/optimizer_step_in_backward_tutorial.html
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from delest.methods import Configs, Settings, Stage
    from delest.records.plan import Keeps

STAGE: Stage = "backward"
SETTINGS: Settings = {}
# Optimizers of torch.optim that update every element from its own gradient and state alone, and our own, each parameter from its own.
ELEMENTWISE = (
    "adadelta",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "adamw4bit",
    "adamw8bit",
    "asgd",
    "factoredadamw",
    "nadam",
    "radam",
    "rmsprop",
    "rprop",
    "sgd",
)


def keeps(config: dict[str, Any], *, batch_statistics: bool) -> Keeps:
    return "bitwise"


def conflicts(config: dict[str, Any], others: Configs) -> str | None:
    if "micro_batch" in others:
        return "the gradients of a batch's parts must stay until the last part, so there is nothing to free on the way."
    if "clipping" in others:
        return "clipping needs the norm of all gradients before the first update."
    if others.get("precision", {}).get("dtype") == "fp16":
        return "fp16 scaling looks at all gradients before it decides whether to update."
    optimizer = others.get("optimizer", {}).get("name", "adamw")
    if optimizer not in ELEMENTWISE:
        return f"the optimizer {optimizer} does not update element by element; these do: {', '.join(ELEMENTWISE)}."
    return None


def code(config: dict[str, Any]) -> str:
    return (
        "optimizers = {one: torch.optim.AdamW([one], fused=True) for one in model.parameters()}\n"
        "def update(one):\n"
        "    optimizers[one].step(); one.grad = None\n"
        "for one in model.parameters():\n"
        "    one.register_post_accumulate_grad_hook(update)"
    )
