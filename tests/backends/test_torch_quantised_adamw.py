"""AdamW with moments of 8 and 4 bits against torch's own."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from delest import errors
from delest.backends.torch import piecewise
from delest.backends.torch.methods import optimizer_state
from delest.backends.torch.moments import CODINGS
from delest.backends.torch.quantised_adamw import AdamW4bit, AdamW8bit, QuantisedAdamW
from delest.backends.torch.session import TorchSession
from delest.job import Job, Recipe
from delest.records.batch import Batch
from delest.records.plan import Choice, Plan
from delest.records.source import Column, Schema, Target

KINDS = (AdamW8bit, AdamW4bit)


def coded(bits: int, name: str, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, each element's scale, and the values that they stand for, of whole blocks."""
    coding = next(one for one in CODINGS[bits] if one.name == name)
    (codes, scales), work, back = (
        coding.zero(len(values), torch.device("cpu")),
        torch.empty_like(values),
        torch.empty_like(values),
    )
    coding.encode(values, codes, scales, work)
    coding.decode(codes, scales, back, work)
    return codes, scales.repeat_interleave(coding.block), back


def test_8_bit_codes_give_values_back_within_their_tolerance() -> None:
    """Between neighbouring codes c lie 2 c / 127^2 of the block's largest value, and 4 c^3 / 255^4 of it: half of that is the error."""
    values = torch.randn(64 * 256, generator=torch.Generator().manual_seed(0)) ** 3
    codes, each, back = coded(8, "exp_avg", values)
    torch.testing.assert_close(each[0], values[:256].abs().max())
    assert ((back - values).abs() / each).max() <= 1.001 / 127
    squares = values.square()
    codes, each, back = coded(8, "exp_avg_sq", squares)
    assert int(codes.min()) >= 1
    large = squares > each * (50 / 255) ** 4
    torch.testing.assert_close(back[large], squares[large], rtol=4.1 * 0.5 / 50, atol=0.0)


def test_4_bit_codes_give_values_back_within_their_tolerance() -> None:
    """Half of 2 c / 7^2 of the block's largest value, and half of a sixteenth of it or what zero is taken for."""
    values = torch.randn(64 * 128, generator=torch.Generator().manual_seed(0)) ** 3
    codes, each, back = coded(4, "exp_avg", values)
    assert (codes.dtype, len(codes)) == (torch.uint8, len(values) // 2)
    torch.testing.assert_close(each[0], values[:128].abs().max())
    assert ((back - values).abs() / each).max() <= 1.001 / 7
    assert torch.equal(back.sign() * values.sign(), back.sign().abs())
    squares = values.square()
    codes, each, back = coded(4, "exp_avg_sq", squares)
    least = each / 16
    assert (back >= 0.999 * least).all()
    kept = squares > least
    assert ((back - squares).abs() / each)[kept].max() <= 1.001 / 32


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-30, 1.0, 1e30])
def test_the_largest_value_of_a_block_and_zero_are_kept(bits: int, name: str, size: float) -> None:
    values = torch.zeros(256)
    values[7] = size
    _, _, back = coded(bits, name, values)
    torch.testing.assert_close(back[7], values[7], rtol=1e-6, atol=1e-29)
    least = 1 / 16 if (bits, name) == (4, "exp_avg_sq") else 3e-10  # of the largest: what zero is taken for
    assert back[:7].abs().max() <= 1.001 * max(size, 1e-28) * least


@pytest.mark.parametrize("shape", [(100,), (5000,), (70, 60), (600, 700)])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("small", KINDS)
def test_the_first_step_is_that_of_adamw(shape: tuple[int, ...], channels_last: bool, small: type[QuantisedAdamW]) -> None:
    """Moments are rounded after they were used: from zero the first update is AdamW's own."""
    generator = torch.Generator().manual_seed(1)
    start, gradient = (torch.randn(shape, generator=generator) for _ in range(2))
    if channels_last and len(shape) == 2:
        start = start.reshape(shape[0], -1, 2, 5).contiguous(memory_format=torch.channels_last)
        gradient = gradient.reshape(start.shape)
    weights = []
    for kind in (torch.optim.AdamW, small):
        weight = nn.Parameter(start.clone(memory_format=torch.preserve_format))
        optimizer = kind([weight], lr=0.1, weight_decay=0.1)
        weight.grad = gradient.clone()
        optimizer.step()
        weights.append(weight.detach())
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_do_not_show(monkeypatch: pytest.MonkeyPatch, kind: type[QuantisedAdamW]) -> None:
    results = []
    for piece in (1 << 18, 512):
        monkeypatch.setattr(piecewise, "PIECE", piece)
        monkeypatch.setattr(piecewise, "PIECES", 1 << 20)
        generator = torch.Generator().manual_seed(2)
        weight = nn.Parameter(torch.randn(9001, generator=generator))
        optimizer = kind([weight], lr=0.1)
        for _ in range(5):
            weight.grad = torch.randn(9001, generator=generator)
            optimizer.step()
        results.append((weight.detach(), *optimizer.state[weight].values()))
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))


@pytest.mark.parametrize(("kind", "expected"), [(AdamW8bit, 2 * 65536 + 2 * 4 * 256), (AdamW4bit, 65536 + 2 * 4 * 512)])
def test_state_takes_two_bytes_or_one_an_element_and_small_tensors_keep_fp32(kind: type[QuantisedAdamW], expected: int) -> None:
    large, small = nn.Parameter(torch.zeros(256, 256)), nn.Parameter(torch.zeros(4095))
    optimizer = kind([large, small])
    optimizer.allocate()
    sizes = [sum(value.nbytes for value in optimizer.state[one].values()) for one in (large, small)]
    assert sizes == [4 + expected, 4 + 8 * 4095]


def problem() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10))
    x = torch.randn(512, 64)
    return model, x, (x @ torch.randn(64, 10)).argmax(1)


@pytest.mark.parametrize("small", KINDS)
def test_three_hundred_steps_reach_the_loss_of_adamw(small: type[QuantisedAdamW]) -> None:
    losses = []
    for kind in (torch.optim.AdamW, small):
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
    assert losses[1] == pytest.approx(losses[0], rel=0.1 if small is AdamW8bit else 0.25)


SCHEMA = Schema(
    inputs=(Column(name="x", kind="array", shape=(64,)),), target=Target(name="y", kind="class", classes=("a", "b", "c"))
)


METHODS = [("optimizer_state", {"bits": 8}), ("optimizer_state", {"bits": 4}), ("factored_state", {})]


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize(("method", "config"), METHODS)
def test_state_goes_round_bit_for_bit(method: str, config: dict[str, int], in_backward: bool) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 96), nn.Dropout(0.1), nn.ReLU(), nn.Linear(96, 3))

    def session(seed: int) -> TorchSession:
        configs = {method: config, **({"optimizer_in_backward": {}} if in_backward else {})}
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
    if config:
        assert state.arrays["optimizer.0.0.exp_avg_codes"].dtype == (np.int8 if config["bits"] == 8 else np.uint8)
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
@pytest.mark.parametrize("kind", KINDS)
def test_torchs_own_state_dict_goes_round_bit_for_bit(dtype: torch.dtype, kind: type[QuantisedAdamW]) -> None:
    def gradients() -> list[torch.Tensor]:
        return [torch.randn(5000, generator=generator).to(dtype) for _ in range(3)]

    generator = torch.Generator().manual_seed(3)
    weights = [nn.Parameter(torch.ones(5000, dtype=dtype)) for _ in range(2)]
    first, second = (kind([weight]) for weight in weights)

    def run(weight: nn.Parameter, optimizer: QuantisedAdamW, given: list[torch.Tensor]) -> None:
        for gradient in given:
            weight.grad = gradient.clone()
            optimizer.step()

    run(weights[0], first, gradients())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    weights[1].data.copy_(weights[0].data)
    kinds = {name: value.dtype for name, value in second.state[weights[1]].items()}
    assert kinds["exp_avg_codes"] == (torch.int8 if kind is AdamW8bit else torch.uint8)
    assert kinds["exp_avg_scales"] == torch.float32
    more = gradients()
    run(weights[0], first, more)
    run(weights[1], second, more)
    assert torch.equal(*weights)


@pytest.mark.parametrize(("bits", "within"), [(8, 0.05), (4, 0.4)])
def test_moments_of_a_running_adamw_are_taken_over(bits: int, within: float) -> None:
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
    training = SimpleNamespace(optimizers=[optimizer])
    optimizer_state.apply(training, {"bits": bits})
    (small,) = training.optimizers
    start = [parameter.detach().clone() for parameter in model.parameters()]
    step(model, small)
    step(other, plain)
    moved = [(one.detach() - before).norm() for one, before in zip(other.parameters(), start, strict=True)]
    apart = [(one.detach() - two.detach()).norm() for one, two in zip(model.parameters(), other.parameters(), strict=True)]
    assert all(float(gap) < within * float(way) for gap, way in zip(apart, moved, strict=True))


@pytest.mark.parametrize(
    ("given", "bits", "words"),
    [
        (lambda weight: torch.optim.AdamW([weight], amsgrad=True), 8, "amsgrad has no such form"),
        (lambda weight: torch.optim.SGD([weight], lr=0.1), 4, "the optimizer is SGD"),
        (lambda weight: AdamW8bit([weight]), 4, "the optimizer is AdamW8bit"),
        (lambda weight: torch.optim.AdamW([weight]), 5, "moments of 5 bits are not there, 8 and 4 are"),
    ],
)
def test_what_has_no_such_form_is_refused(given: Any, bits: int, words: str) -> None:
    training = SimpleNamespace(optimizers=[given(nn.Parameter(torch.zeros(3)))])
    with pytest.raises(errors.BadInput, match=words):
        optimizer_state.apply(training, {"bits": bits})


@pytest.mark.parametrize(("kind", "within"), [(AdamW8bit, 0.06), (AdamW4bit, 0.6)])
def test_fifty_steps_end_near_those_of_adamw(kind: type[QuantisedAdamW], within: float) -> None:
    """How far weights end apart, as a share of the way that they went; 0.52 with the maps of the 4-bit form's source."""
    found = []
    for each in (torch.optim.AdamW, kind):
        model, x, y = problem()
        start = torch.cat([one.detach().flatten() for one in model.parameters()])
        optimizer = each(model.parameters(), lr=1e-3)
        for _ in range(50):
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(torch.cat([one.detach().flatten() for one in model.parameters()]) - start)
    apart = float((found[1] - found[0]).norm() / found[0].norm())
    assert apart < within
