"""What CUDA's libraries and kernels take beyond tensors, against values worked out from their sources by hand."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, strategies as st

from delest.footprint import cuda

MIB = 1 << 20


def call(name: str, *tensors: tuple[list[int], str], stride: list[int] | None = None) -> str:
    """A call's signature with contiguous operands, or the first of them with `stride`."""
    described = []
    for number, (size, dtype) in enumerate(tensors):
        strides = [1] * len(size)
        for axis in range(len(size) - 2, -1, -1):
            strides[axis] = strides[axis + 1] * size[axis + 1]
        described.append({"dtype": dtype, "size": size, "stride": stride if stride and not number else strides})
    return json.dumps([f"aten.{name}.default", described, {}])


def taken(text: str) -> int:
    return int(cuda.scratch([text])[text]["scratch"])


def test_two_handles_hold_a_workspace_each() -> None:
    assert cuda.workspace_bytes("8.0") == 2 * 8_519_680
    assert cuda.workspace_bytes("7.0") == 2 * 8_519_680
    assert cuda.workspace_bytes("9.0") == 2 * 32 * MIB
    assert cuda.workspace_bytes("9.0", backward=False) == 32 * MIB


def test_before_pytorch_2_the_workspace_is_none_of_its_allocator() -> None:
    assert cuda.workspace_bytes("8.0", torch_version=(1, 13)) == 0
    assert cuda.context_bytes("7.0", torch_version=(1, 13)) > 2 * cuda.context_bytes("7.0")


def test_flash_backward_sums_query_gradients_in_fp32() -> None:
    shape = ([2, 4, 1000, 80], "bfloat16")
    # 1,000 tokens are rounded up to 1,024 and 80 features to 96; one number a row besides.
    wanted = 4 * 2 * 4 * 1024 * (96 + 1)
    assert taken(call("_scaled_dot_product_flash_attention_backward", shape, shape, shape, shape)) == wanted


@pytest.mark.parametrize(("dtype", "each"), [("float16", 64 + 1), ("float32", 1)])
def test_efficient_backward_sums_in_fp32_what_is_of_16_bits(dtype: str, each: int) -> None:
    shape = ([1, 2, 100, 64], dtype)
    assert taken(call("_scaled_dot_product_efficient_attention_backward", shape, shape, shape, shape)) == 4 * 2 * 128 * each


def test_convolutions_in_16_bits_copy_operands_that_are_not_channels_last() -> None:
    image, weight = ([2, 8, 4, 4], "float16"), ([16, 8, 3, 3], "float16")
    assert taken(call("convolution", image, weight)) == 2 * (2 * 8 * 16 + 16 * 8 * 9)
    assert taken(call("convolution", image, weight, stride=[128, 1, 32, 8])) == 0
    assert taken(call("convolution", image, ([16, 8, 1, 1], "float16"))) == 0
    assert taken(call("convolution", ([2, 8, 4, 4], "float32"), ([16, 8, 3, 3], "float32"))) == 0


def test_the_backward_pass_of_a_convolution_copies_the_gradient_too() -> None:
    grad, image, weight = ([2, 16, 4, 4], "float16"), ([2, 8, 4, 4], "float16"), ([16, 8, 3, 3], "float16")
    assert taken(call("convolution_backward", grad, image, weight)) == 2 * (2 * 16 * 16 + 2 * 8 * 16 + 16 * 8 * 9)
    assert taken(call("convolution_backward", grad, image, ([16, 8, 1, 1], "float16"))) == 0


def test_every_call_has_an_answer() -> None:
    text = call("mm", ([4, 4], "float32"), ([4, 4], "float32"))
    assert cuda.scratch([text, ""]) == {text: {"scratch": 0, "outputs": []}}


@given(st.integers(1, 4), st.integers(1, 8), st.integers(1, 600), st.integers(1, 256))
def test_flash_scratch_grows_with_the_batch_in_proportion(batch: int, heads: int, tokens: int, features: int) -> None:
    one, more = (([rows, heads, tokens, features], "float16") for rows in (1, batch))
    name = "_scaled_dot_product_flash_attention_backward"
    assert taken(call(name, more, more)) == batch * taken(call(name, one, one))
    assert taken(call(name, more, more)) >= 4 * batch * heads * tokens * features
