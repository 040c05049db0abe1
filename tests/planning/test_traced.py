"""Combinations of methods compared on traces of a small transformer: what is chosen at which budget, and what is said of the rest."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from torch import nn

from delest import errors, methods
from delest.backends.torch.loops import JobLoop
from delest.backends.torch.trace import trace_loop
from delest.job import Job, Recipe
from delest.planning import search, traced
from delest.planning.candidates import SMALLER_STATES, Judge
from delest.planning.request import EXACT, SLACK_BYTES, Request
from delest.records.batch import Batch
from delest.records.plan import Plan
from delest.records.source import Column, Schema, Target
from delest.reporting.words import option_words
from rooflines import ROOFLINE

MIB = 1 << 20
BATCH, WIDTH, LAYERS = 64, 128, 4
SCHEMA = Schema(
    inputs=(Column(name="x", kind="array", shape=(32, WIDTH)),), target=Target(name="y", kind="class", classes=("a", "b"))
)


class Layer(nn.Module):
    def __init__(self, normalised: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(32) if normalised else nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(torch.relu(self.first(self.norm(x))))


class Network(nn.Module):
    def __init__(self, normalised: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(normalised) for _ in range(LAYERS)])
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


class Flat(nn.Module):
    """Nothing repeats: there are no blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 1024), nn.Linear(1024, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)).mean(1))


class Dropping(Network):
    """Reads values while it is built, as networks with stochastic depth do."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = [rate.item() for rate in torch.linspace(0, 0.5, LAYERS)]


MADE: dict[str, object] = {}  # traces of all tests, by model, recipe and choices


def tracer(job: Job):
    """What traces the job's step with choices applied; keeps what it was asked for."""
    example = Batch(np.zeros((2, 32, WIDTH), np.float32), np.zeros(2, np.int64), np.arange(2), 0, 2)

    def trace(choices):
        plan = Plan(batch_size=BATCH, micro_batch=BATCH, choices=choices, threads=1)
        return trace_loop(
            lambda mode: JobLoop(job, plan, SCHEMA, example),
            BATCH,
            scratch=lambda signatures: {text: {"scratch": 0, "outputs": []} for text in signatures if text},
        )

    traces: dict[str, object] = {}

    def retrace(choices):
        key = repr([(choice.method, choice.config) for choice in choices])
        whole = f"{job.model} {job.recipe} {key}"
        if whole not in MADE:
            MADE[whole] = trace(choices)
        traces[key] = MADE[whole]
        return traces[key]

    retrace.traces = traces
    return retrace


def request(
    budget_mib: float, *, model=Network, normalised=False, exact=False, retrace=None, allocators=None, **recipe
) -> Request:
    job = Job(model=model, data="unused", batch_size=BATCH, recipe=Recipe(precision="fp32", **recipe))
    sample = {"rows": 32, "first": 30 * MIB, "steady": 32 * MIB, "evaluation": 20 * MIB, "seconds": 0.5}
    probe = {
        "samples": [{**sample, "rows": 16, "steady": 20 * MIB, "seconds": 0.25}, sample],
        "variants": {},
        "batch_statistics": normalised,
        "base_bytes": 4 * MIB,
        "weights_bytes": 4 * MIB,
        "largest_bytes": 4 * MIB,
        "busy": "",
        "device": "cpu",
    }
    return Request(
        job=job,
        probe=probe,
        budget_bytes=int(budget_mib * MIB),
        asked=True,
        idle_bytes=100 * MIB,
        threads=1,
        exact=exact,
        allocators=allocators or {},
    )


def choose(wanted: Request) -> tuple[Plan, object]:
    retrace = tracer(wanted.job)
    return traced.choose(wanted, (), retrace, ROOFLINE), retrace


@pytest.fixture(scope="module")
def smallest() -> dict[bool, int]:
    """The least budget in bytes that anything fits, by whether results must be kept; without the slack that is named with it."""
    found = {}
    for exact in (True, False):
        with pytest.raises(errors.NothingFits) as raised:
            choose(request(110, exact=exact))
        found[exact] = raised.value.smallest_bytes - SLACK_BYTES
    return found


def test_what_is_planned_fits_and_is_within_what_was_compared(smallest):
    low = smallest[True] / MIB
    for share in (0.1, 0.4, 0.7):
        plan, _ = choose(request(low + share * 60))
        assert plan.predicted.high_bytes <= plan.memory_bytes
        assert plan.considered[0].peak_bytes == plan.predicted.peak_bytes
        assert all(choice.keeps in EXACT for choice in plan.choices)
        assert {choice.method for choice in plan.choices} | {one.method for one in plan.rejected} >= {
            "activation_checkpointing",
            "optimizer_in_backward",
            "optimizer_state",
            "micro_batch",
        }


def test_less_memory_takes_more_time_along_the_frontier(smallest):
    plan, _ = choose(request(smallest[True] / MIB + 20))
    peaks = [option.peak_bytes for option in plan.frontier]
    seconds = [option.step_seconds for option in plan.frontier]
    assert peaks == sorted(peaks)
    assert seconds == sorted(seconds, reverse=True)


def test_savings_and_costs_add_up_from_the_plain_step_to_the_plan(smallest):
    plan, _ = choose(request(smallest[True] / MIB + 0.1))
    assert len(plan.choices) >= 2
    saved = sum(choice.saved_bytes or 0 for choice in plan.choices)
    cost = sum(choice.cost_seconds or 0.0 for choice in plan.choices)
    assert saved == pytest.approx(plan.plain.peak_bytes - plan.predicted.peak_bytes, abs=8)
    assert cost == pytest.approx(plan.predicted.step_seconds - plan.plain.step_seconds)


def test_results_are_changed_only_where_nothing_else_fits(smallest):
    assert smallest[False] < smallest[True]
    between = (smallest[False] + smallest[True]) / 2 / MIB
    plan, _ = choose(request(between))
    assert {"optimizer_state", "factored_state"} & {choice.method for choice in plan.choices}
    with pytest.raises(errors.NothingFits) as raised:
        choose(request(between, exact=True))
    assert raised.value.smallest_bytes == smallest[True] + SLACK_BYTES


@pytest.fixture(scope="module")
def by_state(smallest):
    """The least budget in bytes, as above, with 8-bit moments alone, with 4-bit ones too, and with all states."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for count in range(len(SMALLER_STATES)):
            patch.setattr(traced, "SMALLER_STATES", SMALLER_STATES[:count])
            with pytest.raises(errors.NothingFits) as raised:
                choose(request(110))
            found.append(raised.value.smallest_bytes - SLACK_BYTES)
    return [*found, smallest[False]]


def test_a_smaller_state_is_taken_only_where_no_larger_one_fits(smallest, by_state):
    eight, four, factored = by_state
    assert smallest[True] > eight > four > factored
    for low, high, state in (
        (eight, smallest[True], {"optimizer_state": {"bits": 8}}),
        (four, eight, {"optimizer_state": {"bits": 4}}),
        (factored, four, {"factored_state": {}}),
    ):
        plan, retrace = choose(request((low + high) / 2 / MIB))
        chosen = {choice.method: choice.config for choice in plan.choices}
        assert {name: chosen[name] for name in ("optimizer_state", "factored_state") if name in chosen} == state
        assert ("torchao" in plan.code, "Adafactor" in plan.code) == ("optimizer_state" in state, "factored_state" in state)
        traced_states = [
            name for name in ("'bits': 8", "'bits': 4", "factored_state") if any(name in key for key in retrace.traces)
        ]
        assert traced_states[-1] in str(state)  # the others after it were not looked at


def test_reasons_say_which_state_and_why_no_other(by_state):
    eight, four, factored = by_state
    plan, _ = choose(request((four + eight) / 2 / MIB))
    why = {choice.method: choice.why for choice in plan.choices} | {one.method: one.why for one in plan.rejected}
    assert "nor with 8 bits; AdamW's moments take 4 bits" in why["optimizer_state"]
    assert "another plan fits without that" in why["factored_state"]
    plan, _ = choose(request((factored + four) / 2 / MIB))
    why = {choice.method: choice.why for choice in plan.choices} | {one.method: one.why for one in plan.rejected}
    assert "nothing that keeps Adam's rule fits" in why["factored_state"]
    assert "fit" in why["optimizer_state"]
    taken = [option for option in plan.frontier if "optimizer_state" in option.methods]
    assert {option.bits for option in taken} == {8, 4}
    assert {f"optimizer state in {option.bits} bits" in option_words(plan, option) for option in taken} == {True}
    plan, _ = choose(request(174, exact=True))
    assert "exact ones are asked for" in next(one.why for one in plan.rejected if one.method == "factored_state")
    plan, _ = choose(request(174, optimizer="sgd"))
    assert "the optimizer is sgd" in next(one.why for one in plan.rejected if one.method == "factored_state")


def test_smaller_states_cost_nothing_where_another_plan_fits(monkeypatch, smallest):
    asked = []
    whole = traced.all_candidates

    def noting(plain, base, judge, state=None):
        asked.append(state)
        return whole(plain, base, judge, state)

    monkeypatch.setattr(traced, "all_candidates", noting)
    choose(request(smallest[True] / MIB + 1))
    assert asked == [None]


def test_the_smallest_budget_that_is_named_works(smallest):
    for exact, size in smallest.items():
        plan, _ = choose(request(math.ceil(size / MIB), exact=exact))
        assert plan.predicted.high_bytes <= size + MIB
        with pytest.raises(errors.NothingFits):
            choose(request(size / MIB - 1, exact=exact))


def test_a_plan_that_was_traced_again_is_what_it_says(smallest):
    wanted = request(smallest[True] / MIB + 0.1)
    plan, retrace = choose(wanted)
    names = plan.config("activation_checkpointing")["modules"]
    assert set(names) <= {f"layers.{k}" for k in range(LAYERS)}
    judge = Judge(retrace(()), wanted, ROOFLINE)
    again = retrace(tuple(choice for choice in plan.choices if choice.method != "micro_batch"))
    assert plan.predicted.peak_bytes == wanted.idle_bytes + int(judge.held_bytes(again, plan.micro_batch))


def test_batches_that_are_normalised_are_not_split_where_exact_ones_are_asked_for():
    model = functools.partial(Network, normalised=True)
    with pytest.raises(errors.NothingFits, match=f"{BATCH} rows at a time"):
        choose(request(149, model=model, normalised=True, exact=True))
    plan, _ = choose(request(214, model=model, normalised=True, exact=True))
    assert plan.micro_batch == BATCH


def test_a_clipped_gradient_is_never_used_in_the_backward_pass():
    plan, _ = choose(request(174, clip=1.0))
    why = next(one.why for one in plan.rejected if one.method == "optimizer_in_backward")
    assert "clipping" in why
    assert not any("optimizer_in_backward" in option.methods for option in plan.frontier)


def test_a_model_without_blocks_says_so():
    plan, _ = choose(request(174, model=Flat))
    assert "no blocks" in next(one.why for one in plan.rejected if one.method == "activation_checkpointing")


def test_only_a_plain_step_that_does_not_fit_is_traced():
    assert search.choose(request(10_000)).choices == ()
    assert search.choose(request(154)) is None
    wanted = request(174)
    retrace = tracer(wanted.job)
    assert search.choose(wanted, lambda: (retrace, ROOFLINE)).choices
    assert retrace.traces


def test_choices_are_in_the_order_in_which_they_are_applied(smallest):
    plan, _ = choose(request(smallest[False] / MIB + 1))
    order = [methods.NAMES.index(choice.method) for choice in plan.choices]
    assert order == sorted(order)


# Under the default malloc the probe's steps take 32 MiB; a bit less than the trace's own blocks is the least that they can take.
MAPPED = {"rows": 32, "first": 20 * MIB, "steady": 21 * MIB, "evaluation": 14 * MIB, "seconds": 0.65}


def test_another_malloc_is_taken_where_it_makes_room_and_never_where_it_is_only_slower():
    model = functools.partial(Network, normalised=True)  # exact ones cannot split its batch
    given = {"model": model, "normalised": True, "exact": True, "allocators": {"mmap": MAPPED}}
    generous, _ = choose(request(10_000, **given))
    assert generous.config("allocator") is None
    with pytest.raises(errors.NothingFits) as raised:
        choose(request(120, **{**given, "allocators": {}}))
    alone = raised.value.smallest_bytes / MIB
    with pytest.raises(errors.NothingFits) as raised:
        choose(request(120, **given))
    assert "allocator" in str(raised.value)
    assert raised.value.smallest_bytes / MIB < alone - 5
    plan, retrace = choose(request(raised.value.smallest_bytes / MIB, **given))
    assert plan.config("allocator") == {"name": "mmap"}
    assert plan.choices[0].method == "allocator"
    assert plan.choices[0].keeps == "bitwise"
    assert (plan.predicted.allocator, plan.plain.allocator) == ("mmap", "glibc")
    assert not any("allocator" in key for key in retrace.traces)  # which it does not change
    assert "MALLOC_MMAP_THRESHOLD_=65536" in plan.code


def test_what_another_malloc_saves_and_costs_adds_up_with_the_rest():
    plan, _ = choose(request(174, allocators={"mmap": {**MAPPED, "seconds": 0.4}}))  # faster: always the first
    assert plan.config("allocator") == {"name": "mmap"}
    saved = sum(choice.saved_bytes or 0 for choice in plan.choices)
    cost = sum(choice.cost_seconds or 0.0 for choice in plan.choices)
    assert plan.choices[0].cost_seconds < 0 < plan.choices[0].saved_bytes
    assert saved == pytest.approx(plan.plain.peak_bytes - plan.predicted.peak_bytes, abs=8)
    assert cost == pytest.approx(plan.predicted.step_seconds - plan.plain.step_seconds)


def test_a_malloc_that_was_not_probed_is_said_not_to_be():
    plan, _ = choose(request(174))
    assert "no other than glibc was probed" in next(one.why for one in plan.rejected if one.method == "allocator")
    plan, _ = choose(request(174, allocators={"mmap": {**MAPPED, "seconds": 50.0}}))
    assert "a step against" in next(one.why for one in plan.rejected if one.method == "allocator")


def test_a_jobs_factory_may_read_values_of_its_own():
    traces = [tracer(Job(model=model, data="unused", batch_size=BATCH))(()) for model in (Network, Dropping)]
    assert "made fake when a module took it" in traces[1].how
    assert len(traces[0].operators.module) == len(traces[1].operators.module)
