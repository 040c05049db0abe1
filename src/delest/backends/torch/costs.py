"""What one dispatched operator has to do: arithmetic, and bytes that are read and written.

Works on tensors of any sort, fake ones above all: only shapes, strides and formats are looked at. How an operator is counted is
found once for each operator, since a trace asks some ten thousand times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry


class Cost(NamedTuple):
    """Of one call. Bytes are moved once each, as if nothing stayed in a cache between two operators."""

    kind: str  # matmul, convolution, depthwise, attention, recurrent; one of `_SLOW` or memory; view: no work at all
    dtype: str  # that it computes in: fp32, bf16, fp16, fp64, int
    flops: float  # a multiply-add is 2; only of the kinds that have a rate of their own
    moved_bytes: float  # inputs read and outputs written; what is changed in place counts twice


def cost(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Any) -> Cost:
    """What a call of the operator `func` (an `OpOverload`) that gave `outputs` had to do."""
    count = _counts.get(func)
    if count is None:
        count = _counts[func] = _find_count(func)
    return count(args, kwargs, outputs)


Count = Callable[[Sequence[Any], Mapping[str, Any], Any], Cost]
_counts: dict[Any, Count] = {}
_VIEW = Cost("view", "int", 0.0, 0.0)
_FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}

# Outputs share the storage of an input although the schema does not say so; or nothing but a number is read.
_UNDECLARED_VIEWS = {"_unsafe_view", "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk", "lift_fresh", "set_", "resize_"}
_ALLOCATIONS = {
    "empty",
    "empty_like",
    "empty_strided",
    "empty_permuted",
    "new_empty",
    "new_empty_strided",
    "_local_scalar_dense",
}
# What is changed is not read before.
_OVERWRITING = {
    *("copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "random_", "exponential_", "log_normal_", "cauchy_"),
    *("geometric_", "_foreach_copy_", "_foreach_zero_"),
}
# Position of the left matrix; each entry of the output is a sum over its last axis.
_PRODUCTS = {
    "mm": 0,
    "bmm": 0,
    "mv": 0,
    "dot": 0,
    "linear": 0,
    "mkldnn_linear": 0,
    "addmm": 1,
    "baddbmm": 1,
    "addbmm": 1,
    "addmv": 1,
}
_PRODUCTS["_addmm_activation"] = 1
# Matrix products that attention computes from the same sizes: scores and output; backward once more the scores, and four.
_ATTENTION_PRODUCTS = {
    "_scaled_dot_product_flash_attention_for_cpu": 2,
    "_scaled_dot_product_flash_attention": 2,
    "_scaled_dot_product_efficient_attention": 2,
    "_scaled_dot_product_cudnn_attention": 2,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 5,
    "_scaled_dot_product_flash_attention_backward": 5,
    "_scaled_dot_product_efficient_attention_backward": 5,
    "_scaled_dot_product_cudnn_attention_backward": 5,
}

# Kernels that move memory slower than it could be moved, by the rate of a roofline's `kernel_bytes` that they are held to.
_SLOW = {
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit", "_batch_norm_with_update"), "batch_norm"),
    **dict.fromkeys(("native_batch_norm_backward", "batch_norm_backward"), "batch_norm_backward"),
    **dict.fromkeys(("native_layer_norm", "native_group_norm", "_fused_rms_norm"), "layer_norm"),
    **dict.fromkeys(
        ("native_layer_norm_backward", "native_group_norm_backward", "_fused_rms_norm_backward"), "layer_norm_backward"
    ),
    **dict.fromkeys(("max_pool2d_with_indices", "max_pool3d_with_indices"), "max_pool"),
    **dict.fromkeys(("_softmax", "_log_softmax", "_safe_softmax", "logsumexp"), "softmax"),
    "_log_softmax_backward_data": "softmax_backward",
    **dict.fromkeys(
        ("gelu", "tanh", "sigmoid", "silu", "exp", "erf", "log", "mish", "softplus", "sin", "cos", "pow"), "activation"
    ),
    **dict.fromkeys(("tanh_", "sigmoid_", "silu_", "exp_", "log_", "log_sigmoid_forward", "elu", "elu_"), "activation"),
    **dict.fromkeys(("gelu_backward", "silu_backward", "mish_backward", "log_sigmoid_backward"), "activation_backward"),
    **dict.fromkeys(
        ("bernoulli_", "bernoulli", "native_dropout", "normal_", "uniform_", "exponential_", "rand", "randn"), "random"
    ),
    **dict.fromkeys(("sum", "mean", "amax", "var_mean"), "reduction"),
}

_SOFTMAX_AXIS = {"_softmax": 1, "_log_softmax": 1, "_safe_softmax": 1, "_log_softmax_backward_data": 2}  # position of the axis


def _find_count(func: Any) -> Count:
    name = func._schema.name.split("::")[-1]
    if func.namespace in ("prim", "profiler") or func.is_view or name in _UNDECLARED_VIEWS or _changes_shape_only(func):
        return lambda args, kwargs, outputs: _VIEW
    if name in _ALLOCATIONS:
        return lambda args, kwargs, outputs: Cost("memory", _format((args, outputs)), 0.0, 0.0)
    traffic = _TRAFFIC.get(name) or _plain_traffic(func, name)
    work = _find_work(func, name)
    if work is None:
        slow = _SLOW.get(name, "memory")
        if name in _SOFTMAX_AXIS:
            return _count_softmax(slow, _SOFTMAX_AXIS[name], traffic)
        return lambda args, kwargs, outputs: Cost(slow, _format((args, outputs)), 0.0, traffic(args, kwargs, outputs))

    def count(args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Any) -> Cost:
        kind, flops = work(args, kwargs, outputs)
        return Cost(kind, _format((args, outputs)), float(flops), traffic(args, kwargs, outputs))

    return count


def _count_softmax(kind: str, position: int, traffic: Traffic) -> Count:
    """Kernels along the last axis read a row after another; those along another axis jump, and are told apart."""

    def count(args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Any) -> Cost:
        across = args[position] % args[0].ndim != args[0].ndim - 1 if args[0].ndim else False
        held_to = kind.replace("softmax", "softmax_across") if across else kind
        return Cost(held_to, _format((args, outputs)), 0.0, traffic(args, kwargs, outputs))

    return count


def _changes_shape_only(func: Any) -> bool:
    return torch.Tag.inplace_view in func.tags


def _format(values: Any) -> str:
    """The first floating format among tensors, those of a list looked at by its first."""
    for value in values:
        if isinstance(value, Tensor):
            if value.dtype in _FORMATS:
                return _FORMATS[value.dtype]
        elif isinstance(value, (tuple, list)) and value and (found := _format(value)) != "int":
            return found
    return "int"


# Arithmetic


def _find_work(func: Any, name: str) -> Callable[[Any, Any, Any], tuple[str, float]] | None:
    """How the kind and the flops of a call are found; None where memory is all there is to it."""
    if name in _PRODUCTS:
        left = _PRODUCTS[name]
        return lambda args, kwargs, outputs: ("matmul", 2.0 * outputs.numel() * args[left].shape[-1])
    if name in _ATTENTION_PRODUCTS:
        backward = int(name.endswith("_backward"))
        causal = next((i for i, argument in enumerate(func._schema.arguments) if argument.name == "is_causal"), None)
        products = _ATTENTION_PRODUCTS[name]

        def attention(args: Any, kwargs: Any, outputs: Any) -> tuple[str, float]:
            query, key, value = args[backward : backward + 3]
            hidden = _given(args, kwargs, causal, "is_causal")
            return "attention", products * _attention_product(query, key, value, hidden)

        return attention
    if name in _WORK:
        return _WORK[name]
    formula = flop_registry.get(func.overloadpacket)
    if formula is None:
        return None
    kind = "attention" if "attention" in name else "convolution" if "conv" in name else "matmul"
    return lambda args, kwargs, outputs: (kind, formula(*args, **kwargs, out_val=outputs))


def _given(args: Sequence[Any], kwargs: Mapping[str, Any], position: int | None, name: str) -> Any:
    return args[position] if position is not None and len(args) > position else kwargs.get(name, False)


def _attention_product(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> float:
    """One of attention's products, [B, heads, T, S] by [S, D]; kernels skip the half that a causal mask hides."""
    features = (query.shape[-1] + value.shape[-1]) / 2
    return 2.0 * math.prod(query.shape[:-1]) * key.shape[-2] * features * (0.5 if causal else 1.0)


def _convolution(args: Any, kwargs: Any, outputs: Any) -> tuple[str, float]:
    inputs, weight, _, _, _, _, transposed, _, groups = args[:9]
    return _convolution_kind(weight, groups), _convolution_flops(inputs if transposed else outputs, weight)


def _convolution_backward(args: Any, kwargs: Any, outputs: Any) -> tuple[str, float]:
    """The gradients of inputs and of the weight cost one forward pass each, where they are wanted."""
    grad, inputs, weight, _, _, _, _, transposed, _, groups, mask = args[:11]
    return _convolution_kind(weight, groups), sum(mask[:2]) * _convolution_flops(inputs if transposed else grad, weight)


def _convolution_kind(weight: Tensor, groups: int) -> str:
    """Depthwise where each group reads one channel."""
    return "depthwise" if groups > 1 and weight.shape[1] == 1 else "convolution"


def _convolution_flops(positions: Tensor, weight: Tensor) -> float:
    """Every position (of the output; of the inputs where it is transposed) meets the whole kernel of every channel."""
    return 2.0 * positions.shape[0] * math.prod(positions.shape[2:]) * weight.numel()


def _recurrent(args: Any, kwargs: Any, outputs: Any) -> tuple[str, float]:
    """One layer in one direction: inputs [T, B, I] and the state through the gates' two matrices."""
    inputs, into, across = args[:3]
    return "recurrent", 2.0 * inputs.shape[0] * inputs.shape[1] * (into.numel() + across.numel())


def _recurrent_backward(args: Any, kwargs: Any, outputs: Any) -> tuple[str, float]:
    return "recurrent", 2.0 * _recurrent(args, kwargs, outputs)[1]


_WORK: dict[str, Callable[[Any, Any, Any], tuple[str, float]]] = {
    "convolution": _convolution,
    "_convolution": _convolution,
    "convolution_overrideable": _convolution,
    "convolution_backward": _convolution_backward,
    "mkldnn_rnn_layer": _recurrent,
    "mkldnn_rnn_layer_backward": _recurrent_backward,
}

# Bytes


def bytes_of(tensor: Tensor) -> int:
    """Bytes of a tensor's distinct entries: what an expanded one repeats counts once; indices and values of a sparse one."""
    if tensor.layout != torch.strided:
        return sum(bytes_of(part) for part in (tensor._indices(), tensor._values())) if tensor.layout == torch.sparse_coo else 0
    if tensor.is_contiguous():
        return tensor.numel() * tensor.itemsize
    distinct = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if stride or not size:
            distinct *= size
    return distinct * tensor.itemsize


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _sum(values: Iterable[Any]) -> int:
    return sum(map(bytes_of, _tensors(values)))


Traffic = Callable[[Sequence[Any], Mapping[str, Any], Any], float]


def _plain_traffic(func: Any, name: str) -> Traffic:
    """Every input is read and every output written; what the schema says is changed is both."""
    arguments, returns = func._schema.arguments, func._schema.returns
    changed = [] if name in _OVERWRITING else [i for i, one in enumerate(arguments) if _is_changed(one) and not one.kwarg_only]
    if name.startswith("_fused_"):  # gradients are declared as changed, which they are only where a loss scale is given
        changed = [i for i in changed if arguments[i].name != "grads"]
    makes = any(one.alias_info is None for one in returns)

    def traffic(args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Any) -> float:
        again = [args[i] for i in changed if i < len(args)]
        return float(_sum(args) + _sum(kwargs.values()) + _sum(again) + (_sum((outputs,)) if makes else 0))

    return traffic


def _is_changed(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _gathered(args: Any, kwargs: Any, outputs: Any) -> float:
    """Of the first operand only what is picked is read."""
    return 2.0 * _sum((outputs,)) + _sum(args[1:])


def _scattered(args: Any, kwargs: Any, outputs: Any) -> float:
    """Of the first operand only what is given is read and written: the last tensor, in its own format."""
    given = [tensor for tensor in _tensors(args[1:]) if tensor.dtype == args[0].dtype]
    picked = bytes_of(given[-1]) if given else max((t.numel() for t in _tensors(args[1:])), default=0) * args[0].itemsize
    return float(_sum(args[1:]) + 2 * picked)


def _added(args: Any, kwargs: Any, outputs: Any) -> float:
    """A sparse tensor is added to the rows that it has, a dense one to all."""
    target, other = args[:2]
    if isinstance(other, Tensor) and other.layout == torch.sparse_coo and target.layout == torch.strided:
        return float(bytes_of(other) + 2 * bytes_of(other._values()))
    return float(2 * bytes_of(target) + _sum((other,)))


def _embedding_gradient(args: Any, kwargs: Any, outputs: Any) -> float:
    """The whole table is cleared, then a row read and written for each index."""
    return float(bytes_of(outputs) + 3 * bytes_of(args[0]) + _sum(args[1:]))


def _bagged(args: Any, kwargs: Any, outputs: Any) -> float:
    weight, indices = args[:2]
    return float(indices.numel() * weight.shape[-1] * weight.itemsize + _sum(args[1:]) + _sum((outputs,)))


def _convolved_back(args: Any, kwargs: Any, outputs: Any) -> float:
    """Each gradient is a convolution of its own, which reads two operands: the output's gradient twice where both are wanted."""
    grad, inputs, weight = args[:3]
    wanted = args[10]
    into = (bytes_of(grad) + bytes_of(weight)) if wanted[0] else 0
    onto = (bytes_of(grad) + bytes_of(inputs)) if wanted[1] else 0
    return float(into + onto + _sum((outputs,)))


def _bag_gradient(args: Any, kwargs: Any, outputs: Any) -> float:
    grad, indices = args[:2]
    return float(_sum((outputs,)) + 2 * indices.numel() * grad.shape[-1] * grad.itemsize + _sum(args))


def _picked_loss(args: Any, kwargs: Any, outputs: Any) -> float:
    """One score of each row is read."""
    return float(args[1].numel() * args[0].itemsize + bytes_of(args[1]) + _sum((outputs,)))


def _picked_loss_gradient(args: Any, kwargs: Any, outputs: Any) -> float:
    """One entry of each row is other than zero; the scores are not read."""
    return float(bytes_of(outputs) + args[2].numel() * outputs.itemsize + _sum((args[0], args[2])))


_TRAFFIC: dict[str, Traffic] = {
    **dict.fromkeys(("embedding", "index", "index_select", "gather"), _gathered),
    **dict.fromkeys(("index_put_", "_index_put_impl_", "index_add_", "index_copy_", "scatter_", "scatter_add_"), _scattered),
    "add_": _added,
    "embedding_dense_backward": _embedding_gradient,
    "convolution_backward": _convolved_back,
    "_embedding_bag": _bagged,
    "_embedding_bag_forward_only": _bagged,
    "_embedding_bag_dense_backward": _bag_gradient,
    **dict.fromkeys(("nll_loss_forward", "nll_loss2d_forward"), _picked_loss),
    **dict.fromkeys(("nll_loss_backward", "nll_loss2d_backward"), _picked_loss_gradient),
}
