"""Gradients, updates and answers on each framework under Keras: the only part of a session that differs between them.

TensorFlow and JAX compile each of the three once for each shape of a batch; torch runs them as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import keras
from keras import ops

from delest import errors
from delest.frameworks.keras.kernels import Kernels
from delest.frameworks.keras.updates import fused
from delest.training import limit

Part = tuple[Any, Any, float]  # inputs, targets, share of the batch's rows


class Engine(Protocol):
    """One model with its optimizer. Inputs, targets and gradients are the framework's tensors."""

    in_place: bool  # statistics and seeds inside the model change in place: who may want them back keeps copies

    def gradient(self, parts: Iterable[Part], count: int = 1) -> tuple[Any, list[Any]]:
        """The loss of a batch that is given in `count` parts (penalties of layers included), and its gradient for each trainable variable: None for one
        that the loss does not depend on, zeros on JAX. Parts add to one set of gradients, in place. Statistics and seeds inside the model go on."""

    def update(self, gradients: list[Any]) -> Any:
        """One step of the optimizer; gives the norm of the gradient before clipping, None where nothing is clipped. One that fails leaves weights
        and the optimizer's state half changed, or without values."""

    def answer(self, inputs: Any) -> Any:
        """Outputs in evaluation mode, without gradient."""


def choose(
    model: keras.Model, optimizer: Any, mean: Callable[[Any, Any], Any], clip: float | None, *, bf16: bool = False
) -> Engine:
    """The engine of the framework that Keras was loaded with. With `bf16` layers compute in it where a gradient is taken."""
    name = keras.backend.backend()
    engines: dict[str, type[Any]] = {"tensorflow": _TensorFlow, "jax": _Jax, "torch": _Torch}
    if name not in engines:
        raise errors.BadInput(
            f"Keras computes with {name} (KERAS_BACKEND), which cannot train: set it to {', '.join(engines)}."
        )
    engine: Engine = engines[name](model, optimizer, mean, clip, Kernels(model, bf16=bf16))
    return engine


def set_threads(count: int) -> None:
    """Let the framework compute with so many threads. Raises `BadInput` where it takes no number, or has started with another."""
    name = keras.backend.backend()
    if name == "torch":
        import torch

        torch.set_num_threads(count)
    elif name == "tensorflow":
        import tensorflow as tf

        if tf.config.threading.get_intra_op_parallelism_threads() != count:
            try:
                tf.config.threading.set_intra_op_parallelism_threads(count)
            except RuntimeError as error:
                raise errors.BadInput(
                    f"TensorFlow had started before it could be told to use {count} threads: build the model inside its factory, not "
                    f"where the job's file is loaded, or set TF_NUM_INTRAOP_THREADS={count} in place of --threads."
                ) from error
    else:
        raise errors.BadInput(
            f"--threads {count}: JAX takes the cores that its process may use: leave it out, or start with `taskset -c 0-{count - 1}`."
        )


def survives_failed_allocation() -> bool:
    """Whether a limit on memory can be set to this process. TensorFlow ends it or hangs where an allocation fails, and XLA may where it compiles."""
    return bool(keras.backend.backend() == "torch")


def scatters_freed_blocks() -> bool:
    """Whether threads of the framework free large blocks in heaps of their own: TensorFlow's take up to twice the memory so, and no less in smaller parts."""
    return bool(keras.backend.backend() == "tensorflow")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a framework says that an allocation failed; each has words of its own, torch others where a budget is held."""
    if keras.backend.backend() == "torch":
        from delest.backends.torch import rollback

        if rollback.is_out_of_memory(error, limit.is_held()):
            return True
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(
        words in text for words in ("resource_exhausted", "oom when allocating", "can't allocate memory", "out of memory")
    )


def _clipped(gradients: list[Any], clip: float | None) -> tuple[list[Any], Any]:
    """Gradients scaled so that the norm of all together is at most `clip`, and that norm before."""
    if clip is None:
        return gradients, None
    found = [gradient for gradient in gradients if gradient is not None]
    norm = ops.sqrt(sum(ops.sum(ops.square(ops.cast(gradient, "float32"))) for gradient in found))
    scale = ops.minimum(1.0, clip / (norm + 1e-6))
    return [None if one is None else one * ops.cast(scale, one.dtype) for one in gradients], norm


class _TensorFlow:
    in_place = True

    def __init__(
        self, model: keras.Model, optimizer: Any, mean: Callable[[Any, Any], Any], clip: float | None, kernels: Kernels
    ):
        import tensorflow as tf

        variables, mean = model.trainable_variables, tf.autograph.experimental.do_not_convert(mean)

        # A step that adds to sums, these, and which of them the loss reaches; how many batches were in one part since it was used.
        self._adding: tuple[Any, list[Any], list[bool]] | None = None
        self._alone = 0

        def differentiated(inputs: Any, targets: Any, share: Any) -> Any:
            with tf.GradientTape() as tape, kernels.used():
                loss = _penalised(mean(_wide(model(inputs, training=True)), targets), model.losses, share)
            return loss, tape.gradient(loss, [variable.value for variable in variables])

        @tf.function(reduce_retracing=True)
        def gradient(inputs: Any, targets: Any, share: Any) -> Any:
            loss, found = differentiated(inputs, targets, share)
            return loss, [None if one is None else tf.convert_to_tensor(one) for one in found]  # embeddings' hold single rows

        def adder() -> tuple[Any, list[Any], list[bool]]:
            sums = [tf.Variable(tf.zeros_like(one.value), trainable=False) for one in variables]
            reached = [False] * len(sums)

            @tf.function(reduce_retracing=True)
            def add(inputs: Any, targets: Any, share: Any) -> Any:
                loss, found = differentiated(inputs, targets, share)
                for place, (total, one) in enumerate(zip(sums, found, strict=True)):
                    reached[place] = one is not None
                    if isinstance(one, tf.IndexedSlices):
                        total.scatter_add(one)
                    elif one is not None:
                        total.assign_add(one)
                return loss

            return add, sums, reached

        @tf.function
        def update(gradients: Any) -> Any:
            gradients, norm = _clipped(gradients, clip)
            with fused(optimizer):
                optimizer.apply(gradients, variables)
            return norm

        self._gradient, self._adder, self.update = gradient, adder, update
        self.answer = tf.function(lambda inputs: model(inputs, training=False), reduce_retracing=True)
        self._tf = tf

    def gradient(self, parts: Iterable[Part], count: int = 1) -> tuple[Any, list[Any]]:
        tf, loss = self._tf, 0.0
        told = ((inputs, targets, tf.constant(share, tf.float32)) for inputs, targets, share in parts)
        if count == 1:
            self._alone += 1
            if self._alone > 1:  # not the last of an epoch: batches are whole from here on
                self._adding = None
            loss, gradients = self._gradient(*next(told))
            return loss, list(gradients)
        self._alone, self._adding = 0, self._adding or self._adder()
        add, sums, reached = self._adding
        for total in sums:
            total.assign(tf.zeros_like(total))
        for part in told:
            loss = loss + add(*part)
        return loss, [one.value() if known else None for one, known in zip(sums, reached, strict=True)]


class _Jax:
    in_place = False

    def __init__(
        self, model: keras.Model, optimizer: Any, mean: Callable[[Any, Any], Any], clip: float | None, kernels: Kernels
    ):
        import jax

        self._jax, self.model, self.optimizer = jax, model, optimizer
        trainable, others = model.trainable_variables, model.non_trainable_variables
        for variable in (*trainable, *optimizer.variables):  # an array that somebody else holds too cannot be handed over
            variable.assign(jax.numpy.array(variable.value, copy=True))

        # `model.stateless_call` goes past `__call__`: a model whose `call` takes no `training` would then train without dropout.
        def loss_of(trained: Any, rest: Any, inputs: Any, targets: Any, share: Any) -> Any:
            values = zip([*trainable, *others], [*trained, *rest], strict=True)
            with keras.StatelessScope(values, collect_losses=True) as scope, kernels.used():
                loss = _penalised(mean(_wide(model(inputs, training=True)), targets), model.losses, share)
            return loss, [scope.get_current_value(variable) for variable in others]

        def answered(trained: Any, rest: Any, inputs: Any) -> Any:
            with keras.StatelessScope(zip([*trainable, *others], [*trained, *rest], strict=True)):
                return model(inputs, training=False)

        def updated(gradients: Any, trained: Any, state: Any) -> Any:
            gradients, norm = _clipped(gradients, clip)
            return *optimizer.stateless_apply(state, gradients, trained), norm

        gradient = jax.value_and_grad(loss_of, has_aux=True)

        def added(sums: Any, *given: Any) -> Any:
            found, gradients = gradient(*given)
            return found, [one + more for one, more in zip(sums, gradients, strict=True)]

        self._gradient, self._add = jax.jit(gradient), jax.jit(added, donate_argnums=0)
        self._zeros = jax.jit(lambda trained: [jax.numpy.zeros_like(one) for one in trained])
        self._update = jax.jit(updated, donate_argnums=(1, 2))  # new values take the places of the old ones
        self._answer = jax.jit(answered)

    def gradient(self, parts: Iterable[Part], count: int = 1) -> tuple[Any, list[Any]]:
        trained, rest = _values(self.model.trainable_variables), self.model.non_trainable_variables
        total, gradients = 0.0, None if count == 1 else self._zeros(trained)
        for part in parts:
            given = (trained, _values(rest), *part)
            (loss, changed), gradients = self._gradient(*given) if gradients is None else self._add(gradients, *given)
            _assign(rest, changed)
            total = total + loss
        assert gradients is not None
        return total, list(gradients)

    def update(self, gradients: list[Any]) -> Any:
        trained, state = self.model.trainable_variables, self.optimizer.variables
        found = self._update(gradients, _values(trained), _values(state))
        new, new_state, norm = self._jax.block_until_ready(found)  # what fails does so here, not where the loss is read
        _assign(trained, new)
        _assign(state, new_state)
        return norm

    def answer(self, inputs: Any) -> Any:
        return self._answer(_values(self.model.trainable_variables), _values(self.model.non_trainable_variables), inputs)


class _Torch:
    in_place = True

    def __init__(
        self, model: keras.Model, optimizer: Any, mean: Callable[[Any, Any], Any], clip: float | None, kernels: Kernels
    ):
        self.model, self.optimizer, self.mean, self.clip = model, optimizer, mean, clip
        self.kernels = kernels

    def gradient(self, parts: Iterable[Part], count: int = 1) -> tuple[Any, list[Any]]:
        import torch

        values, total = _values(self.model.trainable_variables), 0.0
        if count == 1:
            loss = self._loss(*next(iter(parts)))
            return loss.detach(), list(torch.autograd.grad(loss, values, allow_unused=True))
        try:
            for value in values:
                value.grad = None
            for part in parts:
                loss = self._loss(*part)
                torch.autograd.backward(loss, inputs=values)
                total = total + loss.detach()
            return total, [value.grad for value in values]
        finally:
            for value in values:
                value.grad = None

    def _loss(self, inputs: Any, targets: Any, share: float) -> Any:
        with self.kernels.used():
            return _penalised(self.mean(_wide(self.model(inputs, training=True)), targets), self.model.losses, share)

    def update(self, gradients: list[Any]) -> Any:
        import torch

        with torch.no_grad(), fused(self.optimizer):
            gradients, norm = _clipped(gradients, self.clip)
            self.optimizer.apply(gradients, self.model.trainable_variables)
        return norm

    def answer(self, inputs: Any) -> Any:
        import torch

        with torch.no_grad():
            return self.model(inputs, training=False)


def compiled(function: Callable[[], Any]) -> Callable[[], Any]:
    """A function of variables as TensorFlow runs it best; as it is on the others."""
    if keras.backend.backend() != "tensorflow":
        return function
    import tensorflow as tf

    return tf.function(function)


def penalised(loss: Any, losses: list[Any]) -> Any:
    """A loss with what layers add to it. Raises `BadInput` for one that is not a single number."""
    if len(loss.shape):
        raise errors.BadInput(
            f"the loss gives {tuple(loss.shape)} values, not one number: take their mean, as in keras.ops.mean(...)."
        )
    return sum((ops.cast(ops.sum(one), loss.dtype) for one in losses), loss)


def _penalised(loss: Any, losses: list[Any], share: Any) -> Any:
    return penalised(loss, losses) * ops.cast(share, loss.dtype)


def _wide(outputs: Any) -> Any:
    """What a model gives, from bf16 to fp32: losses are taken in no less."""
    return keras.tree.map_structure(lambda one: ops.cast(one, "float32") if _is_bf16(one) else one, outputs)


def _is_bf16(tensor: Any) -> bool:
    return bool(keras.backend.standardize_dtype(tensor.dtype) == "bfloat16")


def _values(variables: list[Any]) -> list[Any]:
    return [variable.value for variable in variables]


def _assign(variables: list[Any], values: list[Any]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
