"""Traces of fake tensors against closed forms and against what torch's own allocator reports."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from delest import errors
from delest.backends.torch.loops import ModuleLoop, Program
from delest.backends.torch.trace import NeedsProbe, trace_loop
from delest.records.trace import Trace


def no_scratch(signatures: Any) -> dict[str, dict[str, Any]]:
    return {text: {"scratch": 0, "outputs": []} for text in signatures if text}


def trace(model: Any, inputs: torch.Tensor, rows: int, **more: Any) -> Trace:
    options = {name: more.pop(name) for name in ("growing", "real") if name in more}
    program = Program(model=model, inputs=inputs, **more)
    return trace_loop(lambda mode: ModuleLoop(program, mode), rows, scratch=no_scratch, **options)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 3))


def bytes_of(found: Trace, category: str, rows: int) -> int:
    return sum(size for size, kind in zip(found.storages.sizes(rows), found.storages.category, strict=True) if kind == category)


WEIGHTS = 4 * (10 * 20 + 20 + 20 * 3 + 3)


def test_weights_gradients_and_state_are_exact() -> None:
    found = trace(mlp, torch.zeros(4, 10), 8, optimizer="adamw")
    assert bytes_of(found, "parameters", 8) == WEIGHTS
    assert bytes_of(found, "gradients", 8) == 2 * WEIGHTS  # made anew in each of the two steps
    assert bytes_of(found, "optimizer", 8) == 2 * WEIGHTS + 4 * 4  # two moments, and a count for each of four tensors
    assert found.state_bytes == 3 * WEIGHTS + 4 * 4


def test_bytes_grow_with_the_rows_as_they_do() -> None:
    found = trace(mlp, torch.zeros(4, 10), 8, optimizer="sgd")
    alone = trace(mlp, torch.zeros(4, 10), 32, optimizer="sgd", growing=False)
    assert found.storages.sizes(32) == alone.storages.sizes(32)
    assert bytes_of(found, "data", 32) == 32 * 10 * 4


def test_what_autograd_keeps_is_called_activations_and_has_its_module() -> None:
    found = trace(mlp, torch.zeros(4, 10), 8)
    kept = [name for name, kind in zip(found.storages.module, found.storages.category, strict=True) if kind == "activations"]
    assert set(kept) >= {"1"}  # the ReLU's output is the second layer's input
    products = [
        (module, phase)
        for name, module, phase in zip(found.operators.name, found.operators.module, found.operators.phase, strict=True)
        if "mm" in name and phase == "backward"
    ]
    assert {module for module, _ in products} == {"0", "2"}


def test_nothing_is_allocated() -> None:
    huge = trace(lambda: nn.Linear(200_000, 100_000), torch.zeros(2, 200_000), 2, growing=False)
    assert bytes_of(huge, "parameters", 2) == 4 * (200_000 * 100_000 + 100_000)


def test_the_users_module_stays_as_it_is() -> None:
    model = mlp()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trace(model, torch.zeros(4, 10), 4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and type(parameter) is nn.Parameter for parameter in model.parameters())


class Dropping(nn.Module):
    """Reads values while it is built, as networks with stochastic depth do."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = [float(rate) for rate in torch.linspace(0, 0.5, 3)]
        self.layer = nn.Linear(10, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs)


def test_a_constructor_may_read_values_of_its_own() -> None:
    found = trace(Dropping, torch.zeros(4, 10), 4)
    assert "made fake when a module took it" in found.how
    assert bytes_of(found, "parameters", 4) == 4 * 33


class Initialised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(10, 3)
        nn.init.trunc_normal_(self.layer.weight)
        self.to(memory_format=torch.channels_last)
        self.half_of_it = nn.Linear(3, 3).to(torch.bfloat16)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.half_of_it(self.layer(inputs).to(torch.bfloat16)).float()


def test_initialisations_and_conversions_need_no_values() -> None:
    found = trace(Initialised, torch.zeros(4, 10), 4)
    assert found.how == "fake tensors"
    assert bytes_of(found, "parameters", 4) == 4 * 33 + 2 * 12


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(10, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs = self.layer(inputs)
        return outputs[outputs.sum(1) > -1e9]


def test_a_model_that_branches_on_data_needs_real_tensors() -> None:
    with pytest.raises(NeedsProbe):
        trace(Branching, torch.zeros(4, 10), 4)
    found = trace(Branching, torch.zeros(4, 10), 1, real=True)
    assert bytes_of(found, "parameters", 1) == 4 * 33
    assert bytes_of(found, "data", 6) == 6 * 40


def test_inputs_that_do_not_fit_are_bad_input() -> None:
    with pytest.raises(errors.BadInput, match=r"a training step failed on \(2, 7\) float32.*reduction dim"):
        trace(mlp, torch.zeros(4, 7), 4)


def test_a_model_that_cannot_be_built_is_bad_input() -> None:
    def broken() -> nn.Module:
        raise ValueError("no such width")

    with pytest.raises(errors.BadInput, match="building the model failed: ValueError: no such width"):
        trace(broken, torch.zeros(4, 10), 4)


def test_the_state_of_an_optimizer_is_seen_in_the_second_step_only() -> None:
    found = trace(mlp, torch.zeros(4, 10), 4, optimizer=lambda parameters: torch.optim.AdamW(parameters, foreach=True))
    steps = found.operators.step
    born = [
        steps[at]
        for at, kind in zip(found.storages.born, found.storages.category, strict=True)
        if kind == "optimizer" and at < len(steps)
    ]
    assert set(born) == {1}
    assert {3} <= set(steps)  # and an evaluation follows


def peak(found: Trace, rows: int) -> int:
    """Highest sum of live bytes over the first two steps."""
    change = [0] * (len(found.operators) + 1)
    for born, dies, size in zip(found.storages.born, found.storages.dies, found.storages.sizes(rows), strict=True):
        change[born] += size
        change[dies] -= size
    live = highest = 0
    for k, step in enumerate(found.operators.step):
        live += change[k]
        highest = max(highest, live if step < 3 else 0)
    return highest


def test_live_bytes_are_those_of_torchs_own_allocator() -> None:
    """Without convolutions there is no scratch: what a real loop allocates is what the trace says, to half a per cent."""

    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.LayerNorm(512), nn.Linear(512, 64))

    inputs, targets = torch.zeros(64, 256), torch.zeros(64, dtype=torch.int64)
    found = trace(network, inputs, 64, targets=targets, loss=nn.functional.cross_entropy, optimizer="adamw")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model = network()
        optimizer = torch.optim.AdamW(model.parameters())
        given, wanted = torch.zeros(64, 256), torch.zeros(64, dtype=torch.int64)
        for _ in range(2):
            optimizer.zero_grad()
            outputs = model(given)
            loss = nn.functional.cross_entropy(outputs, wanted)
            loss.backward()
            optimizer.step()
            del outputs, loss
    live = highest = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            highest = max(highest, live)
    assert peak(found, 64) == pytest.approx(highest, rel=0.005)
