"""torch-pruning's dependency graph of a network, with what it does not see: products with raw parameters, and inputs that are concatenated.

The graph is read from the autograd nodes of a forward pass. While it runs, what is missing is put in: a product is made one node, whose only input are the
activations that it sums over, as is a recurrent layer, and raw inputs beside computed channels get a node that says how many they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from delest.backends.torch.pruning.layers import Fixed, Product, special_pruners
from delest.backends.torch.pruning.observed import tensors

_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)
_RECURRENT = ("gru", "lstm", "rnn_relu", "rnn_tanh")
_MATRIX_PRODUCTS = (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__)


class Graph(torch_pruning.DependencyGraph):
    """The dependency graph of a network with its `products`, and the `names` of what is in it."""

    def __init__(self, model: nn.Module, run: Callable[[nn.Module], Any]):
        super().__init__()
        pruners = special_pruners(model)
        self._watch = _Watch(model, lambda module: self._is_layer(module, pruners))

        def outputs(network: nn.Module, _: Any) -> list[Tensor]:
            with self._watch:
                made = tensors(run(network))
            return [tensor for tensor in (*made, *self._watch.loose) if tensor.requires_grad]

        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.build_dependency(model, example_inputs=None, forward_fn=outputs, customized_pruners=pruners, verbose=False)
        self.products = list(self._watch.products.values())
        self.names: dict[Any, str] = {module: name for name, module in model.named_modules()}
        self.names |= {product: product.name for product in self.products}

    def _trace_computational_graph(self, module2node: Any, output: Any, gradfn2module: Any, reused: Any, visited: Any) -> Any:
        gradfn2module.update(self._watch.found)
        return super()._trace_computational_graph(module2node, output, gradfn2module, reused, visited)

    def _is_layer(self, module: nn.Module, pruners: Mapping[type, Any]) -> bool:
        return type(module) in pruners or torch_pruning.ops.module2type(module) != torch_pruning.ops.OPTYPE.ELEMENTWISE


class _Node(torch.autograd.Function):
    """A value as an autograd node of its own, whose inputs are those that are named; never differentiated."""

    @staticmethod
    def forward(_: Any, value: Tensor, *taken: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError("a traced network has no gradients")


@dataclass(frozen=True)
class _Use:
    """How an operation multiplies: the last dimension of `activations` with dimension `inner` of `weight`, of which `outer` comes out last."""

    activations: Tensor
    weight: Tensor
    inner: int
    outer: int
    others: Sequence[Tensor] = ()  # further activations in it


class _Watch(TorchFunctionMode):
    """Puts nodes into a forward pass; `found` by autograd node."""

    def __init__(self, model: nn.Module, is_layer: Callable[[nn.Module], bool]):
        super().__init__()
        self.found: dict[Any, Product | Fixed] = {}
        self.products: dict[int, Product] = {}
        self.loose: list[Tensor] = []  # what leads to layers that the outputs do not lead to any more
        self._is_layer = is_layer
        self._owners = {
            id(parameter): (f"{name}.{attribute}".strip("."), module, attribute)
            for name, module in reversed(list(model.named_modules()))
            for attribute, parameter in module.named_parameters(recurse=False)
        }
        self._linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CONCATENATIONS:
            return self._concatenated(func, *args, **(kwargs or {}))
        made = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in _RECURRENT and made[0].requires_grad:
            return self._recurrent(made, args[0])
        use = None if kwargs else self._use(func, args)
        if use is None or not made.requires_grad or not use.activations.requires_grad:
            return made
        product = self._product(use, made)
        if product is None:
            return made
        self.loose += [self._node(Fixed(other.shape[-1]), other, other) for other in use.others if other.requires_grad]
        return self._node(product, made, use.activations)

    def _node(self, item: Product | Fixed, value: Tensor, *taken: Tensor) -> Tensor:
        node = _Node.apply(value.detach(), *taken)
        self.found[node.grad_fn] = item
        return node

    def _recurrent(self, made: Sequence[Tensor], given: Tensor) -> tuple[Tensor, ...]:
        """The outputs of a recurrent layer without its nodes for each step in time, of which there are thousands; its last states hang on them."""
        outputs = _Node.apply(made[0].detach(), given if given.requires_grad else given.detach().requires_grad_())
        return outputs, *(_Node.apply(state.detach(), outputs) for state in made[1:])

    def _concatenated(self, func: Any, parts: Any, dim: int = 0, **more: Any) -> Tensor:
        dim = more.pop("axis", dim)
        if any(part.requires_grad for part in parts):
            parts = [
                part
                if part.requires_grad or not part.is_floating_point() or not part.numel()
                else self._node(Fixed(part.shape[dim]), part, part.detach().requires_grad_())
                for part in parts
            ]
        return func(parts, dim, **more)

    def _product(self, use: _Use, made: Tensor) -> Product | None:
        """The product that is made; None where the parameter is used in another way elsewhere, so that cutting it once would not do."""
        parameter, order = self._parameter(use.weight)
        inner, outer = order[use.inner], order[use.outer]
        name, owner, attribute = self._owners[id(parameter)]
        product = self.products.setdefault(
            id(parameter),
            Product(
                name=name,
                owner=owner,
                attribute=attribute,
                inner=inner,
                outer=outer,
                own=not self._is_layer(owner),
                inputs=tuple(use.activations.shape),
                outputs=tuple(made.shape),
            ),
        )
        return product if (product.inner, product.outer) == (inner, outer) else None

    def _use(self, func: Any, args: Any) -> _Use | None:
        if func in _MATRIX_PRODUCTS and self._is_parameter(args[1]) and args[1].ndim >= 2:
            return _Use(args[0], args[1], args[1].ndim - 2, args[1].ndim - 1)
        if func is functional.linear and args[2:] in ((), (None,)) and self._is_parameter(args[1]):
            return None if id(args[1]) in self._linear else _Use(args[0], args[1], 1, 0)
        return self._einsum(*args) if func is torch.einsum else None

    def _einsum(self, equation: Any, *operands: Any) -> _Use | None:
        """An `einsum` with one parameter, in the form "bld,edh->eblh"."""
        factors: Sequence[Tensor] = operands[0] if len(operands) == 1 and not isinstance(operands[0], Tensor) else operands
        if not isinstance(equation, str) or "..." in equation or "->" not in equation:
            return None
        given, _, made = equation.replace(" ", "").partition("->")
        pairs = list(zip(given.split(","), factors, strict=True))
        weights = [(letters, factor) for letters, factor in pairs if self._is_parameter(factor)]
        others = [(letters, factor) for letters, factor in pairs if not self._is_parameter(factor)]
        if len(weights) != 1:
            return None
        of, weight = weights[0]
        summed = [pair for pair in others if pair[0][-1:] in set(of) - set(made)]
        if not summed or made[-1:] not in set(of) - set("".join(letters for letters, _ in others)):
            return None
        letters, activations = summed[0]
        rest = [factor for _, factor in others if factor is not activations]
        return _Use(activations, weight, of.index(letters[-1]), of.index(made[-1]), rest)

    def _is_parameter(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and self._parameter(tensor)[0] is not None

    def _parameter(self, tensor: Tensor) -> tuple[nn.Parameter | None, list[int]]:
        """The parameter that a tensor is, or is a transposed view of, and which of its dimensions the tensor's are."""
        whole = tensor if isinstance(tensor, nn.Parameter) else tensor._base
        if (
            not isinstance(whole, nn.Parameter)
            or id(whole) not in self._owners
            or sorted(whole.stride()) != sorted(tensor.stride())
        ):
            return None, []
        order = [whole.stride().index(stride) for stride in tensor.stride()]
        same = sorted(order) == list(range(whole.ndim)) and [whole.shape[dim] for dim in order] == list(tensor.shape)
        return (whole, order) if same else (None, [])
