"""PyTorch's `Session`: the model, its loss and optimizers, and one step at a time, whole or not at all."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from delest import errors, methods as techniques
from delest.backends.torch import losses, methods, model as models, optimizers, randomness, rollback
from delest.backends.torch.lean import bare_step
from delest.backends.torch.methods.optimizer_in_backward import Updates
from delest.job import Job
from delest.records.batch import Batch, Lazy, Outputs, State, Step
from delest.records.plan import Plan
from delest.records.source import Schema
from delest.tensors import Under


class TorchSession:
    """One model being trained. See `delest.backends.Session` for what each call promises."""

    def __init__(self, job: Job, plan: Plan, schema: Schema):
        if plan.threads:
            torch.set_num_threads(plan.threads)
        with _memory_reported("start", plan.memory_bytes is not None):
            self._build(job, plan, schema)

    def _build(self, job: Job, plan: Plan, schema: Schema) -> None:
        randomness.seed_all(job.seed)
        self.job, self.schema = job, schema
        self.device = torch.device(plan.device)
        self.model: nn.Module = models.build(job, schema).to(
            self.device
        )  # modes are the factory's: it may have frozen parts by eval()
        kind = schema.target.kind if schema.target else None
        self.loss = losses.choose(job.loss, kind, job.recipe.label_smoothing)
        self.parts, self.evaluation_rows = 1, max(job.batch_size, 256)
        self.memory_format: torch.memory_format | None = None
        self.autocast: torch.dtype | None = None
        normalised = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.model.modules())
        self._least_rows = 2 if normalised else 1
        self.guarded = plan.memory_bytes is not None
        self.updates: Updates | None = None
        self.optimizers: list[torch.optim.Optimizer] = []
        self._apply(plan)
        self._updates = [self.updates.finish] if self.updates else [bare_step(optimizer) for optimizer in self.optimizers]
        self._base_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        randomness.seed_all(job.seed)

    def _apply(self, plan: Plan) -> None:
        """Build the optimizers and apply the plan's methods around that; raises `BadInput` where they exclude each other."""
        faults = techniques.conflicts(techniques.configs(plan), techniques.of_recipe(self.job.recipe))
        if faults:
            raise errors.BadInput(faults)
        methods.apply_stages(plan, self, methods.BEFORE_OPTIMIZER)
        self.optimizers = optimizers.build(self.model, self.job.recipe, allocated=False)
        methods.apply_stages(plan, self, methods.AFTER_OPTIMIZER)
        for optimizer in self.optimizers:
            optimizers.allocate(optimizer)

    def split(self, rows: int) -> None:
        """At most `rows` rows of a batch are in memory at once from now on."""
        self.parts, self.evaluation_rows = math.ceil(self.job.batch_size / rows), rows

    def evaluate_in_parts(self, parts: int) -> None:
        """Evaluation takes a batch in so many parts from now on."""
        self.evaluation_rows = min(self.evaluation_rows, math.ceil(self.job.batch_size / parts))

    # One step

    def step(self, batch: Batch, rate: float) -> Step:
        """One optimizer step on a batch, its gradient summed over `parts` micro-batches weighted by their rows.

        Raises `OutOfMemory`; weights, buffers, optimizer and random state are then as before (but for an optimizer
        outside torch's fused ones, whose own temporaries failed, and where the error says that updates in the backward pass
        had begun: go back to a checkpoint then).
        """
        for optimizer, rates in zip(self.optimizers, self._base_rates, strict=True):
            for group, base in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = base * rate
        before = None
        phase = "forward"
        try:
            before = self._remember()
            total: Tensor | None = None
            parts = self._parts_of(batch.count)
            for number, part in enumerate(_split(self.tensors(batch), parts)):
                phase = "forward"
                loss = self.batch_loss(part) * (part.count / batch.count)
                phase = "backward"
                if self.updates is not None and number == parts - 1:  # earlier parts' gradients only add up
                    self.updates.begin()
                loss.backward()
                total = loss.detach() if total is None else total + loss.detach()
            norm = self._clip()
            phase = "optimizer"
            for update in self._updates:
                update()
        except (RuntimeError, MemoryError) as error:
            if not rollback.is_out_of_memory(error, self.guarded):
                raise
            self._restore(before)
            begun = self.updates is not None and self.updates.begun
            raise errors.OutOfMemory(phase, rollback.first_line(error), begun) from error
        finally:
            if self.updates is not None:
                self.updates.end()
            for parameter in self.model.parameters():
                parameter.grad = None
        assert total is not None
        return Step(Lazy(lambda: float(total)), batch.count, norm)

    def _parts_of(self, count: int) -> int:
        """Parts of a batch of `count` rows: none larger than those of a whole batch, none of one row where the model
        normalises over the batch."""
        rows = math.ceil(self.job.batch_size / self.parts)
        return min(math.ceil(count / rows), max(1, count // self._least_rows))

    def warm(self) -> None:
        """Start the threads of parallel operators, whose stacks take address space: OpenMP ends the process where it cannot."""
        torch.ones(1 << 18, device=self.device).exp()

    @property
    def most_parts(self) -> int:
        """As many parts as a batch can be split into, each with as many rows as the model needs."""
        return max(1, self.job.batch_size // self._least_rows)

    def batch_loss(self, batch: Batch) -> Tensor:
        """The mean loss of a batch of tensors, with its gradient."""
        with self._precision():
            if self.job.step is not None:
                return self.job.step(self.model, batch)
            return self.loss.mean(models.call(self.model, batch.inputs), batch.targets)

    def _clip(self) -> Lazy | None:
        if self.job.recipe.clip is None:
            return None
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.job.recipe.clip)
        return Lazy(lambda: float(norm))

    def _remember(self) -> rollback.Before | None:
        """Random state and buffers before a step, where a budget is guarded."""
        return rollback.remember(self.model) if self.guarded else None

    def _restore(self, before: rollback.Before | None) -> None:
        if before is not None:
            rollback.restore(self.model, before)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    # Evaluation

    def outputs(self, feed: Any) -> Iterator[Outputs]:
        """Evaluation mode over `feed.ordered()`; random state is left as it was. Raises `OutOfMemory`."""
        rows = min(self.evaluation_rows, math.ceil(self.job.batch_size / self.parts))
        with self._evaluating(), _memory_reported("evaluation", self.guarded):
            for batch in feed.ordered():
                yield from (self._judge(part) for part in _split(self.tensors(batch), -(-batch.count // rows)))

    def predict(self, inputs: Any) -> Any:
        """Outputs for inputs as the model receives them (NumPy), in evaluation mode and fp32 as an export has them, NumPy."""
        with self.answering() as answer:
            return answer(inputs)

    @contextlib.contextmanager
    def answering(self) -> Iterator[Callable[[Any], Any]]:
        """`predict` for many calls: modes and random state are kept once around all, which costs more than a small network."""
        with self._evaluating():
            yield lambda inputs: _numpy(self._answer(self._to_tensor(inputs)))

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluation mode, and the modes as they were afterwards: a user may have frozen parts of the model by `eval()`."""
        modes = [(module, module.training) for module in self.model.modules()]
        random_states = randomness.capture()
        self.model.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            for module, mode in modes:
                module.training = mode
            randomness.restore(random_states)

    def forward(self, inputs: Any) -> Any:
        """What evaluation judges, for inputs as tensors: the job's `predict`, or the model's output."""
        with self._precision():
            return self._answer(inputs)

    def _answer(self, inputs: Any) -> Any:
        return self.job.predict(self.model, inputs) if self.job.predict else models.call(self.model, inputs)

    def _judge(self, batch: Batch) -> Outputs:
        if self.job.step is None or (self.schema.is_text and self.job.predict is not None):
            outputs = self.forward(batch.inputs)
            losses = _numpy(self.loss.rows(outputs, batch.targets).float())
        elif self.job.predict is not None:  # a detector's forward gives no loss in evaluation mode: the metric judges
            outputs, losses = self.forward(batch.inputs), np.full(batch.count, np.nan, np.float32)
        else:
            outputs, losses = None, np.full(batch.count, self._step_loss(batch), np.float32)
        return Outputs(_numpy(outputs), _numpy(batch.targets), losses, batch.index)

    def _step_loss(self, batch: Batch) -> float:
        """The job's own loss without gradient: in training mode, which it may need, but for layers that would draw random
        numbers or change their statistics."""
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)):
                module.eval()
        return float(self.batch_loss(batch))

    def exportable(self) -> nn.Module:
        """The module whose forward is what evaluation sees."""
        return self.model if self.job.predict is None else _Predictor(self.model, self.job.predict)

    # State

    def state(self) -> State:
        """Weights, buffers, optimizer state and random states as arrays, which share memory with the session on a CPU: use them before the
        next step; what an optimizer keeps as plain numbers in `scalars`."""
        arrays = {f"model.{name}": _numpy(tensor) for name, tensor in self.model.state_dict().items()}
        arrays.update({f"random.{name}": array for name, array in randomness.capture().items()})
        numbers: dict[str, Any] = {}
        for i, optimizer in enumerate(self.optimizers):
            for j, values in optimizer.state_dict()["state"].items():
                for name, value in values.items():
                    key = f"optimizer.{i}.{j}.{name}"
                    if isinstance(value, Tensor):
                        arrays[key] = _numpy(value)
                    else:
                        numbers[key] = value
        return State(arrays, {"numbers": numbers})

    def load(self, state: State) -> None:
        """Take up a state; raises `BadInput` where it belongs to another model or optimizer, `OutOfMemory`."""
        with _memory_reported("resuming", self.guarded):
            self._load(state)

    def _load(self, state: State) -> None:
        self.load_weights(Under(state.arrays, "model."))
        randomness.restore(dict(Under(state.arrays, "random.")))
        for i, optimizer in enumerate(self.optimizers):
            own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for saved in (state.arrays, state.scalars["numbers"]):
                for key, value in Under(saved, f"optimizer.{i}.").items():  # read one by one
                    number, _, name = key.partition(".")
                    _place(optimizer.state[own[int(number)]], name, value, own[int(number)])

    def weights(self) -> dict[str, Any]:
        """Parameters and buffers by name, copied; bf16 as uint16."""
        return {name: _numpy(tensor).copy() for name, tensor in self.model.state_dict().items()}

    def load_weights(self, arrays: Mapping[str, Any]) -> None:
        """Copy weights in by name; raises `BadInput` naming what is missing, left over or of another shape."""
        own = self.model.state_dict()
        faults = [f"{name} is missing" for name in own if name not in arrays]
        faults += [f"{name} is not in this model" for name in arrays if name not in own]
        faults += [
            f"{name} has shape {tuple(arrays[name].shape)}, the model's has {tuple(tensor.shape)}"
            for name, tensor in own.items()
            if name in arrays and tuple(arrays[name].shape) != tuple(tensor.shape)
        ]
        if faults:
            more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
            raise errors.BadInput(f"these weights do not fit the model: {'; '.join(faults[:5])}{more}.")
        with torch.no_grad():
            for name, tensor in own.items():
                value = torch.from_numpy(np.require(arrays[name], requirements="W"))
                tensor.copy_(
                    value.view(torch.bfloat16) if tensor.dtype == torch.bfloat16 and value.dtype == torch.uint16 else value
                )

    def parameters(self) -> int:
        """How many parameters there are, frozen ones included, tied ones once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    # From NumPy

    def tensors(self, batch: Batch) -> Batch:
        """A batch with tensors on the session's device in place of NumPy."""
        return replace(batch, inputs=self._to_tensor(batch.inputs), targets=self._to_tensor(batch.targets))

    def _to_tensor(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self._to_tensor(item) for name, item in value.items()}
        if isinstance(value, tuple):
            return tuple(self._to_tensor(item) for item in value)
        if not isinstance(value, np.ndarray):
            return value
        tensor = torch.from_numpy(value).to(self.device)
        if self.memory_format is not None and tensor.ndim == 4:
            tensor = tensor.contiguous(memory_format=self.memory_format)
        return tensor


def _place(state: dict[str, Any], name: str, value: Any, parameter: Tensor) -> None:
    """Put a saved value into a parameter's optimizer state, in the parameter's own memory layout: torch's fused
    optimizers walk weights and state in step, element by element."""
    if isinstance(value, np.ndarray):
        tensor = torch.from_numpy(np.require(value, requirements="W")).to(parameter.device)
        if tensor.dtype == torch.uint16:  # how bf16 is stored; no optimizer keeps 16-bit integers
            tensor = tensor.view(torch.bfloat16)
        if name not in state:
            state[name] = torch.empty_like(parameter) if tensor.shape == parameter.shape else torch.empty_like(tensor)
        with torch.no_grad():
            state[name].copy_(tensor)
    else:
        state[name] = value


class _Predictor(nn.Module):
    """A model together with the job's `predict`, so that export sees what evaluation saw."""

    def __init__(self, model: nn.Module, predict: Any):
        super().__init__()
        self.model, self.predict = model, predict

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.predict(self.model, named or (inputs[0] if len(inputs) == 1 else inputs))


def _split(batch: Batch, parts: int) -> Iterator[Batch]:
    """A batch in nearly equal parts."""
    if parts <= 1:
        yield batch
        return
    for rows in np.array_split(np.arange(batch.count), parts):
        taken = slice(int(rows[0]), int(rows[-1]) + 1)
        yield Batch(_rows(batch.inputs, taken), _rows(batch.targets, taken), batch.index[taken], batch.epoch, len(rows))


def _rows(value: Any, taken: slice) -> Any:
    if isinstance(value, dict):
        return {name: _rows(item, taken) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_rows(item, taken) for item in value)
    return None if value is None else value[taken]


def _numpy(value: Any) -> Any:
    """NumPy of tensors, also inside tuples, lists and mappings; bf16 becomes uint16 for weights, fp32 for outputs."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        if value.dtype == torch.bfloat16:
            value = value.view(torch.uint16) if not value.is_inference() else value.float()
        return value.numpy()
    if isinstance(value, dict):
        return {name: _numpy(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_numpy(item) for item in value)
    return value


@contextlib.contextmanager
def _memory_reported(phase: str, guarded: bool) -> Iterator[None]:
    """Turn an allocation that failed into `OutOfMemory`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not rollback.is_out_of_memory(error, guarded):
            raise
        raise errors.OutOfMemory(phase, rollback.first_line(error)) from error
