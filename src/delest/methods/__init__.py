"""Training techniques, one file each: when one applies, what it does to the mathematics, how it reads in plain code.

Nothing here imports a framework. `delest.backends.torch.methods` holds a file of the same name that applies it.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

from delest import errors

if TYPE_CHECKING:
    from delest.job import Recipe
    from delest.records.plan import Keeps, Plan

Stage = Literal["process", "build", "wrap", "loss", "optimizer", "backward", "step"]
Configs = Mapping[str, dict[str, Any]]  # by name
Settings = Mapping[
    str, Any
]  # what a config must hold: values to choose from, `int` (1 or more), `str` (a name) or `list` (of names)
NAMES = (  # in the order in which they are applied
    "allocator",
    "threads",
    "memory_format",
    "precision",
    "activation_checkpointing",
    "layered_accumulation",
    "chunked_loss",
    "optimizer_state",
    "factored_state",
    "optimizer_in_backward",
    "micro_batch",
)


class Method(Protocol):
    """A module of this room."""

    STAGE: Stage
    SETTINGS: Settings

    def keeps(self, config: dict[str, Any], *, batch_statistics: bool) -> Keeps:
        """What the method does to the mathematics; `batch_statistics`: the model normalises over the batch."""

    def conflicts(self, config: dict[str, Any], others: Configs) -> str | None:
        """Why the method cannot be used together with one of `others` (choices and what the recipe sets, see `conflicts` below), in words; None where it can."""

    def code(self, config: dict[str, Any]) -> str:
        """The equivalent plain PyTorch."""


class Starting(Method, Protocol):
    """A method of the stage `process`: it acts before a process starts."""

    def environment(self, config: dict[str, Any]) -> dict[str, str]:
        """The variables that a process must be started with."""

    def waits(self, config: dict[str, Any]) -> bool:
        """Whether this process was not started so, and it is too late for it."""


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
        for other, value in everything.items():
            reason = None if other == name else named(name).conflicts(config, {other: value})
            if reason is not None:
                found.append(f"{name} excludes {other}: {reason}")
    return found


def faults(choices: Configs) -> list[str]:
    """What is missing or wrong in the settings of chosen methods: a sentence each that names the setting."""
    found = []
    for name, config in choices.items():
        for setting, kind in named(name).SETTINGS.items():
            should = f"it should be {_kind_words(kind)}"
            if setting not in config:
                found.append(f"the choice {name} lacks config.{setting}: {should}.")
            elif not _is_of(kind, config[setting]):
                found.append(f"the choice {name} has {config[setting]!r} as config.{setting}: {should}.")
    return found


def _kind_words(kind: Any) -> str:
    if isinstance(kind, tuple):
        return " or ".join(json.dumps(value) for value in kind)
    return {int: "a whole number, 1 or more", str: "a module's name", list: "a list of module names"}[kind]


def _is_of(kind: Any, value: Any) -> bool:
    if isinstance(kind, tuple):
        return value in kind
    if kind is int:
        return type(value) is int and value >= 1
    if kind is str:
        return isinstance(value, str)
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def configs(plan: Plan) -> dict[str, dict[str, Any]]:
    """The configurations of a plan's choices by name, in the order in which they are applied; unknown names, and settings that are
    missing or wrong, raise `BadInput`."""
    for choice in plan.choices:
        named(choice.method)
    found = {name: config for name in NAMES if (config := plan.config(name)) is not None}
    if wrong := faults(found):
        raise errors.BadInput(wrong)
    return found


def environment(plan: Plan) -> dict[str, str]:
    """The variables that a process must be started with to follow a plan. Raises `BadInput` for what this system does not have."""
    return {
        variable: value
        for name, config in configs(plan).items()
        if named(name).STAGE == "process"
        for variable, value in named(name).environment(config).items()
    }


def new_optimizer(plan: Plan) -> list[str]:
    """The plan's methods that put another optimizer in place of the given one."""
    return [name for name in configs(plan) if named(name).STAGE == "optimizer"]


def waiting(plan: Plan) -> list[str]:
    """The plan's methods that must act before a process starts and cannot act in this one."""
    return [name for name, config in configs(plan).items() if named(name).STAGE == "process" and named(name).waits(config)]
