"""Run chosen blocks part by part of the batch: in the forward pass without keeping anything but what enters them, and again in the
backward pass, each part differentiated before the next.

A block's gradients are summed on stand-ins of its parameters and handed to autograd whole, so that whatever waits for them (hooks,
updates in the backward pass, tied weights) sees each once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from delest import errors
from delest.backends.torch import randomness
from delest.backends.torch.building import is_fake
from delest.backends.torch.methods import independence
from delest.backends.torch.methods.blocks import Call, Forward, Outputs, blocks_named, slices

if TYPE_CHECKING:
    from delest.backends.torch.methods import Training


def apply(training: Training, config: dict[str, Any]) -> None:
    """Raises `BadInput` with every block that cannot be run in parts, as far as its modules' types tell; the rest is seen at the first
    step, before it changes anything."""
    parts = config["parts"]
    blocks = blocks_named(training.model, config["modules"], "layered_accumulation")
    faults = [fault for name, block in blocks.items() if (fault := independence.fault_of_types(name, block))]
    if parts < 2:
        faults.append(f"layered_accumulation: parts is {parts}, which divides nothing: give 2 or more.")
    if faults:
        raise errors.BadInput(faults)
    for name, block in blocks.items():
        block.forward = InParts(name, block, parts)
    training.evaluate_in_parts(parts)


class InParts(Forward):
    """A block's forward over parts of the batch, where gradients are computed in training mode."""

    def __init__(self, name: str, module: nn.Module, parts: int):
        super().__init__(module)
        self.name, self.parts = name, parts
        self.divided: list[bool] | None = None  # which tensors have rows, once rows were seen to be independent

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        if not (self.module.training and torch.is_grad_enabled()):
            return self.forward(*inputs, **named)
        call = Call(self.name, self, (inputs, named), self.divided)
        tensors, call.tensors = call.tensors, []
        if call.divided is not self.divided and call.rows > 1 and not is_fake(tensors[0]):
            independence.check(call, tensors)
            self.divided = call.divided
        run = _Run(call, slices(call.rows, self.parts), list(self.module.parameters()))
        made = _InParts.apply(run, *tensors, *run.parameters)
        assert run.outputs is not None
        return run.outputs.around(made)


class _Run:
    """A call in parts, and the random state before it, from which its repetition draws."""

    def __init__(self, call: Call, slices: list[slice], parameters: list[nn.Parameter]):
        self.call, self.slices, self.parameters = call, slices, parameters
        self.outputs: Outputs | None = None
        self.drawn: dict[str, Any] | None = None


class _InParts(torch.autograd.Function):
    """A block as one operator on its inputs and parameters."""

    @staticmethod
    def forward(ctx: Any, run: _Run, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.run = run
        ctx.set_materialize_grads(False)
        call, inputs = run.call, tensors[: len(run.call.divided)]
        run.drawn = None if is_fake(inputs[0]) else randomness.capture()
        versions, outputs = [tensor._version for tensor in inputs], list[Tensor]()
        with call.precision():
            for rows in run.slices:
                made, run.outputs = call.run(call.taken(inputs, rows), rows.stop - rows.start)
                outputs = outputs or [_room(part, call.rows) for part in made]
                for whole, part in zip(outputs, made, strict=True):
                    whole[rows] = part
        if versions != [tensor._version for tensor in inputs]:
            raise errors.BadInput(f"layered_accumulation: the block {call.name!r} {independence.IN_PLACE}: leave it out.")
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*(tensor for tensor in outputs if not tensor.is_floating_point()))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        run: _Run = ctx.run
        inputs = [
            tensor.detach().requires_grad_(wanted)
            for tensor, wanted in zip(ctx.saved_tensors[: len(run.call.divided)], ctx.needs_input_grad[1:], strict=False)
        ]
        with _drawing_again(run.drawn), _stand_ins(run.call.block.module, run.parameters) as own:
            found = _differentiated(run, inputs, gradients)
            results = [one.grad for one in own]
            for one in own:  # autograd keeps a gradient that nobody else refers to without copying it
                one.grad = None
        return (None, *found, *results)


def _differentiated(run: _Run, inputs: list[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Forward and backward of each part; gives the gradients of the inputs, those of parameters are left with these."""
    call = run.call
    found = [
        torch.zeros_like(one) if one.requires_grad and cut else None for one, cut in zip(inputs, call.divided, strict=True)
    ]
    for rows in run.slices:
        part = [
            one.detach().requires_grad_(whole.requires_grad) if cut else whole
            for one, whole, cut in zip(call.taken(inputs, rows), inputs, call.divided, strict=True)
        ]
        with torch.enable_grad(), call.precision():
            made, _ = call.run(part, rows.stop - rows.start)
        pairs = [(one, its[rows]) for one, its in zip(made, gradients, strict=True) if its is not None and one.requires_grad]
        del made
        if pairs:
            with torch.enable_grad():
                number = _Given.apply([its for _, its in pairs], *(one for one, _ in pairs))
            number.backward()
        for whole, one in zip(found, part, strict=True):
            if whole is not None and one.grad is not None:
                whole[rows] = one.grad
    return [one.grad if whole is None else whole for whole, one in zip(found, inputs, strict=True)]


class _Given(torch.autograd.Function):
    """A number whose gradients with respect to tensors are given. Handed to torch.autograd.backward instead, they make torch import its shapes'
    algebra, 34 MiB that come under the budget in the first backward pass."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return tensors[0].new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return (None, *ctx.gradients)


def _room(part: Tensor, rows: int) -> Tensor:
    """For as many rows, in the part's own memory format."""
    last = part.ndim == 4 and part.is_contiguous(memory_format=torch.channels_last) and not part.is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty((rows, *part.shape[1:]), dtype=part.dtype, device=part.device, memory_format=layout)


@contextlib.contextmanager
def _drawing_again(drawn: dict[str, Any] | None) -> Iterator[None]:
    if drawn is None:
        yield
        return
    after = randomness.capture()
    randomness.restore(drawn)
    try:
        yield
    finally:
        randomness.restore(after)


@contextlib.contextmanager
def _stand_ins(module: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of the same memory in the places of a module's own, which their gradients and hooks then leave alone."""
    made = {id(one): nn.Parameter(one.detach(), requires_grad=one.requires_grad) for one in parameters}
    places = [(owner, name, own) for owner in module.modules() for name, own in owner._parameters.items() if own is not None]
    for owner, name, own in places:
        setattr(owner, name, made[id(own)])  # recurrent layers keep a list of their weights up to date by it
    try:
        yield [made[id(one)] for one in parameters]
    finally:
        for owner, name, own in places:
            setattr(owner, name, own)
