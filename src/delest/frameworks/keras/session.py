"""A `Session` over a Keras model: delest's own loop, checkpoints and schedules on TensorFlow, JAX or torch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np

from delest import errors, malloc
from delest.frameworks.keras import building, engines, losses, optimizers
from delest.frameworks.keras.layers import changing, named_weights
from delest.job import Job
from delest.records.batch import Batch, Lazy, Outputs, State, Step
from delest.records.plan import Plan
from delest.records.source import Schema
from delest.tensors import Under
from delest.training import limit

METHODS = ("allocator", "precision", "micro_batch")  # of a plan, that a Keras job can follow


class KerasSession:
    """One model being trained. See `delest.backends.Session` for what each call promises."""

    def __init__(self, job: Job, plan: Plan, schema: Schema):
        if faults := unsupported(job, plan):
            raise errors.BadInput(faults)
        if plan.threads:
            engines.set_threads(plan.threads)
        self.sized, self.scatters = not engines.survives_failed_allocation(), engines.scatters_freed_blocks()
        if self.sized:
            limit.only_watch()
        self.job, self.schema = job, schema
        if plan.config("allocator") == {"name": "mmap"}:
            malloc.fix_threshold()
        self.model = building.build(job, schema)
        self.optimizer = optimizers.build(self.model, job.recipe)
        self.loss = losses.choose(job.loss, schema.target.kind if schema.target else None, job.recipe.label_smoothing)
        self.bf16 = job.recipe.precision == "bf16" or plan.config("precision") == {"dtype": "bf16"}
        self.engine = engines.choose(self.model, self.optimizer, self.loss.mean, job.recipe.clip, bf16=self.bf16)
        normalised = any(isinstance(layer, keras.layers.BatchNormalization) for layer in optimizers.layers_of(self.model))
        self._least_rows = 2 if normalised else 1
        self.parts = math.ceil(job.batch_size / plan.micro_batch)
        self._base_rate, self._stepped = float(self.optimizer.learning_rate), False
        kept = {id(variable) for variable in self.model.weights}
        self._seeds = [variable for variable in self.model.non_trainable_variables if id(variable) not in kept]

    @property
    def most_parts(self) -> int:
        """As many parts as a batch can be split into, each with as many rows as the model needs."""
        return max(1, self.job.batch_size // self._least_rows)

    def warm(self) -> None:
        """Start the threads of parallel operators."""
        keras.ops.exp(keras.ops.ones((1 << 18,)))

    # One step

    def step(self, batch: Batch, rate: float) -> Step:
        """One optimizer step on a batch, its gradient summed over `parts` micro-batches weighted by their rows.

        On failure weights, statistics, optimizer and random state are as before, but for an update that fails for want of memory: `OutOfMemory.begun`
        says so, and a state is to be loaded.
        """
        phase, before = "forward", self._remember()
        try:
            self.optimizer.learning_rate.assign(self._base_rate * rate)
            count = self._parts_of(batch.count)
            parts = (
                (self._tensors(part.inputs), building.tensors(part.targets), part.count / batch.count)
                for part in _split(batch, count)
            )
            total, gradients = self.engine.gradient(parts, count)
            phase = "optimizer"
            norm = self.engine.update(gradients)
        except Exception as error:
            before()
            if not engines.is_out_of_memory(error):
                if self._stepped or isinstance(error, errors.DelestError):
                    raise
                what = "a step in bf16" if self.bf16 else "a training step"
                raise errors.BadInput(f"{what} fails: {building.where(error)}") from error
            raise errors.OutOfMemory(phase, str(error).partition("\n")[0], phase == "optimizer") from error
        self._stepped = True
        return Step(Lazy(lambda: float(total)), batch.count, None if norm is None else Lazy(lambda: float(norm)))

    def _parts_of(self, count: int) -> int:
        """Parts of a batch of `count` rows: none larger than those of a whole batch, none of one row where the model
        normalises over the batch."""
        rows = math.ceil(self.job.batch_size / self.parts)
        return min(math.ceil(count / rows), max(1, count // self._least_rows))

    def _remember(self) -> Callable[[], None]:
        """Note what a forward pass changes (statistics, seeds, the rate), and give the function that brings it back."""
        variables, rate = changing(self.model), self.optimizer.learning_rate
        copied = keras.ops.copy if self.engine.in_place else lambda value: value
        values = [copied(variable.value) for variable in variables]
        variables, values = [*variables, rate], [*values, keras.ops.copy(rate.value)]  # which an update takes
        random = _torch_state()

        def back() -> None:
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)
            _set_torch_state(random)

        return back

    # Evaluation

    def outputs(self, feed: Any) -> Iterator[Outputs]:
        """Evaluation mode over `feed.ordered()`. Raises `OutOfMemory`."""
        rows = min(max(self.job.batch_size, 256), math.ceil(self.job.batch_size / self.parts))
        for batch in feed.ordered():
            for part in _split(batch, -(-batch.count // rows)):
                try:
                    outputs = self.engine.answer(self._tensors(part.inputs))
                    judged = self.loss.rows(outputs, building.tensors(part.targets))
                except Exception as error:
                    if not engines.is_out_of_memory(error):
                        raise
                    raise errors.OutOfMemory("evaluation", str(error).partition("\n")[0]) from error
                yield Outputs(_numpy(outputs), part.targets, _numpy(judged), part.index)

    def predict(self, inputs: Any) -> Any:
        """Outputs for inputs as a `Feed` gives them (NumPy; images [B, C, H, W]), in evaluation mode, NumPy."""
        return _numpy(self.engine.answer(self._tensors(inputs)))

    @contextlib.contextmanager
    def answering(self) -> Iterator[Callable[[Any], Any]]:
        """`predict` for many calls."""
        yield self.predict

    def _tensors(self, inputs: Any) -> Any:
        return building.tensors(building.received(inputs, self.schema))

    # State

    def state(self) -> State:
        """Weights by name, the optimizer's variables and the seeds of layers, each array taken from its variable when it is asked for: use
        them before the next step."""
        held = {f"model.{name}": variable for name, variable in named_weights(self.model).items()}
        held |= {f"random.{number}": variable for number, variable in enumerate(self._seeds)}
        held |= {f"optimizer.{number}": variable for number, variable in enumerate(self.optimizer.variables)}
        return State(_Held(held, _torch_state()), {"keras": keras.backend.backend()})

    def load(self, state: State) -> None:
        """Take up a state; raises `BadInput` where it belongs to another model, optimizer or framework under Keras."""
        written, here = state.scalars.get("keras"), keras.backend.backend()
        if written != here:
            raise errors.BadInput(
                f"the checkpoint was written by {f'Keras on {written}' if written else 'a torch job'}, this is Keras on {here}: go on "
                f"with {f'KERAS_BACKEND={written}' if written else 'the job that it belongs to'}, or start a new run."
            )
        self.load_weights(Under(state.arrays, "model."))
        numbered = [(f"random.{number}", variable) for number, variable in enumerate(self._seeds)]
        numbered += [(f"optimizer.{number}", variable) for number, variable in enumerate(self.optimizer.variables)]
        if faults := _misfits(dict(numbered), state.arrays):
            raise errors.BadInput(f"the checkpoint does not fit this job's optimizer and layers: {'; '.join(faults[:5])}.")
        for name, variable in numbered:
            _set(variable, state.arrays[name])
        if "random.torch" in state.arrays:
            _set_torch_state(state.arrays["random.torch"])

    def weights(self) -> dict[str, Any]:
        """Weights by path ("dense/kernel"), statistics of normalisation included, copied; bf16 as uint16."""
        return {name: _stored(variable).copy() for name, variable in named_weights(self.model).items()}

    def load_weights(self, arrays: Mapping[str, Any]) -> None:
        """Copy weights in by name; raises `BadInput` naming what is missing, left over or of another shape."""
        own = named_weights(self.model)
        faults = _misfits(own, arrays) + [f"{name} is not in this model" for name in arrays if name not in own]
        if faults:
            more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
            raise errors.BadInput(f"these weights do not fit the model: {'; '.join(faults[:5])}{more}.")
        for name, variable in own.items():
            _set(variable, arrays[name])

    def parameters(self) -> int:
        """As `model.count_params()` has it: frozen ones and statistics of normalisation included."""
        return int(self.model.count_params())


class _Held(Mapping[str, Any]):
    """The values of variables by name, and torch's random state where there is one: no array is made before it is wanted."""

    def __init__(self, variables: Mapping[str, Any], random: Any):
        self._variables, self._random = variables, {} if random is None else {"random.torch": random.numpy()}

    def __getitem__(self, name: str) -> Any:
        return self._random[name] if name in self._random else _stored(self._variables[name])

    def __iter__(self) -> Iterator[str]:
        yield from self._variables
        yield from self._random

    def __len__(self) -> int:
        return len(self._variables) + len(self._random)


def unsupported(job: Job, plan: Plan) -> list[str]:
    """What a job or a plan asks for that Keras jobs do not have, each with what does work."""
    found = []
    others = [choice.method for choice in plan.choices if choice.method not in METHODS]
    if others:
        found.append(
            f"the plan's {', '.join(others)} cannot be applied to a Keras job, which takes {', '.join(METHODS)} alone."
        )
    if plan.device != "cpu":
        found.append(f"device {plan.device}: Keras jobs are trained on the CPU so far: leave it out.")
    for name in ("step", "predict"):
        if getattr(job, name) is not None:
            found.append(
                f"a Keras job takes no `{name}` yet: give it a `loss(outputs, targets)`, and a model whose output is judged."
            )
    if job.recipe.memory_format == "channels_last":
        found.append("memory_format is PyTorch's: Keras has the channels last already. Leave it out.")
    return found


def _split(batch: Batch, parts: int) -> Iterator[Batch]:
    """A batch in nearly equal parts."""
    for rows in np.array_split(np.arange(batch.count), parts):
        taken = slice(int(rows[0]), int(rows[-1]) + 1)
        inputs = keras.tree.map_structure(lambda array, taken=taken: array[taken], batch.inputs)
        targets = keras.tree.map_structure(lambda array, taken=taken: None if array is None else array[taken], batch.targets)
        yield Batch(inputs, targets, batch.index[taken], batch.epoch, len(rows))


def _numpy(value: Any) -> Any:
    return keras.tree.map_structure(lambda one: _narrow(keras.ops.convert_to_numpy(one)), value)


def _narrow(array: Any) -> Any:
    """bf16, which NumPy does not have, as fp32."""
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def _stored(variable: Any) -> Any:
    array = np.asarray(keras.ops.convert_to_numpy(variable.value))
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


def _set(variable: Any, array: Any) -> None:
    if variable.dtype == "bfloat16" and array.dtype == np.uint16:
        import ml_dtypes

        array = array.view(ml_dtypes.bfloat16)
    variable.assign(keras.ops.convert_to_tensor(np.array(array), dtype=variable.dtype))


def _misfits(own: Mapping[str, Any], arrays: Mapping[str, Any]) -> list[str]:
    faults = [f"{name} is missing" for name in own if name not in arrays]
    return faults + [
        f"{name} has shape {tuple(arrays[name].shape)}, the model's has {tuple(variable.shape)}"
        for name, variable in own.items()
        if name in arrays and tuple(arrays[name].shape) != tuple(variable.shape)
    ]


def _torch_state() -> Any:
    """torch's own random state, which layers without a seed draw from on torch; None on others, whose layers hold theirs."""
    if keras.backend.backend() != "torch":
        return None
    import torch

    return torch.get_rng_state()


def _set_torch_state(state: Any) -> None:
    if state is not None:
        import torch

        torch.set_rng_state(state if isinstance(state, torch.Tensor) else torch.from_numpy(np.array(state)))
