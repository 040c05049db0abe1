"""Training techniques, one file each: when one applies, what it does to the mathematics, how it reads in plain code.

Nothing here imports a framework. `delest.backends.torch.methods` holds a file of the same name that applies it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

from delest import errors

if TYPE_CHECKING:
    from delest.job import Recipe
    from delest.records.plan import Keeps, Plan

Stage = Literal["process", "build", "wrap", "loss", "optimizer", "backward", "step"]
Configs = Mapping[str, dict[str, Any]]  # by name
NAMES = (  # in the order in which they are applied
    "memory_format",
    "precision",
    "activation_checkpointing",
    "layered_accumulation",
    "chunked_loss",
    "optimizer_state",
    "optimizer_in_backward",
    "micro_batch",
)


class Method(Protocol):
    """A module of this room."""

    STAGE: Stage

    def keeps(self, config: dict[str, Any], *, batch_statistics: bool) -> Keeps:
        """What the method does to the mathematics; `batch_statistics`: the model normalises over the batch."""

    def conflicts(self, config: dict[str, Any], others: Configs) -> str | None:
        """Why the method cannot be used together with one of `others` (choices and what the recipe sets, see `conflicts` below), in words; None where it can."""

    def code(self, config: dict[str, Any]) -> str:
        """The equivalent plain PyTorch."""


def named(name: str) -> Any:
    """A method's module by its name; raises `BadInput` for one that is not known."""
    if name not in NAMES:
        raise errors.BadInput(f"unknown method {name!r}. Known: {', '.join(NAMES)}.")
    return importlib.import_module(f"{__name__}.{name}")


def of_recipe(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """What a recipe sets that methods exclude, in the form of choices: its `optimizer`, and `clipping` where it clips."""
    settings: dict[str, dict[str, Any]] = {"optimizer": {"name": recipe.optimizer.lower()}}
    if recipe.clip is not None:
        settings["clipping"] = {"norm": recipe.clip}
    return settings


def conflicts(choices: Configs, settings: Configs | None = None) -> list[str]:
    """Why chosen methods exclude each other, or what the recipe sets (`of_recipe`): a sentence each, empty where all agree."""
    everything = {**(settings or {}), **choices}
    found = []
    for name, config in choices.items():
        others = {other: value for other, value in everything.items() if other != name}
        reason = named(name).conflicts(config, others)
        if reason is not None:
            found.append(f"{name}: {reason}")
    return found


def configs(plan: Plan) -> dict[str, dict[str, Any]]:
    """The configurations of a plan's choices by name, in the order in which they are applied; unknown names raise `BadInput`."""
    for choice in plan.choices:
        named(choice.method)
    return {name: config for name in NAMES if (config := plan.config(name)) is not None}
