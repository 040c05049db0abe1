"""Tracing on fake CPU tensors what PyTorch does on CUDA.

A build of torch without CUDA cannot hold fake CUDA tensors in modules, so a trace is of CPU tensors. PyTorch takes other paths
for those: dropout keeps a mask of floats, attention has a kernel of its own, and autocast leaves normalisations and softmax in
16 bits. Within `as_cuda` the dispatcher takes CUDA's path for them instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# Where CUDA's autocast computes in fp32 whatever it is given (https://docs.pytorch.org/docs/stable/amp.html, "CUDA Ops that
# can autocast to float32"; the overloads are those of AT_FORALL_FP32 in ATen/autocast_mode.h).
_FP32 = (
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log1p", "log2", "reciprocal", "rsqrt", "sinh",
    "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm", "native_layer_norm",
    "group_norm", "frobenius_norm.dim", "nuclear_norm", "nuclear_norm.dim", "cosine_similarity", "poisson_nll_loss",
    "cosine_embedding_loss", "nll_loss", "nll_loss2d", "hinge_embedding_loss", "kl_div", "l1_loss", "smooth_l1_loss",
    "huber_loss", "mse_loss", "margin_ranking_loss", "multilabel_margin_loss", "soft_margin_loss",
    "triplet_margin_loss", "multi_margin_loss", "binary_cross_entropy_with_logits", "dist", "pdist", "cdist",
    "renorm", "logsumexp",
)  # fmt: skip
# The same where the kernel itself reads 16 bits and writes 32 (AT_FORALL_FP32_SET_OPT_DTYPE).
_FP32_OUTPUT = ("prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum", "sum", "sum.dim_IntList")
# Before, `_softmax_backward_data` took the input for its format alone, and autograd kept it beside the output
# (tools/autograd/derivatives.yaml of v1.10.2 and v1.11.0).
_SOFTMAX_KEEPS_OUTPUT_ONLY = (1, 11)
_HALVES = (torch.float16, torch.bfloat16)
_LARGEST_FLASH_HEAD = 256  # features; ATen/native/transformers/cuda/sdp_utils.cpp, check_head_dim_size_flash


@contextlib.contextmanager
def as_cuda(capability: str | None = "8.0", torch_version: tuple[int, int] = (2, 11)) -> Iterator[None]:
    """Let fake CPU tensors take CUDA's path through dropout, attention and autocast, in this process until it is left.

    `capability` is the device's compute capability, "8.0" and up for flash attention; `torch_version` that of the run that is
    predicted, which may be an old one. For fake tensors only: some of the kernels do not exist on a CPU.
    """
    library = torch.library.Library("aten", "IMPL")
    try:
        library.impl("dropout", _dropout, "AutogradCPU")
        library.impl("scaled_dot_product_attention", _attention(_major(capability)), "AutogradCPU")
        if torch_version < _SOFTMAX_KEEPS_OUTPUT_ONLY:
            for name in ("_softmax", "_log_softmax"):
                library.impl(name, _input_keeping(_overload(name), _overload(f"{name}_backward_data")), "AutogradCPU")
        for names, kernel in ((_FP32, _in_fp32), (_FP32_OUTPUT, _to_fp32)):
            for name in names:
                if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "AutocastCPU"):
                    library.impl(name, kernel(_overload(name)), "AutocastCPU")
        yield
    finally:
        library._destroy()


def _major(capability: str | None) -> int:
    return int(capability.partition(".")[0]) if capability else 8


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _in_fp32(op: Any) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return op(*map(_widened, args), **{name: _widened(value) for name, value in kwargs.items()})

    return kernel


def _widened(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_widened, value))
    return value.float() if isinstance(value, Tensor) and value.dtype in _HALVES else value


def _to_fp32(op: Any) -> Callable[..., Any]:
    fused = {"softmax": torch.ops.aten._softmax, "log_softmax": torch.ops.aten._log_softmax}.get(op._schema.name[6:])

    def kernel(tensor: Tensor, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
        given = dtype is not None or any(isinstance(value, torch.dtype) for value in args)
        with torch.autocast("cpu", enabled=False):
            if given or tensor.dtype not in _HALVES:
                return op(tensor, *args, **({"dtype": dtype} if dtype is not None else {}), **kwargs)
            if fused is not None and tensor.dtype == torch.float16:  # bf16 is copied to fp32 first, by the operator itself
                return fused(tensor, args[0], True)
            return op(tensor, *args, dtype=torch.float32, **kwargs)

    return kernel


def _input_keeping(forward_op: Any, backward_op: Any) -> Callable[..., Any]:
    class Softmax(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, tensor: Tensor, dim: int, half_to_float: bool) -> Tensor:
            with torch._C._AutoDispatchBelowAutograd():
                output = forward_op(tensor, dim, half_to_float)
            ctx.save_for_backward(tensor, output)
            ctx.dim = dim
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
            tensor, output = ctx.saved_tensors
            return backward_op(gradients[0], output, ctx.dim, tensor.dtype), None, None

    return Softmax.apply


def _dropout(tensor: Tensor, p: float, train: bool) -> Tensor:
    """CUDA's kernel keeps a mask of one byte an entry (ATen/native/Dropout.cpp, is_fused_kernel_acceptable)."""
    if not train or p == 0:
        return tensor
    if p == 1 or not tensor.is_floating_point():
        return tensor * torch.zeros_like(tensor)
    return torch.ops.aten.native_dropout(tensor, p, True)[0]


def _attention(major: int) -> Callable[..., Tensor]:
    """Which kernel PyTorch picks: flash for 16 bits without a mask since Ampere, else the memory-efficient one.

    Source: ATen/native/transformers/cuda/sdp_utils.cpp, select_sdp_backend.
    """

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if query.dim() != 4 or query.dtype not in (*_HALVES, torch.float32):
            return torch.ops.aten._scaled_dot_product_attention_math(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )[0]
        if enable_gqa:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        features = query.shape[-1]
        scale = features**-0.5 if scale is None else scale
        if features % 8:  # both kernels want rows that are aligned to 16 bytes
            query, key, value = (torch.nn.functional.pad(one, (0, 8 - features % 8)) for one in (query, key, value))
        if attn_mask is None and query.dtype in _HALVES and major >= 8 and features <= _LARGEST_FLASH_HEAD:
            out = torch.ops.aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, False, scale=scale
            )
        else:
            out = torch.ops.aten._scaled_dot_product_efficient_attention(
                query, key, value, _bias(attn_mask, query, key), torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
            )
        return out[0][..., :features]

    return attention


def _bias(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """A mask of truth values becomes one of numbers to add; either is spread over batch and heads without a copy."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
    return mask.expand(*query.shape[:2], query.shape[2], key.shape[2])
