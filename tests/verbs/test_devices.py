"""Which machine to take: traces of a job on devices that are not here, with memory small enough that each kind of plan is needed."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from torch import Tensor, nn

import delest
from delest import cli, errors, methods
from delest.planning import devices
from delest.planning.devices import GATHERED
from delest.records.devices import DeviceComparison
from delest.records.form import from_json
from delest.reporting.devices import devices_text

MIB = 1 << 20
BATCH, WIDTH, LAYERS = 32, 256, 4


class Layer(nn.Module):
    def __init__(self, normalised: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(64) if normalised else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.linear(x).relu().sin().cos().tanh())


class Network(nn.Module):
    """Rows of 64 x 256: 0.4 MiB of activations in each layer for a row."""

    def __init__(self, normalised: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(normalised) for _ in range(LAYERS)])
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def wide_job(positions: int = 1) -> delest.Job:
    """Nearly all of its memory is states."""

    def model() -> nn.Module:
        blocks = [nn.Sequential(nn.Linear(1024, 1024), nn.ReLU()) for _ in range(6)]
        return nn.Sequential(nn.Sequential(*blocks), nn.AdaptiveAvgPool2d((1, None)), nn.Flatten(), nn.Linear(1024, 4))

    x = np.zeros((40, positions, 1024), np.float32)
    return delest.Job(model=model, data=(x, np.arange(40) % 4), batch_size=8, recipe=delest.Recipe(epochs=3, precision="fp32"))


def job(normalised: bool = False, **recipe: object) -> delest.Job:
    x = np.zeros((200, 64, WIDTH), np.float32)
    return delest.Job(
        model=lambda: Network(normalised),
        data=(x, np.arange(200) % 4),
        batch_size=BATCH,
        recipe=delest.Recipe(**{"epochs": 3, "precision": "fp32", **recipe}),
    )


def compare(memory_mib: float | None = None, names: str = "t4", normalised: bool = False, **wishes) -> DeviceComparison:
    memory = None if memory_mib is None else int(memory_mib * MIB)
    return delest.plan(job(normalised), devices=names, memory=memory, **wishes)


@pytest.fixture(scope="module")
def generous() -> DeviceComparison:
    return compare(names="t4,a100,h100", prices={"a100": 3.0, "t4": 0.01, "h100": 5.0})


def test_without_need_the_whole_batch_is_kept_and_times_follow_the_rates(generous):
    assert [option.name for option in generous.options] == ["t4", "a100-80", "h100"]
    assert generous.steps == 3 * math.ceil(140 / BATCH)
    for option in generous.options:
        assert (option.count, option.plan.micro_batch, option.plan.choices, option.basis) == (1, BATCH, (), "trace")
        assert option.plan.predicted.device == option.name
        assert option.high_bytes <= option.budget_bytes
        assert option.seconds > generous.steps * option.step_seconds  # an evaluation after each epoch besides
        assert option.cost == pytest.approx(option.price * option.seconds / 3600)
    t4, a100, h100 = generous.options
    assert t4.step_seconds > a100.step_seconds > h100.step_seconds


def test_the_cheapest_is_taken_by_price_and_the_fastest_without(generous):
    assert generous.recommended == "t4"
    assert generous.best.cost == min(option.cost for option in generous.options)
    unpriced = compare(names="t4,h100")
    assert unpriced.recommended == "h100"
    assert unpriced.best.cost is None
    some = compare(names="t4,h100", prices={"t4": 1000.0})
    assert some.recommended == "t4"
    assert "1 without a price not weighed" in some.why


def test_only_what_ends_in_time_is_taken(generous):
    t4, a100, _ = generous.options
    between = (t4.seconds + a100.seconds) / 2
    found = compare(names="t4,a100", prices={"t4": 0.01, "a100": 3.0}, time=between)
    assert found.recommended == "a100-80"
    hasty = compare(names="t4", time=t4.seconds / 2)
    assert hasty.recommended is None
    assert "none ends in time" in hasty.why


def test_less_memory_takes_fewer_rows_at_once_and_then_blocks_recomputed(generous):
    whole = generous.options[0].high_bytes / MIB
    (fewer,) = compare(whole - 5).options
    assert fewer.plan.micro_batch < BATCH
    assert fewer.plan.config("micro_batch") == {"rows": fewer.plan.micro_batch}
    assert fewer.high_bytes <= fewer.budget_bytes < generous.options[0].high_bytes
    assert fewer.step_seconds >= generous.options[0].step_seconds
    # batches that are normalised must stay whole where exact results are asked for
    (normal,) = compare(None, normalised=True, exact=True).options
    (blocks,) = compare(normal.high_bytes / MIB - 5, normalised=True, exact=True).options
    assert blocks.plan.micro_batch == BATCH
    assert blocks.plan.config("activation_checkpointing") == {"modules": [f"layers.{k}" for k in range(LAYERS)]}
    assert blocks.step_seconds > normal.step_seconds
    assert methods.configs(blocks.plan).keys() == {"activation_checkpointing"}


def test_states_that_fit_no_device_are_sharded_by_arithmetic():
    (least,) = delest.plan(wide_job(), devices="t4", memory=100 * MIB).options  # below the context: no number will do
    assert (least.count, least.plan, least.cost) == (None, None, None)
    assert "leave nothing" in least.why
    block, head = 1024 * 1024 + 1024, 4 * 1024 + 4
    states = 16 * (6 * block + head)  # AdamW in fp32: weights, gradients, two moments
    for count in (2, 3):
        budget = least.high_bytes - states + 4 * GATHERED * block + states // count + MIB
        (option,) = delest.plan(wide_job(), devices="t4", memory=budget, prices={"t4": 2.0}).options
        assert (option.count, option.basis) == (count, "arithmetic")
        assert option.high_bytes <= option.budget_bytes
        assert option.high_bytes + states / (count - 1) - states / count > option.budget_bytes
        assert option.cost == pytest.approx(2.0 * count * option.seconds / 3600)
        assert "communication not counted" in option.why
        assert option.plan.predicted is None


def test_what_is_beside_states_counts_at_its_own_highest_where_these_are_sharded(monkeypatch):
    """The whole step is highest in the update, where there are no activations: sharded states would move it."""
    seen = []
    monkeypatch.setattr(
        devices, "_sharded", lambda *given: seen.append(given) or devices._none(given[0], given[1], "by this test")
    )
    delest.plan(wide_job(31), devices="t4", memory=100 * MIB)
    ((least, offer, work),) = seen
    whole = devices._foreseen(offer, work, (), least.trace, 8)
    states, beside = devices._apart(whole, work)
    assert states == pytest.approx(16 * (6 * (1024 * 1024 + 1024) + 4 * 1024 + 4), rel=1e-4)
    activations = 6 * 31 * 1024 * 4 * 8  # of ReLU alone
    assert whole.footprint.breakdown["activations"] < activations / 2
    assert beside > whole.footprint.runtime_bytes + activations


def test_nothing_to_take_is_said_and_ends_with_status_3(tmp_path, capsys):
    np.savez(tmp_path / "rows.npz", images=np.zeros((200, 8, 8, 3), np.uint8), labels=np.arange(200) % 4)
    assert cli.main(["plan", str(tmp_path / "rows.npz"), "--devices", "t4", "--memory", "100MiB", "--quiet"]) == 3
    assert capsys.readouterr().out.startswith("none to take: it fits on none of them")


def test_the_command_gives_the_record_as_json_and_a_verdict_first(tmp_path, capsys):
    np.savez(tmp_path / "rows.npz", images=np.zeros((200, 8, 8, 3), np.uint8), labels=np.arange(200) % 4)
    line = ["plan", str(tmp_path / "rows.npz"), "--devices", "t4,l4", "--price", "t4=0.35,l4=0.7", "--time", "10h", "--quiet"]
    assert cli.main([*line, "--json"]) == 0
    found = from_json(DeviceComparison, json.loads(capsys.readouterr().out))
    assert {option.name: option.price for option in found.options} == {"t4": 0.35, "l4": 0.7}
    assert cli.main(line) == 0
    shown = capsys.readouterr().out
    assert shown == devices_text(found) + "\n"
    assert shown.startswith(f"take {found.recommended}: ")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--devices", "t5,l4"], "unknown device 't5': did you mean t4"),
        (["--devices", ","], "no device is named"),
        (["--devices", "t4", "--price", "t4=cheap"], "'t4=cheap' is no price"),
        (["--devices", "t4", "--price", "t4"], "'t4' is no price"),
        (["--devices", "t4", "--price", "t4=-1"], "a price of -1.0 for t4 is none"),
        (["--devices", "t4", "--price", "t4=nan"], "a price of nan for t4 is none"),
        (["--devices", "t4", "--price", "l4=1"], "the price of l4 belongs to none"),
        (["--devices", "t4", "--time", "soon"], "soon"),
        (["--devices", "t4", "--memory", "lots"], "lots"),
        (["--devices", "t4", "--threads", "2"], "--device, --threads and --probe are of this machine"),
        (["--devices", "t4", "--explain", "precision"], "--explain is of a plan for this machine"),
        (["--price", "t4=1"], "--time and --price are for comparing devices"),
        (["--time", "1h"], "--time and --price are for comparing devices"),
    ],
)
def test_what_cannot_be_compared_is_bad_input(tmp_path, capsys, words, told):
    np.savez(tmp_path / "rows.npz", images=np.zeros((8, 8, 8, 3), np.uint8), labels=np.arange(8) % 4)
    assert cli.main(["plan", str(tmp_path / "rows.npz"), *words, "--quiet"]) == 2
    printed = capsys.readouterr()
    assert told in printed.err
    assert printed.out == ""


def test_all_that_is_wrong_with_devices_is_told_together():
    with pytest.raises(errors.BadInput) as raised:
        delest.plan(job(), devices=["t5", "b100000"], prices={"h1000": 1.0, "l4": 0})
    assert len(raised.value.faults) == 4
