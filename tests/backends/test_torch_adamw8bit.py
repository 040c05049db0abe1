"""AdamW with 8-bit moments against torch's own."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from delest import errors
from delest.backends.torch import adamw8bit
from delest.backends.torch.adamw8bit import AdamW8bit
from delest.backends.torch.methods.optimizer_state import like
from delest.backends.torch.session import TorchSession
from delest.job import Job, Recipe
from delest.records.batch import Batch
from delest.records.plan import Choice, Plan
from delest.records.source import Column, Schema, Target


def coded(name: str, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales, and the values that they stand for."""
    count, blocks = len(values), -(-len(values) // 256)
    codes = torch.empty(count, dtype=torch.int8 if name == "exp_avg" else torch.uint8)
    scales, work, back = torch.empty(blocks), torch.empty(256 * blocks), torch.full((256 * blocks,), torch.nan)
    padded = torch.cat([values, torch.zeros(256 * blocks - count)])
    adamw8bit.encode(name, padded, codes, scales, work)
    adamw8bit.decode(name, codes, scales, back, work)
    assert not back[count:].any()
    return codes, scales, back[:count]


def test_codes_give_values_back_within_their_tolerance() -> None:
    """Between neighbouring codes c lie 2 c / 127^2 of the block's largest value, and 4 c^3 / 255^4 of it: half of that is the error."""
    values = torch.randn(64 * 256 - 100, generator=torch.Generator().manual_seed(0)) ** 3
    codes, scales, back = coded("exp_avg", values)
    each = scales.repeat_interleave(256)[: len(values)]
    torch.testing.assert_close(scales[0], values[:256].abs().max())
    assert ((back - values).abs() / each).max() <= 1.001 / 127
    squares = values.square()
    codes, scales, back = coded("exp_avg_sq", squares)
    assert int(codes.min()) >= 1
    large = squares > each**2 * (50 / 255) ** 4
    torch.testing.assert_close(back[large], squares[large], rtol=4.1 * 0.5 / 50, atol=0.0)


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-30, 1.0, 1e30])
def test_the_largest_value_of_a_block_and_zero_are_kept(name: str, size: float) -> None:
    values = torch.zeros(256)
    values[7] = size
    _, _, back = coded(name, values)
    torch.testing.assert_close(back[7], values[7], rtol=1e-6, atol=1e-29)
    assert back[:7].abs().max() <= max(size, 1e-28) * 3e-10


@pytest.mark.parametrize("shape", [(100,), (5000,), (70, 60), (600, 700)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_first_step_is_that_of_adamw(shape: tuple[int, ...], channels_last: bool) -> None:
    """Moments are rounded after they were used: from zero the first update is AdamW's own."""
    generator = torch.Generator().manual_seed(1)
    start, gradient = (torch.randn(shape, generator=generator) for _ in range(2))
    if channels_last and len(shape) == 2:
        start = start.reshape(shape[0], -1, 2, 5).contiguous(memory_format=torch.channels_last)
        gradient = gradient.reshape(start.shape)
    weights = []
    for kind in (torch.optim.AdamW, AdamW8bit):
        weight = nn.Parameter(start.clone(memory_format=torch.preserve_format))
        optimizer = kind([weight], lr=0.1, weight_decay=0.1)
        weight.grad = gradient.clone()
        optimizer.step()
        weights.append(weight.detach())
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-5, atol=1e-6)


def test_pieces_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for piece in (1 << 18, 512):
        monkeypatch.setattr(adamw8bit, "_PIECE", piece)
        monkeypatch.setattr(adamw8bit, "_PIECES", 1 << 20)
        generator = torch.Generator().manual_seed(2)
        weight = nn.Parameter(torch.randn(9001, generator=generator))
        optimizer = AdamW8bit([weight], lr=0.1)
        for _ in range(5):
            weight.grad = torch.randn(9001, generator=generator)
            optimizer.step()
        results.append((weight.detach(), *optimizer.state[weight].values()))
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))


def test_state_takes_two_bytes_an_element_and_small_tensors_keep_fp32() -> None:
    large, small = nn.Parameter(torch.zeros(256, 256)), nn.Parameter(torch.zeros(4095))
    optimizer = AdamW8bit([large, small])
    optimizer.allocate()
    sizes = [sum(value.nbytes for value in optimizer.state[one].values()) for one in (large, small)]
    assert sizes == [4 + 2 * 65536 + 2 * 4 * 256, 4 + 8 * 4095]


def problem() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10))
    x = torch.randn(512, 64)
    return model, x, (x @ torch.randn(64, 10)).argmax(1)


def test_three_hundred_steps_reach_the_loss_of_adamw() -> None:
    losses = []
    for kind in (torch.optim.AdamW, AdamW8bit):
        model, x, y = problem()
        optimizer = kind(model.parameters(), lr=1e-3)
        for step in range(300):
            rows = slice(step % 8 * 64, step % 8 * 64 + 64)
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            losses.append(float(nn.functional.cross_entropy(model(x), y)))
    assert losses[0] < 0.2  # from 2.3
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


SCHEMA = Schema(
    inputs=(Column(name="x", kind="array", shape=(64,)),), target=Target(name="y", kind="class", classes=("a", "b", "c"))
)


@pytest.mark.parametrize("in_backward", [False, True])
def test_state_goes_round_bit_for_bit(in_backward: bool) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 96), nn.Dropout(0.1), nn.ReLU(), nn.Linear(96, 3))

    def session(seed: int) -> TorchSession:
        configs = {"optimizer_state": {"bits": 8}, **({"optimizer_in_backward": {}} if in_backward else {})}
        choices = tuple(Choice(method=name, config=config, keeps="changed", why="") for name, config in configs.items())
        return TorchSession(
            Job(model=build, data="unused", batch_size=12, seed=seed, recipe=Recipe(lr=0.01)),
            Plan(choices=choices, batch_size=12, micro_batch=12, threads=1),
            SCHEMA,
        )

    drawn = np.random.default_rng(0)
    given = Batch(drawn.normal(size=(12, 64)).astype(np.float32), drawn.integers(0, 3, 12), np.arange(12), 0, 12)
    first = session(0)
    for _ in range(3):
        first.step(given, 1.0)
    state = first.state()
    assert state.arrays["optimizer.0.0.exp_avg_codes"].dtype == np.int8
    kept = replace(state, arrays={name: np.array(array) for name, array in state.arrays.items()})
    for _ in range(3):
        first.step(given, 0.5)
    second = session(5)
    second.load(kept)
    for _ in range(3):
        second.step(given, 0.5)
    expected, got = first.state().arrays, second.state().arrays
    assert expected.keys() == got.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(array, got[name], err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_own_state_dict_goes_round_bit_for_bit(dtype: torch.dtype) -> None:
    def gradients() -> list[torch.Tensor]:
        return [torch.randn(5000, generator=generator).to(dtype) for _ in range(3)]

    generator = torch.Generator().manual_seed(3)
    weights = [nn.Parameter(torch.ones(5000, dtype=dtype)) for _ in range(2)]
    first, second = (AdamW8bit([weight]) for weight in weights)

    def run(weight: nn.Parameter, optimizer: AdamW8bit, given: list[torch.Tensor]) -> None:
        for gradient in given:
            weight.grad = gradient.clone()
            optimizer.step()

    run(weights[0], first, gradients())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    weights[1].data.copy_(weights[0].data)
    kinds = {name: value.dtype for name, value in second.state[weights[1]].items()}
    assert kinds["exp_avg_codes"] == torch.int8
    assert kinds["exp_avg_scales"] == torch.float32
    more = gradients()
    run(weights[0], first, more)
    run(weights[1], second, more)
    assert torch.equal(*weights)


def test_moments_of_a_running_adamw_are_taken_over() -> None:
    model, x, y = problem()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(net: nn.Module, using: torch.optim.Optimizer) -> None:
        nn.functional.cross_entropy(net(x), y).backward()
        using.step()
        using.zero_grad()

    for _ in range(20):
        step(model, optimizer)
    other = copy.deepcopy(model)
    plain = torch.optim.AdamW(other.parameters(), lr=1e-3)
    plain.load_state_dict(optimizer.state_dict())
    small = like(optimizer)
    start = [parameter.detach().clone() for parameter in model.parameters()]
    step(model, small)
    step(other, plain)
    moved = [(one.detach() - before).norm() for one, before in zip(other.parameters(), start, strict=True)]
    apart = [(one.detach() - two.detach()).norm() for one, two in zip(model.parameters(), other.parameters(), strict=True)]
    assert all(float(gap) < 0.05 * float(way) for gap, way in zip(apart, moved, strict=True))


def test_what_has_no_8_bit_form_is_refused() -> None:
    weight = nn.Parameter(torch.zeros(3))
    with pytest.raises(errors.BadInput, match="amsgrad has no 8-bit form"):
        like(torch.optim.AdamW([weight], amsgrad=True))
    with pytest.raises(errors.BadInput, match="the optimizer is SGD"):
        like(torch.optim.SGD([weight], lr=0.1))
