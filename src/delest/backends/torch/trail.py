"""What training steps leave behind, so that two ways of making the same steps can be laid side by side."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from delest.backends.torch import model as models, randomness
from delest.backends.torch.session import TorchSession
from delest.job import Job
from delest.records.batch import Batch
from delest.records.plan import Plan
from delest.records.source import Schema

Precision = Literal["fp32", "fp64"]
# A tensor that is smaller than this share of all is measured against that share: a bias before a normalisation has a
# gradient of rounding errors alone, and one relative to itself would say nothing.
SHARE = 1e-3
_NARROW = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Trail:
    """Losses of all steps, gradients of the first in the order of the parameters, weights and buffers after the last."""

    losses: list[float]
    gradients: list[Tensor]
    weights: dict[str, Tensor]
    drew: bool  # random numbers, in any step


def follow(
    job: Job,
    plan: Plan,
    schema: Schema,
    batches: Iterable[Batch],
    rates: Sequence[float],
    *,
    precision: Precision = "fp32",
    dropping: bool = True,
) -> Trail:
    """Make a step for each rate in a new session. fp64 makes the model and the data double; without `dropping` the dropout
    layers let everything through.

    Raises what building and stepping raise.
    """
    session = TorchSession(in_double(job) if precision == "fp64" else job, plan, schema)
    if not dropping:
        _stop_dropping(session.model)
    losses, gradients, before = list[float](), list[Tensor](), _random_state()
    for rate, batch in zip(rates, batches, strict=False):  # the batches never end
        if precision == "fp64":
            batch = _doubled(batch)
        with contextlib.nullcontext() if losses else _collected(session.model, gradients):
            losses.append(float(session.step(batch, rate).loss))
    weights = {name: tensor.detach().cpu().clone() for name, tensor in session.model.state_dict().items()}
    return Trail(losses, gradients, weights, _random_state() != before)


def in_double(job: Job) -> Job:
    """The job with its model in fp64 from the start, so that methods and optimizers find it so."""
    return replace(job, model=lambda schema: models.build(job, schema).double())


def stays_double(job: Job, plan: Plan, schema: Schema, batch: Batch) -> bool:
    """Whether the model and its loss compute in fp64 throughout, forward and backward: none of it in a narrower type."""
    try:
        session = TorchSession(in_double(job), plan, schema)
        with _Narrow() as watch:
            session.batch_loss(session.tensors(_doubled(batch))).backward()
    except Exception:  # whatever a model says that insists on its own type
        return False
    return not watch.found


def loss_difference(left: Sequence[float], right: Sequence[float]) -> float:
    """The largest relative difference of any two losses; infinite where one is not finite."""
    least = SHARE * max(map(abs, left), default=0.0)
    pairs = [(abs(a - b), max(abs(a), least)) for a, b in zip(left, right, strict=True) if a != b]
    return max((apart / size if size and math.isfinite(apart) else math.inf for apart, size in pairs), default=0.0)


def tensor_difference(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """The largest relative difference of any two tensors, in the Euclidean norm: relative to the left one, or to `SHARE` of
    all of them where that is more.

    Infinite where shapes differ or values that are not the same are not finite.
    """
    if [tensor.shape for tensor in left] != [tensor.shape for tensor in right]:
        return math.inf
    sizes = [_norm(torch.where(torch.isfinite(tensor), tensor, 0)) for tensor in left]
    least = SHARE * math.hypot(*sizes)
    worst = 0.0
    for a, b, size in zip(left, right, sizes, strict=True):
        apart = _norm(torch.where(a == b, 0, a.double() - b.double()))  # a mask may hold infinity
        if apart != 0.0:
            worst = max(worst, apart / max(size, least) if math.isfinite(apart) and max(size, least) else math.inf)
    return worst


def weight_difference(left: Trail, right: Trail) -> float:
    """`tensor_difference` of weights and buffers by name; infinite where the names differ."""
    if left.weights.keys() != right.weights.keys():
        return math.inf
    return tensor_difference(list(left.weights.values()), [right.weights[name] for name in left.weights])


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.double()))


@contextlib.contextmanager
def _collected(model: nn.Module, gradients: list[Tensor]) -> Iterator[None]:
    """Put the whole gradient of each parameter, summed over parts, into the list when the context is left.

    Gradients are taken as they arrive: a method may use them up, and free them, within the backward pass.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sums: list[Tensor | None] = [None] * len(parameters)

    def arrive(place: int, gradient: Tensor) -> None:
        before = sums[place]
        sums[place] = gradient.detach().clone() if before is None else before + gradient.detach()

    def hook(place: int) -> Any:
        return lambda gradient: arrive(place, gradient)

    handles = [parameter.register_hook(hook(place)) for place, parameter in enumerate(parameters)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for parameter, total in zip(parameters, sums, strict=True):
        dense = torch.zeros_like(parameter) if total is None else total.to_dense() if total.is_sparse else total
        gradients.append(dense.detach().cpu())


def _stop_dropping(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
            module.dropout = 0.0
        elif isinstance(getattr(module, "drop_prob", None), float):  # stochastic depth, as timm and transformers name it
            setattr(module, "drop_prob", 0.0)  # noqa: B010  (no attribute that torch's types know)


def _random_state() -> dict[str, bytes]:
    return {name: np.asarray(array).tobytes() for name, array in randomness.capture().items()}


def _doubled(batch: Batch) -> Batch:
    return replace(batch, inputs=_double(batch.inputs), targets=_double(batch.targets))


def _double(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _double(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_double(item) for item in value)
    return value.astype(np.float64) if isinstance(value, np.ndarray) and value.dtype.kind == "f" else value


class _Narrow(TorchDispatchMode):
    """Notes whether any operator gives floating-point numbers of less than fp64."""

    found = False

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = operator(*args, **(kwargs or {}))
        self.found |= any(isinstance(item, Tensor) and item.dtype in _NARROW for item in tree_leaves(outputs))
        return outputs
