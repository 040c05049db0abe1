"""Optimizers by name, with parameter groups done right and their state allocated before the first step.

Weight decay acts on matrices and convolution kernels only: not on biases, normalisation weights (one dimension) and
embeddings, where it has no regularising meaning. Frozen parameters are left out: no gradient, no state.
"""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor, nn

from delest import errors
from delest.backends.torch.lean import spare_the_compiler
from delest.backends.torch.muon import Muon
from delest.backends.torch.piecewise import PiecewiseOptimizer
from delest.job import Recipe

# Learning rate at its highest where the recipe names none. AdamW's and SGD's were chosen on the digits and the tables
# (docs/log.md); others are those of their papers or of torch.
DEFAULT_LR = {"adamw": 2e-3, "adam": 2e-3, "sgd": 0.05, "muon": 0.02, "adadelta": 1.0}
DEFAULT_DECAY = {"adamw": 0.01, "muon": 0.01, "sgd": 5e-4}
_STATE: dict[type, tuple[str, ...]] = {
    torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"),
    torch.optim.Adam: ("step", "exp_avg", "exp_avg_sq"),
    torch.optim.SGD: ("momentum_buffer",),
    torch.optim.Adadelta: ("step", "square_avg", "acc_delta"),
    Muon: ("momentum_buffer",),
}


def build(model: nn.Module, recipe: Recipe, *, allocated: bool = True) -> list[torch.optim.Optimizer]:
    """The optimizers of a recipe: one, or two for Muon (matrices by Muon, the rest by AdamW).

    Their state is there, unless `allocated` is false and `allocate` is called later.
    Raises `BadInput` for a name that torch.optim does not have and settings that the optimizer does not take.
    """
    spare_the_compiler()
    name = recipe.optimizer.lower()
    decay = DEFAULT_DECAY.get(name, 0.0) if recipe.weight_decay is None else recipe.weight_decay
    if name == "muon":
        optimizers = _muon(model, recipe, decay)
    else:
        kind = _class(recipe.optimizer)
        groups = [group for group in groups_of(model, decay) if group["params"]]
        optimizers = [_construct(kind, groups, recipe, fused=not has_sparse_gradients(model))] if groups else []
    for optimizer in optimizers if allocated else ():
        allocate(optimizer)
    return optimizers


def has_sparse_gradients(model: nn.Module) -> bool:
    """Whether an embedding's gradients hold only the rows that were looked up; torch's fused optimizers do not take those."""
    return any(isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse for module in model.modules())


def groups_of(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: with weight decay and without. A tied parameter appears once."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))}
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim >= 2 and id(parameter) not in embeddings else plain).append(parameter)
    return [{"params": decayed, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}]


def _muon(model: nn.Module, recipe: Recipe, decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices; AdamW for embeddings, vectors and the last matrix (the classifier).

    Source: Jordan et al., "Muon", https://kellerjordan.github.io/posts/muon/, section "Empirical considerations".
    """
    with_decay, without = groups_of(model, decay)
    hidden, last = with_decay["params"][:-1], with_decay["params"][-1:]
    lr = DEFAULT_LR["muon"] if recipe.lr is None else recipe.lr
    rest = [{"params": last, "weight_decay": decay}, without]
    optimizers: list[torch.optim.Optimizer] = []
    if hidden:
        optimizers.append(
            Muon(hidden, lr=lr, weight_decay=decay, momentum=0.95 if recipe.momentum is None else recipe.momentum)
        )
    if any(group["params"] for group in rest):
        # AdamW's rate keeps its usual ratio to Muon's, so that one option moves both.
        adamw = DEFAULT_LR["adamw"] * lr / DEFAULT_LR["muon"]
        optimizers.append(torch.optim.AdamW([group for group in rest if group["params"]], lr=adamw, fused=True))
    return optimizers


def _class(name: str) -> type[torch.optim.Optimizer]:
    known = {
        key.lower(): value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    # LBFGS needs a closure that computes the loss again, SparseAdam sparse gradients only.
    known = {key: value for key, value in known.items() if key not in ("lbfgs", "sparseadam")}
    if name.lower() not in known:
        near = difflib.get_close_matches(name.lower(), known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise errors.BadInput(f"unknown optimizer {name!r}.{hint} Known: {', '.join(sorted(known))}.")
    return known[name.lower()]


def _construct(
    kind: type[torch.optim.Optimizer], groups: list[dict[str, Any]], recipe: Recipe, *, fused: bool
) -> torch.optim.Optimizer:
    name = kind.__name__.lower()
    settings: dict[str, Any] = {}
    lr = DEFAULT_LR.get(name) if recipe.lr is None else recipe.lr
    if lr is not None:
        settings["lr"] = lr
    if kind is torch.optim.SGD:
        settings["momentum"] = 0.9 if recipe.momentum is None else recipe.momentum
        settings["nesterov"] = settings["momentum"] > 0
    elif recipe.momentum is not None:
        raise errors.BadInput(
            f"momentum is {recipe.momentum:g}, which {kind.__name__} does not take: leave it out, or use sgd or muon."
        )
    if kind in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD):
        settings["fused"] = fused  # one pass over memory a step; the CPU's default is a Python loop over parameters
    if not any(group["weight_decay"] for group in groups):
        groups = [{key: value for key, value in group.items() if key != "weight_decay"} for group in groups]
        settings["weight_decay"] = 0.0
    try:
        return kind(groups, **settings)
    except (TypeError, ValueError):
        settings.pop("weight_decay", None)  # a few (Adafactor's relatives, Rprop) have none
        try:
            return kind([{"params": group["params"]} for group in groups], **settings)
        except (TypeError, ValueError) as error:
            raise errors.BadInput(f"{kind.__name__} cannot be built with {settings}: {error}.") from None


def allocate(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter its zero state now: a first step that runs out of memory would leave half of it behind."""
    if isinstance(optimizer, PiecewiseOptimizer):
        optimizer.allocate()
        return
    names = _STATE.get(type(optimizer))
    if names is None:
        return
    for group in optimizer.param_groups:
        if "momentum_buffer" in names and not group["momentum"]:
            continue
        for parameter in group["params"]:
            if parameter.requires_grad:
                optimizer.state[parameter] = {name: _zero(name, parameter) for name in names}


def _zero(name: str, parameter: Tensor) -> Tensor:
    if name == "step":
        return torch.zeros((), dtype=torch.float32, device=parameter.device)
    return torch.zeros_like(parameter, memory_format=torch.preserve_format)
