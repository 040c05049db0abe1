"""What a training loop takes on CUDA beyond its tensors: libraries' workspaces, kernels' scratch, the driver's context.

Rules, each with its source; none was set from a single measurement. How they are used: a loop is traced within
`backends.torch.as_cuda`, with `scratch` in place of probes of this machine's kernels; `replay` with the allocator "exact" gives
`max_memory_allocated` less `workspace_bytes`, with "cuda" what is reserved; what the driver shows has `context_bytes` besides.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

_MIB = 1 << 20
# Optimizers that are named and say nothing else loop over lists of tensors on CUDA, with a temporary the size of all
# parameters (torch/optim/optimizer.py, _default_to_fused_or_foreach: foreach, not fused, where all tensors are native).
DEFAULT_IMPLEMENTATION = {"foreach": True}
# The version of PyTorch that took cuBLAS's workspace over (https://github.com/pytorch/pytorch/pull/85447).
FIRST_WORKSPACES = (2, 0)
LAZY_SINCE = (2, 0)  # built with CUDA 11.7 and up, whose kernels are loaded when they are first called


def workspace_bytes(capability: str | None, *, torch_version: tuple[int, int] = (2, 11), backward: bool = True) -> int:
    """Bytes that PyTorch's allocator holds for cuBLAS once a matrix product has run in the forward and in the backward pass.

    One workspace a handle and stream: 4,096 KiB x 2 + 16 KiB x 8 as cuBLAS recommends, 32 MiB since Hopper
    (ATen/cuda/CublasHandlePool.cpp, parseChosenWorkspaceSize). Handles belong to a thread, and the backward pass runs in a
    thread of autograd's own, so there are two. Before PyTorch 2.0 cuBLAS allocated its own, which counts to the context.
    """
    if torch_version < FIRST_WORKSPACES:
        return 0
    each = 32 * _MIB if _major(capability) >= 9 else 4096 * 1024 * 2 + 16 * 1024 * 8
    return each * (2 if backward else 1)


def context_bytes(capability: str | None, *, torch_version: tuple[int, int] = (2, 11)) -> int:
    """Bytes of the device that the driver shows beyond what the allocator reserves, roughly.

    Until PyTorch 1.13 all kernels of PyTorch were loaded with the context: 1 to 2 GB
    (https://huggingface.co/docs/transformers/v4.20.1/en/perf_train_gpu_one, "the kernels alone take up 1.3GB"). Since CUDA 11.7
    modules are loaded when first called (CUDA C++ Programming Guide, "Lazy Loading"), which leaves 300 to 600 MB, more on larger
    devices since stacks and heaps are kept for every multiprocessor. No more than the right order of size is claimed.
    """
    if torch_version < LAZY_SINCE:
        return 1400 * _MIB
    return (500 if _major(capability) >= 8 else 400) * _MIB


def _major(capability: str | None) -> int:
    return int(capability.partition(".")[0]) if capability else 8


# Scratch of single kernels


def scratch(signatures: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What CUDA kernels take for themselves while they run, by rule: the counterpart of probes of a CPU's kernels.

    Takes calls as JSON of operator, arguments and named arguments; returns for each `scratch` in bytes, 0 where no rule
    stands for it, and no corrections of its `outputs`.
    """
    return {text: {"scratch": _scratch_of(text), "outputs": []} for text in signatures if text}


def _scratch_of(text: str) -> int:
    name, args, kwargs = json.loads(text)
    rule = _RULES.get(name.split(".")[1])
    return rule(args, kwargs) if rule else 0


def _flash_backward(args: list[Any], kwargs: Mapping[str, Any]) -> int:
    """Query gradients are summed in fp32, [B, H, T, D] with T rounded up to 128 and D to 32 (to 64 beyond 128), beside one
    number a row; of shared heads the keys' and values' gradients are first made for each.

    Source: FlashAttention-2's csrc/flash_attn/flash_api.cpp, mha_bwd (dq_accum, softmax_d).
    """
    batch, heads, tokens, features = args[1]["size"]
    tokens, features = _up(tokens, 128), _up(features, 32 if features <= 128 else 64)
    return 4 * batch * heads * tokens * (features + 1)


def _efficient_backward(args: list[Any], kwargs: Mapping[str, Any]) -> int:
    """One number a row in fp32, and in 16 bits the query gradients summed in fp32, with rows rounded up to 64.

    Source: PyTorch's ATen/native/transformers/cuda/attention_backward.cu (delta, workspace) and
    mem_eff_attention/kernel_backward.h (kNeedsAccumGradQ). Keys and values of heads beyond 128 features may take as much again.
    """
    batch, heads, tokens, features = args[1]["size"]
    halves = args[1]["dtype"] in ("float16", "bfloat16")
    return 4 * batch * heads * _up(tokens, 64) * (1 + (features if halves else 0))


def _convolution(args: list[Any], kwargs: Mapping[str, Any]) -> int:
    """In 16 bits matrix units want channels last: cuDNN copies operands that are not, save for 1x1 kernels, which are matrix
    products in either order.

    Source: https://docs.nvidia.com/deeplearning/performance/dl-performance-convolutional/index.html, "Tensor Layouts In Memory:
    NCHW vs NHWC" (automatic transposes). Winograd and FFT algorithms may take more where there is room, which is not predicted.
    """
    return _copies(args[0], args[1])


def _convolution_backward(args: list[Any], kwargs: Mapping[str, Any]) -> int:
    """The gradient of the output is one operand more."""
    copied = _copies(args[1], args[2])
    return copied + _tensor_bytes(args[0]) if copied else 0


def _copies(inputs: Any, weight: Any) -> int:
    if inputs["dtype"] not in ("float16", "bfloat16") or inputs["stride"][1] == 1 or math.prod(weight["size"][2:]) == 1:
        return 0
    return _tensor_bytes(inputs) + _tensor_bytes(weight)


def _tensor_bytes(tensor: Any) -> int:
    widths = {"float16": 2, "bfloat16": 2, "float64": 8, "float32": 4}
    return math.prod(tensor["size"]) * widths.get(tensor["dtype"], 4)


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


_RULES = {
    "_scaled_dot_product_flash_attention_backward": _flash_backward,
    "_scaled_dot_product_efficient_attention_backward": _efficient_backward,
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
}
