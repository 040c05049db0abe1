"""Watching one training loop operator by operator: what each makes, how long it lives, for which module.

Works on fake tensors (shapes without memory) and on real ones. Storages are followed from the operator that made them to the
moment when nothing refers to them any more. Modules are known in the forward pass by hooks, in the backward pass by the
sequence number that autograd gave to each operator of the forward pass.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from delest.backends.torch import fake_sparse, kernels
from delest.backends.torch.building import is_fake
from delest.backends.torch.costs import cost
from delest.records.trace import Category, Phase

_FOR_EVER = 1 << 60


class NoUpdate(Exception):
    """A recording ends where the first update would begin."""


class Recorder(TorchDispatchMode):
    """Fills the columns of a `Trace` while it is entered. `phase` and `step` are set by whoever drives the loop."""

    def __init__(self, model: nn.Module | None = None, *, updates: bool = True) -> None:
        super().__init__()
        self._updates = updates
        self.notes: list[str] = []
        self.phase: Phase = "start"
        self.step = 0
        self.born: list[int] = []
        self.dies: list[int] = []
        self.bytes: list[int] = []
        self.category: list[Category] = []
        self.storage_module: list[str] = []
        self.rows: list[tuple[Any, ...]] = []  # one an operator: name, module, phase, step, reads, writes, cost, signature
        self._known: dict[int, int] = {}  # address of a live storage to its number
        self._names: dict[int, str] = {}
        self._stack: list[str] = []
        self._makers: dict[int, str] = {}  # sequence number of a forward operator to its module
        self._handles: list[Any] = []
        self._forward_from = 0
        self._model = model
        self._owners: dict[int, str] = {}  # of parameters
        if model is not None:
            self._owners = {id(one): name.rpartition(".")[0] for name, one in model.named_parameters()}
            self._names = {id(module): name for name, module in model.named_modules()}

    # What is where

    def register(self, tensors: Iterable[Tensor], category: Category, module: str = "") -> list[int]:
        """Note tensors that exist already, or say what those are for that an operator made."""
        numbers = [number for tensor in tensors for number in self._numbers_of(tensor, module)]
        for number in numbers:
            if self.category[number] != "data":  # a sparse gradient's indices can be the batch's own
                self.category[number] = category
            if module:
                self.storage_module[number] = module
        return numbers

    def register_model(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            self.register(module.parameters(recurse=False), "parameters", name)
            self.register(module.buffers(recurse=False), "buffers", name)

    def register_gradients(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            grads = (parameter.grad for parameter in module.parameters(recurse=False))
            self.register((grad for grad in grads if grad is not None), "gradients", name)

    def register_optimizer(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        owners = {
            id(parameter): name for name, module in model.named_modules() for parameter in module.parameters(recurse=False)
        }
        for parameter, state in optimizer.state.items():
            tensors = (value for value in tree_leaves(state) if isinstance(value, Tensor))
            self.register(tensors, "optimizer", owners.get(id(parameter), ""))

    def live_bytes(self) -> int:
        return sum(self.bytes[number] for number in self._known.values())

    # While it runs

    def __enter__(self) -> Recorder:
        self._handles = [
            nn.modules.module.register_module_forward_pre_hook(self._enter_module),
            nn.modules.module.register_module_forward_hook(self._leave_module, always_call=True),
        ]
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._stack.clear()
        super().__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SILENT:
            if func is torch.ops.prim.device.default and is_fake(args[0]):
                return args[0].fake_device  # asked before every operator; the fake mode's own answer is slow
            return func(*args, **kwargs)
        phase, module = self._place()
        if func is torch.ops.aten._local_scalar_dense.default and phase == "update":
            # Optimizers read their own count of steps, which bounds no size.
            value = getattr(args[0], "constant", None)
            return 1.0 if value is None and is_fake(args[0]) else func(*args, **kwargs)
        given = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        reads = tuple(dict.fromkeys(number for tensor in given for number in self._numbers_of(tensor, "")))
        outputs = fake_sparse.answer(func, args, kwargs)
        if outputs is None:
            outputs = func(*args, **kwargs)
        made = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        given = [tensor for tensor in tree_leaves(made) if isinstance(tensor, Tensor)]
        writes = tuple(dict.fromkeys(number for tensor in given for number in self._numbers_of(tensor, module)))
        figures = cost(func, args, kwargs, outputs)
        self.rows.append((str(func), module, phase, self.step, reads, writes, figures, kernels.signature(func, args, kwargs)))
        return outputs

    def _place(self) -> tuple[Phase, str]:
        """The phase and the module that the next operator belongs to."""
        node = torch._C._current_autograd_node()
        if node is not None and self.phase in ("forward", "backward"):
            if self.phase == "forward":
                self.phase = "backward"
                self._keep_activations()
            if self._stack:  # recomputed inside the backward pass, and perhaps differentiated there
                self._makers.setdefault(torch._C._autograd._get_sequence_nr() - 1, self._stack[-1])
                return "backward", self._stack[-1]
            return "backward", self._makers.get(node._sequence_nr(), "")
        module = self._stack[-1] if self._stack else ""
        if self.phase == "backward" and self._stack:
            self.phase = "forward"  # the next micro-batch
        if self.phase == "forward":
            # The node of a differentiable operator is made just before its kernel is called.
            self._makers.setdefault(torch._C._autograd._get_sequence_nr() - 1, module)
        return self.phase, module

    def _keep_activations(self) -> None:
        """What the forward pass made and is still there when the backward pass begins, autograd has kept."""
        for number in self._known.values():
            if self.category[number] == "temporaries" and self.born[number] >= self._forward_from:
                self.category[number] = "activations"

    def begin(self, step: int, phase: Phase) -> None:
        self.step, self.phase, self._forward_from = step, phase, len(self.rows)

    def update(self) -> None:
        """The gradients are complete; what follows is the optimizer's. Raises `NoUpdate` where that is not wanted."""
        if not self._updates:
            raise NoUpdate
        self.phase = "update"
        if self._model is not None:
            self.register_gradients(self._model)

    @contextlib.contextmanager
    def updating(self, parameter: Tensor) -> Iterator[bool]:
        """An update inside the backward pass, right after the parameter's gradient; gives whether updates are wanted."""
        if self._updates:
            self.register([] if parameter.grad is None else [parameter.grad], "gradients", self._owners.get(id(parameter), ""))
        before = self.phase
        self.phase = "update" if self._updates else before
        try:
            yield self._updates
        finally:
            self.phase = before

    def _numbers_of(self, tensor: Tensor, module: str) -> Iterator[int]:
        for part in _dense(tensor):
            storage = part.untyped_storage()
            key = storage._cdata
            number = self._known.get(key)
            if number is None:
                number = len(self.born)
                self.born.append(len(self.rows))
                self.dies.append(_FOR_EVER)
                self.bytes.append(storage.nbytes())
                self.category.append("temporaries")
                self.storage_module.append(module)
                self._known[key] = number
                weakref.finalize(storage, self._died, key, number)
            yield number

    def _died(self, key: int, number: int) -> None:
        self.dies[number] = len(self.rows)
        self._known.pop(key, None)

    def _enter_module(self, module: nn.Module, inputs: Any) -> None:
        self._stack.append(self._names.get(id(module), ""))

    def _leave_module(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        self._stack.pop()


# Questions about a tensor, of which fake tensors ask many.
_SILENT = {
    torch.ops.prim.device.default,
    torch.ops.prim.layout.default,
    torch.ops.aten.sym_size.default,
    torch.ops.aten.is_contiguous.default,
    torch.ops.aten.detach.default,
}


def _dense(tensor: Tensor) -> tuple[Tensor, ...]:
    """The tensors that hold a tensor's memory: itself, or the indices and values of a sparse one."""
    if tensor.layout == torch.strided:
        return (tensor,)
    if tensor.layout == torch.sparse_coo:
        return (tensor._indices(), tensor._values())
    return ()
