"""How PyTorch applies each method of `delest.methods`, one file a method, by the same name."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from delest import methods

if TYPE_CHECKING:
    from delest.backends.torch.methods.optimizer_in_backward import Updates
    from delest.records.plan import Plan

BEFORE_OPTIMIZER: tuple[methods.Stage, ...] = ("process", "build", "wrap", "loss")
AFTER_OPTIMIZER: tuple[methods.Stage, ...] = ("optimizer", "backward", "step")


class Training(Protocol):
    """What methods act on: a session of delest's own, or somebody's model and optimizer (`applied.Applied`)."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    memory_format: torch.memory_format | None  # of batches of images
    autocast: torch.dtype | None
    updates: Updates | None  # what updates in the backward pass, None: the optimizers after it

    def split(self, rows: int) -> None:
        """At most `rows` rows of a batch are in memory at once from now on."""

    def evaluate_in_parts(self, parts: int) -> None:
        """Evaluation takes a batch in so many parts, as it would need more memory than the steps otherwise."""


def apply_stages(plan: Plan, training: Training, stages: tuple[methods.Stage, ...]) -> None:
    """Apply the plan's choices of these stages, in the order of `methods.NAMES`; raises `BadInput` where one does not apply."""
    for name, config in methods.configs(plan).items():
        if methods.named(name).STAGE in stages:
            importlib.import_module(f"{__name__}.{name}").apply(training, config)
