"""CUDA's path through dropout, attention, softmax and autocast, taken by fake CPU tensors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from delest.backends.torch.as_cuda import as_cuda


@pytest.fixture
def fake() -> Iterator[None]:
    with FakeTensorMode():
        yield


def halves(*size: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(*size, dtype=dtype, requires_grad=True)


def saved_bytes(compute: object) -> int:
    """Bytes that autograd keeps of one call, each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = compute()  # type: ignore[operator]
    assert out.requires_grad
    return sum(kept.values())


def name(tensor: Tensor) -> str:
    """Of the nearest autograd node that is no view."""
    node = tensor.grad_fn
    while node is not None and type(node).__name__.startswith(("Slice", "View", "Alias")):
        node = node.next_functions[0][0]
    return type(node).__name__


def test_dropout_keeps_one_byte_an_entry(fake: None) -> None:
    x = torch.empty(8, 100, requires_grad=True)
    with as_cuda():
        assert saved_bytes(lambda: functional.dropout(x, 0.1)) == 800
        assert functional.dropout(x, 0.1, training=False) is x or functional.dropout(x, 0.1, training=False).shape == x.shape
    assert saved_bytes(lambda: functional.dropout(x, 0.1)) == 4 * 800


@pytest.mark.parametrize(
    ("capability", "dtype", "mask", "wanted"),
    [
        ("8.0", torch.bfloat16, False, "ScaledDotProductFlashAttentionBackward0"),
        ("7.0", torch.float16, False, "ScaledDotProductEfficientAttentionBackward0"),
        ("8.0", torch.float32, False, "ScaledDotProductEfficientAttentionBackward0"),
        ("8.0", torch.bfloat16, True, "ScaledDotProductEfficientAttentionBackward0"),
    ],
)
def test_attention_takes_the_kernel_that_cuda_would(
    fake: None, capability: str, dtype: torch.dtype, mask: bool, wanted: str
) -> None:
    q = halves(2, 4, 16, 20, dtype=dtype)
    given = torch.ones(16, 16, dtype=torch.bool) if mask else None
    with as_cuda(capability):
        out = functional.scaled_dot_product_attention(q, q, q, given)
        assert out.shape == q.shape
        assert out.dtype == dtype
        assert name(out) == wanted
        out.sum().backward()
    assert q.grad is not None
    assert q.grad.shape == q.shape


def test_shared_heads_are_repeated(fake: None) -> None:
    q, k = halves(1, 8, 16, 32), halves(1, 2, 16, 32)
    with as_cuda():
        out = functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
        out.sum().backward()
    assert out.shape == q.shape
    assert k.grad is not None
    assert k.grad.shape == k.shape


def test_autocast_computes_normalisations_softmax_and_losses_in_fp32(fake: None) -> None:
    x = halves(4, 8)
    labels = torch.zeros(4, dtype=torch.int64)
    with as_cuda(), torch.autocast("cpu", dtype=torch.float16):
        assert functional.linear(x, x).dtype == torch.float16
        assert functional.gelu(x).dtype == torch.float16
        for computed in (
            functional.layer_norm(x, (8,)),
            x.softmax(-1),
            functional.log_softmax(x, -1),
            x.pow(2),
            x.sum(),
            functional.cross_entropy(x, labels),
            functional.mse_loss(x, x),
        ):
            assert computed.dtype == torch.float32
        assert x.softmax(-1, dtype=torch.float16).dtype == torch.float16


def test_a_half_softmax_makes_no_copy_of_its_input_in_fp32(fake: None) -> None:
    x = halves(4, 8)
    with as_cuda(), torch.autocast("cpu", dtype=torch.float16):
        assert saved_bytes(lambda: x.softmax(-1)) == 4 * 8 * 4


def test_old_versions_kept_the_input_of_softmax(fake: None) -> None:
    x = torch.empty(4, 8, requires_grad=True)
    with as_cuda("7.0", (1, 10)):
        assert saved_bytes(lambda: (x + 0).softmax(-1)) == 2 * 4 * 8 * 4
        (x + 0).softmax(-1).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    with as_cuda("7.0", (1, 11)):
        assert saved_bytes(lambda: (x + 0).softmax(-1)) == 4 * 8 * 4


def test_everything_is_as_before_when_it_is_left(fake: None) -> None:
    x = torch.empty(2, 2, 8, 16, requires_grad=True)
    with pytest.raises(RuntimeError, match="of its own"), as_cuda():
        raise RuntimeError("of its own")
    assert name(functional.scaled_dot_product_attention(x, x, x)) == "ScaledDotProductFlashAttentionForCpuBackward0"
    assert saved_bytes(lambda: (x + 0).softmax(-1)) == x.numel() * 4
