"""Gradients, updates and answers on each framework under Keras: the only part of a session that differs between them.

TensorFlow and JAX compile each of the three once for each shape of a batch; torch runs them as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import keras
from keras import ops

from delest import errors
from delest.frameworks.keras.kernels import Kernels
from delest.frameworks.keras.updates import fused
from delest.training import limit


class Engine(Protocol):
    """One model with its optimizer. Inputs, targets and gradients are the framework's tensors."""

    in_place: bool  # statistics and seeds inside the model change in place: who may want them back keeps copies

    def gradient(self, inputs: Any, targets: Any, share: float) -> tuple[Any, list[Any]]:
        """`share` of the mean loss of a micro-batch (penalties of layers included), and its gradient for each trainable variable: None for one that
        the loss does not depend on, zeros on JAX. Statistics and seeds inside the model go on."""

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


def added(gradients: list[Any] | None, more: list[Any]) -> list[Any]:
    """The sum of two parts' gradients; `gradients` None: of the first part."""
    if gradients is None:
        return more
    return [a if b is None else b if a is None else a + b for a, b in zip(gradients, more, strict=True)]


class _TensorFlow:
    in_place = True

    def __init__(
        self, model: keras.Model, optimizer: Any, mean: Callable[[Any, Any], Any], clip: float | None, kernels: Kernels
    ):
        import tensorflow as tf

        variables, mean = model.trainable_variables, tf.autograph.experimental.do_not_convert(mean)

        @tf.function(reduce_retracing=True)
        def gradient(inputs: Any, targets: Any, share: Any) -> Any:
            with tf.GradientTape() as tape, kernels.used():
                loss = _penalised(mean(_wide(model(inputs, training=True)), targets), model.losses, share)
            found = tape.gradient(loss, [variable.value for variable in variables])
            return loss, [None if one is None else tf.convert_to_tensor(one) for one in found]  # embeddings' hold single rows

        @tf.function
        def update(gradients: Any) -> Any:
            gradients, norm = _clipped(gradients, clip)
            with fused(optimizer):
                optimizer.apply(gradients, variables)
            return norm

        self._gradient, self.update = gradient, update
        self.answer = tf.function(lambda inputs: model(inputs, training=False), reduce_retracing=True)
        self._share = lambda share: tf.constant(share, tf.float32)

    def gradient(self, inputs: Any, targets: Any, share: float) -> tuple[Any, list[Any]]:
        loss, gradients = self._gradient(inputs, targets, self._share(share))
        return loss, list(gradients)


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

        self._gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
        self._update = jax.jit(updated, donate_argnums=(1, 2))  # new values take the places of the old ones
        self._answer = jax.jit(answered)

    def gradient(self, inputs: Any, targets: Any, share: float) -> tuple[Any, list[Any]]:
        rest = self.model.non_trainable_variables
        (loss, changed), gradients = self._gradient(
            _values(self.model.trainable_variables), _values(rest), inputs, targets, share
        )
        _assign(rest, changed)
        return loss, list(gradients)

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

    def gradient(self, inputs: Any, targets: Any, share: float) -> tuple[Any, list[Any]]:
        import torch

        with self.kernels.used():
            outputs = _wide(self.model(inputs, training=True))
            loss = _penalised(self.mean(outputs, targets), self.model.losses, share)
        values = _values(self.model.trainable_variables)
        return loss.detach(), list(torch.autograd.grad(loss, values, allow_unused=True))

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
