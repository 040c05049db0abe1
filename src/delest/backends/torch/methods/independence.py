"""Whether the rows of a batch go through a block independently of each other: found out, since nobody states it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from delest import errors
from delest.backends.torch import randomness
from delest.backends.torch.methods.blocks import Call
from delest.backends.torch.model import where
from delest.backends.torch.rollback import is_out_of_memory

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}  # of the largest: kernels round otherwise at another number of rows
_HALF_TOLERANCE = 3e-2
IN_PLACE = (
    "changes its inputs in place, and they are needed again in the backward pass (take inplace=True from its first layer)"
)
_BATCH_NORMS = nn.modules.batchnorm._BatchNorm


def fault_of_types(name: str, block: nn.Module) -> str | None:
    """Why the modules of a block do not let its rows be taken in parts, in words."""
    for inner, module in block.named_modules():
        if isinstance(module, _BATCH_NORMS) and module.training:
            full = ".".join(part for part in (name, inner) if part)
            return (
                f"layered_accumulation: the block {name!r} normalises over the batch ({full!r}, a {type(module).__name__}), which parts "
                "of it would change: freeze that layer with eval(), put nn.GroupNorm in its place, or leave the block out."
            )
    return None


def check(call: Call, tensors: Sequence[Tensor]) -> None:
    """Compare two rows taken together with the same rows taken one by one; random state stays as it was.

    Raises `BadInput` where they differ, where the block changes buffers, and where it uses tensors with gradient that are neither its
    inputs nor its parameters, at which nothing would arrive.
    """
    module, before = call.block.module, randomness.capture()
    versions = {name: (buffer, buffer._version) for name, buffer in module.named_buffers()}
    try:
        with call.precision():
            fault = _fault(call, tensors)
    except RuntimeError as error:
        if is_out_of_memory(error, True):
            raise
        fault = f"fails on single rows of its batch ({where(error)})"
    finally:
        randomness.restore(before)
    for name, buffer in module.named_buffers():
        if versions.get(name) != (buffer, buffer._version):
            fault = fault or f"changes its buffer {name!r} in every forward, which parts would do several times"
    if fault is not None:
        held = f" (it is given a {call.objects[0]}, which may keep something from call to call)" if call.objects else ""
        raise errors.BadInput(f"layered_accumulation: the block {call.name!r} {fault}{held}: leave it out.")


def _fault(call: Call, tensors: Sequence[Tensor]) -> str | None:
    modules = list(call.block.module.modules())
    dropping = [module for module in modules if isinstance(module, nn.modules.dropout._DropoutNd)]
    state = torch.get_rng_state()
    with _evaluating(dropping):
        fault = _differing(call, tensors)
    if torch.equal(state, torch.get_rng_state()):
        return fault
    # Random numbers were drawn by functions that no layer stands for: compared where they draw none, and in training whether a row
    # is the same beside others, with the same numbers.
    state = torch.get_rng_state()
    with _evaluating(modules):
        fault = _differing(call, tensors)
    if not torch.equal(state, torch.get_rng_state()):
        return "draws random numbers in evaluation too, so that parts cannot be compared with the whole"
    return fault or _influenced(call, tensors)


def _differing(call: Call, tensors: Sequence[Tensor]) -> str | None:
    versions = [tensor._version for tensor in tensors]
    with torch.no_grad():
        together, _ = call.run(call.taken(tensors, slice(0, 2)), 2)
    if versions != [tensor._version for tensor in tensors]:
        return IN_PLACE
    for row in range(2):
        inputs = [one.detach().requires_grad_(one.is_floating_point()) for one in call.taken(tensors, slice(row, row + 1))]
        with torch.enable_grad():
            alone, _ = call.run(inputs, 1)
        if _has_other_origin(alone, [*inputs, *call.block.module.parameters()]):
            return (
                "uses tensors with gradient that are neither its inputs nor its parameters, and no gradient would arrive there"
            )
        if not _near([one[row : row + 1] for one in together], alone):
            return "gives other values for a row alone than for the same row beside others"
    return None


def _influenced(call: Call, tensors: Sequence[Tensor]) -> str | None:
    """The first row beside the second, and beside another copy of itself."""
    found, drawn = [], randomness.capture()
    for order in ([0, 1], [0, 0]):
        randomness.restore(drawn)
        with torch.no_grad():
            taken = [one[order] if divided else one for one, divided in zip(tensors, call.divided, strict=True)]
            found.append([one[:1] for one in call.run(taken, 2)[0]])
    return None if _near(*found) else "gives other values for a row beside another one"


def _near(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    for a, b in zip(left, right, strict=True):
        room = (
            _TOLERANCES.get(a.dtype, _HALF_TOLERANCE) * float(a.detach().abs().max())
            if a.is_floating_point() and a.numel()
            else 0.0
        )
        if a.shape != b.shape or not torch.allclose(a.detach(), b.detach(), rtol=0.0, atol=room, equal_nan=True):
            return False
    return True


def _has_other_origin(outputs: Iterable[Tensor], known: Iterable[Tensor]) -> bool:
    """Whether gradients of the outputs would arrive anywhere else than at the known tensors."""
    leaves, waiting, seen = {id(one) for one in known}, [one.grad_fn for one in outputs], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable") and id(node.variable) not in leaves:
            return True
        waiting += [following for following, _ in node.next_functions]
    return False


@contextlib.contextmanager
def _evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    modes = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
