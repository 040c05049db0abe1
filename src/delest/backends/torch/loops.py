"""What is traced: a training loop that can be built, stepped and evaluated on fake tensors as on real ones."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from delest import errors
from delest.backends.torch import optimizers as optimizers_of_recipes
from delest.backends.torch.addition import judging
from delest.backends.torch.lean import bare_step, spare_the_compiler
from delest.backends.torch.model import call, where
from delest.backends.torch.recorder import Recorder
from delest.backends.torch.session import TorchSession
from delest.job import Job
from delest.records.batch import Batch
from delest.records.plan import Plan
from delest.records.source import Schema

AUTOCASTS = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ("fp32", "bf16", "fp16", "bf16-true")


class Loop(Protocol):
    """One model in training."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]

    def batch(self, rows: int) -> Any:
        """A batch of `rows` rows, of tensors."""

    def step(self, batch: Any, recorder: Recorder) -> None:
        """One whole step; tells the recorder when the update begins."""

    def evaluate(self, batch: Any) -> None:
        """One batch in evaluation mode."""


def tensors_of(batch: Any) -> list[Tensor]:
    if isinstance(batch, Batch):
        return [*tensors_of(batch.inputs), *tensors_of(batch.targets)]
    if isinstance(batch, Mapping):
        return [tensor for value in batch.values() for tensor in tensors_of(value)]
    if isinstance(batch, (tuple, list)):
        return [tensor for value in batch for tensor in tensors_of(value)]
    return [batch] if isinstance(batch, Tensor) else []


class JobLoop:
    """A job's own session, with the plan's methods applied."""

    def __init__(self, job: Job, plan: Plan, schema: Schema, example: Batch):
        self.session = TorchSession(job, plan, schema)
        self.model, self.optimizers, self.example = self.session.model, self.session.optimizers, example

    def batch(self, rows: int) -> Batch:
        resized = _with_rows(self.session.tensors(self.example), rows, self.example.count)
        return replace(resized, index=np.zeros(rows, np.int64), count=rows)

    def step(self, batch: Batch, recorder: Recorder) -> None:
        session, updates = self.session, self.session._updates

        def first() -> None:
            recorder.update()
            updates[0]()

        session._updates = [first, *updates[1:]]
        if session.updates is not None:
            session.updates.around = recorder.updating
        parts, session.parts = session.parts, 1  # a trace is of one micro-batch
        try:
            session.step(batch, 1.0)
        finally:
            session._updates, session.parts = updates, parts

    def evaluate(self, batch: Batch) -> None:
        with judging(self.model):
            self.session.forward(batch.inputs)


@dataclass(kw_only=True)
class Program:
    """A module with what makes a training loop of it. `rows` is the number of rows that `inputs` and `targets` have."""

    model: nn.Module | Callable[[], nn.Module]
    inputs: Any
    targets: Any = None
    loss: Callable[..., Tensor] | None = None
    optimizer: Any = None
    precision: str = "fp32"
    implementation: dict[str, bool] | None = None  # of optimizers that are named: foreach, fused

    @property
    def rows(self) -> int:
        tensors = tensors_of([self.inputs, self.targets])
        if not tensors or tensors[0].ndim == 0:
            raise errors.BadInput(
                "inputs hold no tensor with a batch dimension: give a tensor, a tuple or a mapping of tensors."
            )
        if len(tensors[0]) == 0:
            raise errors.BadInput("the inputs have no rows: give a batch of at least 1.")
        return len(tensors[0])


class ModuleLoop:
    """A training loop as tutorials write it, over any module."""

    def __init__(self, program: Program, fake_mode: Any = None):
        self.program = program
        self.model = _clone(program.model, fake_mode) if isinstance(program.model, nn.Module) else _built(program.model)
        if any(tensor.is_meta for tensor in (*self.model.parameters(), *self.model.buffers())):
            self.model = self.model.to_empty(device="cpu")  # built without memory by its owner: its values are of no interest
        if program.precision == "bf16-true":
            self.model = self.model.to(torch.bfloat16)
        self.optimizers = [_optimizer(program, self.model)]
        self.device = next((parameter.device.type for parameter in self.model.parameters()), "cpu")

    def batch(self, rows: int) -> Any:
        given = {"inputs": self.program.inputs, "targets": self.program.targets}
        resized = _with_rows(given, rows, self.program.rows)
        if self.program.precision == "bf16-true":
            resized["inputs"] = _cast(resized["inputs"], torch.bfloat16)
        return resized

    def step(self, batch: Any, recorder: Recorder) -> None:
        (optimizer,) = self.optimizers
        optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            outputs = call(self.model, batch["inputs"])
            loss = self._loss(outputs, batch["targets"])
        loss.backward()
        recorder.update()
        bare_step(optimizer)()

    def evaluate(self, batch: Any) -> None:
        with judging(self.model), self._autocast():
            call(self.model, batch["inputs"])

    def _autocast(self) -> Any:
        dtype = AUTOCASTS.get(self.program.precision)
        return contextlib.nullcontext() if dtype is None else torch.autocast(self.device, dtype=dtype)

    def _loss(self, outputs: Any, targets: Any) -> Tensor:
        if self.program.loss is not None:
            return self.program.loss(outputs) if targets is None else self.program.loss(outputs, targets)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
        if loss is not None:
            return loss
        for tensor in tensors_of(outputs):
            return tensor.float().mean()
        raise errors.BadInput(f"the model gives a {type(outputs).__name__} and no loss was given: pass loss=.")


def _built(factory: Any) -> nn.Module:
    try:
        model = factory()
    except errors.DelestError:
        raise
    except Exception as error:
        if needs_values(error):
            raise
        raise errors.BadInput(f"building the model failed: {where(error)}") from error
    if not isinstance(model, nn.Module):
        raise errors.BadInput(f"the model factory gave a {type(model).__name__}, not a torch.nn.Module.")
    return model


def needs_values(error: BaseException) -> bool:
    """Whether an error says that fake tensors have no values to read, rather than that something is wrong."""
    names = {kind.__name__ for kind in type(error).__mro__}
    wanted = {
        "DataDependentOutputException",
        "DynamicOutputShapeException",
        "UnsupportedOperatorException",
        "UnsupportedFakeTensorException",
    }
    if names & wanted or "tensor subclasses" in str(error):
        return True
    text = str(error)
    if error.__cause__ is not None and needs_values(error.__cause__):
        return True
    # The last two: lazy layers, which a factory may have given their shape, exist as real tensors only; grouped matrix products (routed experts)
    # take other formats than bf16 there.
    telling = (
        "fake tensor",
        "FakeTensor",
        "meta tensor",
        "data pointer",
        "GuardOnDataDependent",
        "uninitialized parameter",
        "Expected inputs of BF16 type",
    )
    return any(words in text for words in telling)


def _clone(model: nn.Module, fake_mode: Any) -> nn.Module:
    """The user's module with fake tensors in place of its own, which stay as they are; a real copy without a fake mode."""
    if fake_mode is None:
        return copy.deepcopy(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise errors.BadInput("a scripted module cannot be copied: give a factory of the module before torch.jit.script.")
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        memo[id(tensor)] = fake_mode.from_tensor(tensor)
    for module in model.modules():  # what a module keeps besides: caches, queues, generators
        for value in tree_leaves({name: held for name, held in vars(module).items() if not name.startswith("_")}):
            if isinstance(value, Tensor):
                memo.setdefault(id(value), fake_mode.from_tensor(value.detach()))
            elif isinstance(value, torch.Generator):
                memo[id(value)] = value
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise errors.BadInput(
            f"this {type(model).__name__} cannot be copied ({where(error)}): give a factory, as in estimate(lambda: build(), ...)."
        ) from error


def _optimizer(program: Program, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a name, a factory of parameters, or one like a given instance. None is AdamW with torch's defaults."""
    asked, implementation = program.optimizer, program.implementation or {}
    spare_the_compiler()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise errors.BadInput("the model has no parameter to train.")
    if isinstance(asked, torch.optim.LBFGS):
        raise errors.BadInput("LBFGS calls the model several times a step: such optimizers cannot be estimated.")
    if isinstance(asked, torch.optim.Optimizer):
        return _like(asked, program.model, model, parameters)
    if asked is None or isinstance(asked, str):
        name = (asked or "adamw").lower()
        kind = optimizers_of_recipes._class(name)
        settings: dict[str, Any] = {"lr": 1e-3, **({"momentum": 0.9} if kind is torch.optim.SGD else {}), **implementation}
        try:
            return kind(parameters, **settings)
        except TypeError as error:
            raise errors.BadInput(f"the optimizer {name} cannot be built so: {error}.") from None
    try:
        optimizer = asked(parameters)
    except Exception as error:
        if needs_values(error):
            raise
        raise errors.BadInput(f"building the optimizer failed: {where(error)}") from error
    if isinstance(optimizer, torch.optim.LBFGS):
        raise errors.BadInput("LBFGS calls the model several times a step: such optimizers cannot be estimated.")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise errors.BadInput(f"the optimizer factory gave a {type(optimizer).__name__}, not a torch.optim.Optimizer.")
    return optimizer


def _like(given: torch.optim.Optimizer, original: Any, model: nn.Module, parameters: list[Any]) -> torch.optim.Optimizer:
    """An optimizer of the same class, settings and groups over the copied model's parameters."""
    taken = inspect.signature(type(given)).parameters
    settings = {name: value for name, value in given.defaults.items() if name in taken}
    if not isinstance(original, nn.Module):
        return type(given)(parameters, **settings)
    copies = dict(model.named_parameters(remove_duplicate=False))
    mine = {id(parameter): copies[name] for name, parameter in original.named_parameters(remove_duplicate=False)}
    groups = [
        {**group, "params": [mine[id(one)] for one in group["params"] if id(one) in mine]} for group in given.param_groups
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise errors.BadInput("the optimizer has none of the model's parameters: build it from this model's.")
    return type(given)(groups, **settings)


def _with_rows(value: Any, rows: int, given: int) -> Any:
    """Tensors like those given, with `rows` rows where they have the batch's."""
    if isinstance(value, Batch):
        return replace(value, inputs=_with_rows(value.inputs, rows, given), targets=_with_rows(value.targets, rows, given))
    if isinstance(value, Mapping):
        return {name: _with_rows(item, rows, given) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_with_rows(item, rows, given) for item in value)
    if not isinstance(value, Tensor):
        return value
    if value.ndim == 0 or len(value) != given:
        return torch.zeros(value.shape, dtype=value.dtype)
    formats = torch.channels_last if value.ndim == 4 and not value.is_contiguous() else torch.contiguous_format
    if torch._guards.detect_fake_mode() is not None:
        return torch.empty((rows, *value.shape[1:]), dtype=value.dtype, memory_format=formats)
    index = torch.arange(rows) % given  # real rows again and again: values that a model branches on stay plausible
    return value.index_select(0, index).contiguous(memory_format=formats)


def with_length(value: Any, length: int) -> Any:
    """Inputs with `length` places on their second axis, tokens repeated or cut; those without one stay as they are."""
    if isinstance(value, Mapping):
        return {name: with_length(item, length) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(with_length(item, length) for item in value)
    if getattr(value, "ndim", 0) < 2:
        return value
    there = value.shape[1]
    return value[:, [place % there for place in range(length)]]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Mapping):
        return {name: _cast(item, dtype) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(item, dtype) for item in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
