"""AdamW with a factored second moment against the rule as its paper writes it, and against torch's Adafactor."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from delest import errors
from delest.backends.torch import piecewise
from delest.backends.torch.factored import FactoredAdamW
from delest.backends.torch.methods import factored_state


def reference(weight: torch.Tensor, gradients: list[torch.Tensor], lr: float, decay: float) -> torch.Tensor:
    """Algorithms 4 and 5 of the paper on whole matrices (dimensions after the first joined), or vectors, with sums as it has them."""
    matrix = weight.ndim > 1
    x = weight.reshape(len(weight), -1).clone() if matrix else weight.clone()
    row = column = whole = torch.zeros((), dtype=x.dtype)
    for t, gradient in enumerate(gradients, 1):
        g, beta = gradient.reshape(x.shape), 1 - t**-0.8
        squared = g**2 + 1e-30
        if matrix:
            row = beta * row + (1 - beta) * squared.sum(1, keepdim=True)
            column = beta * column + (1 - beta) * squared.sum(0, keepdim=True)
            moment = row @ column / row.sum()
        else:
            moment = whole = beta * whole + (1 - beta) * squared
        u = g / moment.sqrt()
        u = u / max(1.0, float(u.square().mean().sqrt()))
        x = x * (1 - lr * decay) - lr * u
    return x.reshape(weight.shape)


@pytest.mark.parametrize("shape", [(40,), (30, 50), (8, 6, 3, 3), (12, 1, 3, 3)])
@pytest.mark.parametrize("pieces", [1, 5])
@pytest.mark.parametrize("channels_last", [False, True])
def test_it_is_the_papers_rule(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], pieces: int, channels_last: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(9))
    gradients = [gradient * 3**k for k, gradient in enumerate(gradients)]  # growing, so that updates are clipped
    gradients[3][0] = 0.0
    monkeypatch.setattr(piecewise, "PIECE", start.numel() // pieces)
    if channels_last and len(shape) == 4:
        start = start.contiguous(memory_format=torch.channels_last)
    weight = nn.Parameter(start.clone(memory_format=torch.preserve_format))
    optimizer = FactoredAdamW([weight], lr=0.1, weight_decay=0.2)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(weight.detach(), reference(start, gradients, 0.1, 0.2), rtol=1e-9, atol=1e-9)


def test_it_is_torchs_adafactor_at_its_step_sizes() -> None:
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(30, 20, generator=generator, dtype=torch.float64)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine, other = FactoredAdamW([ours], weight_decay=0.0), torch.optim.Adafactor([theirs], lr=1.0)
    for step in range(1, 21):
        mine.param_groups[0]["lr"] = float(theirs.detach().square().mean().sqrt()) / step**0.5  # relative to the weights
        gradient = torch.randn(30, 20, generator=generator, dtype=torch.float64)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        other.step()
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "expected"), [((256, 300), 4 * 556), ((300,), 4 * 300), ((32, 16, 3, 3), 4 * (32 + 144)), ((1, 50, 30), 4 * 80)]
)
def test_a_matrix_keeps_a_number_for_each_row_and_column(shape: tuple[int, ...], expected: int) -> None:
    weight = nn.Parameter(torch.zeros(shape))
    optimizer = FactoredAdamW([weight])
    optimizer.allocate()
    assert sum(value.nbytes for value in optimizer.state[weight].values()) == 4 + expected


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-12, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_any_size_give_numbers(size: float, dtype: torch.dtype) -> None:
    """Rows that never have a gradient beside others: an embedding's unused words."""
    weight = nn.Parameter(torch.ones(50, 30, dtype=dtype))
    optimizer = FactoredAdamW([weight], lr=0.1, weight_decay=0.0)
    for _ in range(3):
        weight.grad = torch.zeros_like(weight)
        weight.grad[:5] = size
        optimizer.step()
    assert weight.detach().isfinite().all()
    assert torch.equal(weight.detach()[5:], torch.ones(45, 30, dtype=dtype))
    if size > 1e-15:  # below, a squared gradient is nothing beside 1e-30
        assert (weight.detach()[:5] < 1).all()


def test_a_running_adamw_is_gone_on_with() -> None:
    """Its second moment counts, without Adam's bias: for gradients of one size the first update is what it would have been."""
    weight = nn.Parameter(torch.zeros(20, 30))
    given = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0)
    gradient = torch.ones(20, 30)
    for _ in range(10):
        weight.grad = gradient.clone()
        given.step()
    training = SimpleNamespace(optimizers=[given])
    factored_state.apply(training, {})
    (made,) = training.optimizers
    assert type(made) is FactoredAdamW
    torch.testing.assert_close(made.state[weight]["row"], torch.ones(20))
    torch.testing.assert_close(made.state[weight]["column"], torch.ones(30))
    before = weight.detach().clone()
    weight.grad = gradient.clone()
    made.step()
    torch.testing.assert_close(weight.detach(), before - 0.1)
    assert float(made.state[weight]["step"]) == 11


def test_torchs_own_state_dict_goes_round_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(3)
    weights = [nn.Parameter(torch.ones(50, 40, dtype=torch.bfloat16)) for _ in range(2)]
    first, second = (FactoredAdamW([weight]) for weight in weights)
    gradients = [torch.randn(50, 40, generator=generator).bfloat16() for _ in range(6)]

    def run(weight: nn.Parameter, optimizer: FactoredAdamW, given: list[torch.Tensor]) -> None:
        for gradient in given:
            weight.grad = gradient.clone()
            optimizer.step()

    run(weights[0], first, gradients[:3])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    weights[1].data.copy_(weights[0].data)
    assert second.state[weights[1]]["row"].dtype == torch.float32
    for weight, optimizer in zip(weights, (first, second), strict=True):
        run(weight, optimizer, gradients[3:])
    assert torch.equal(*weights)


def test_it_learns_what_adamw_learns() -> None:
    losses = []
    for kind in (torch.optim.AdamW, FactoredAdamW):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10))
        x = torch.randn(512, 64)
        y = (x @ torch.randn(64, 10)).argmax(1)
        optimizer = kind(model.parameters(), lr=1e-3)
        for step in range(300):
            rows = slice(step % 8 * 64, step % 8 * 64 + 64)
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            losses.append(float(nn.functional.cross_entropy(model(x), y)))
    assert max(losses) < 0.3  # from 2.3


def test_what_has_no_such_form_is_refused() -> None:
    weight = nn.Parameter(torch.zeros(3))
    for given, words in (
        (torch.optim.AdamW([weight], amsgrad=True), "factored_state: AdamW with amsgrad has no such form"),
        (torch.optim.SGD([weight], lr=0.1), "factored_state: it takes the place of AdamW, and the optimizer is SGD"),
    ):
        with pytest.raises(errors.BadInput, match=words):
            factored_state.apply(SimpleNamespace(optimizers=[given]), {})
    weight.grad = torch.zeros(3).to_sparse()
    with pytest.raises(errors.BadInput, match="FactoredAdamW takes no sparse gradients"):
        FactoredAdamW([weight]).step()
