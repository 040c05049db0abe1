"""delest's callback in Lightning's own loop, against the same fit without it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from delest import errors, runs, storage
from delest.records.plan import Choice, Plan

L = pytest.importorskip("lightning")
torchmetrics = pytest.importorskip("torchmetrics")
from delest.frameworks.lightning import DelestCallback  # noqa: E402

NO_MEMORY = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 512 bytes."
pytestmark = pytest.mark.filterwarnings("ignore:::lightning", "ignore:::torch", "ignore:.*does not have many workers.*")


class Scarce(torch.autograd.Function):
    """Memory for so many rows at once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int, backward: bool) -> Tensor:
        ctx.fails = backward and len(x) > rows
        if not backward and len(x) > rows:
            raise RuntimeError(NO_MEMORY)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        if ctx.fails:
            raise RuntimeError(NO_MEMORY)
        return gradient, None, None


class Module(L.LightningModule):
    def __init__(self, rows: int = 1000, backward: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()
        self.accuracy = torchmetrics.MeanMetric()
        self.rows, self.backward_fails, self.seen = rows, backward, []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        scores = self.net(x)
        loss = nn.functional.cross_entropy(scores, y)
        self.accuracy(scores.argmax(1) == y)  # before memory runs out: a step made again must not count twice
        self.log("train_accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"rows": float(len(x)), "most": scores.max().detach()}, reduce_fx="max")
        self.seen.append(len(x))
        return nn.functional.cross_entropy(Scarce.apply(scores, self.rows, self.backward_fails), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        scores = self.net(x)
        if len(x) > self.rows:
            raise RuntimeError(NO_MEMORY)
        self.log("val_loss", nn.functional.cross_entropy(scores, y))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def data(rows: int = 44) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(rows, 6, generator=generator, dtype=torch.float64), torch.randint(3, (rows,), generator=generator)
    y[::3] = -100  # unevenly in parts
    y[:6] = -100
    return DataLoader(TensorDataset(x, y), batch_size=12)


def fit(folder: Path, module: Any, *callbacks: Any, **settings: Any) -> Any:
    trainer = L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=list(callbacks),
        **{"max_epochs": 3, "logger": False, "enable_progress_bar": False, "enable_checkpointing": False, **settings},
        enable_model_summary=False,
    )
    trainer.fit(module, data(), data(20))
    return trainer


def plan(**configs: dict[str, Any]) -> Plan:
    return Plan(
        choices=tuple(Choice(method=name, config=config, keeps="rounding", why="") for name, config in configs.items()),
        batch_size=12,
        micro_batch=12,
    )


def same(one: Any, other: Any) -> None:
    for left, right in zip(one.net.parameters(), other.net.parameters(), strict=True):
        torch.testing.assert_close(right, left, rtol=1e-9, atol=1e-12)


SETTINGS = {"plain": {}, "clipped": {"gradient_clip_val": 0.1}, "accumulated": {"accumulate_grad_batches": 2}}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("backward", [False, True])
def test_steps_that_do_not_fit_are_made_in_parts_with_the_same_results(tmp_path: Path, name: str, backward: bool) -> None:
    alone = Module()
    expected = fit(tmp_path, alone, **SETTINGS[name])
    module = Module(rows=4, backward=backward)
    got = fit(tmp_path, module, DelestCallback("80%", out=tmp_path / "run"), **SETTINGS[name])
    same(alone, module)
    assert got.global_step == expected.global_step
    assert got.optimizers[0].param_groups[0]["lr"] == expected.optimizers[0].param_groups[0]["lr"]
    assert got.callback_metrics.keys() == expected.callback_metrics.keys()
    for key in expected.callback_metrics.keys() - {"rows"}:
        assert float(got.callback_metrics[key]) == pytest.approx(float(expected.callback_metrics[key]), rel=1e-6), key
    assert max(module.seen[-6:]) <= 4
    run = runs.read(tmp_path / "run")
    assert (run.status, run.steps, run.plan.batch_size) == ("done", got.global_step, 12 * got.accumulate_grad_batches)
    assert run.plan.micro_batch <= 4
    assert {row["kind"] for row in run.decisions} == {"split"}
    assert (tmp_path / "run" / "report.html").exists()
    assert run.best.score == pytest.approx(min(row["loss"] for row in lines(tmp_path / "run", "validation")))


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in storage.read_lines(folder / "metrics.jsonl") if row["kind"] == kind]


CHOSEN = {
    "parts": {"micro_batch": {"rows": 5}},
    "checkpointing": {"activation_checkpointing": {"modules": ["net.0"]}},
    "in backward": {"optimizer_in_backward": {}},
    "parts and checkpointing": {"micro_batch": {"rows": 4}, "activation_checkpointing": {"modules": ["net"]}},
}


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize("memory", [None, "80%"])
def test_a_plan_gives_the_same_results(tmp_path: Path, name: str, memory: str | None) -> None:
    alone, module = Module(), Module()
    fit(tmp_path, alone)
    fit(tmp_path, module, DelestCallback(memory, plan(**CHOSEN[name]), out=tmp_path / "run"))
    same(alone, module)
    assert runs.read(tmp_path / "run").plan.config(next(iter(CHOSEN[name]))) is not None


def test_without_anything_given_it_keeps_the_run_and_leaves_the_fit_alone(tmp_path: Path) -> None:
    alone, module = Module(), Module()
    fit(tmp_path, alone)
    trainer = fit(tmp_path, module, DelestCallback(out=tmp_path / "run"))
    for left, right in zip(alone.parameters(), module.parameters(), strict=True):
        assert torch.equal(left, right)
    assert set(module.seen) == {12, 8}
    run = runs.read(tmp_path / "run")
    assert (run.status, run.steps, run.epochs) == ("done", 12, 3.0)
    assert run.job["loop"] == f"Lightning {L.__version__}"
    assert "_make_closure" not in vars(trainer.fit_loop.epoch_loop.automatic_optimization)
    assert "log" not in vars(module)


def test_moments_of_8_bits_take_the_place_of_those_of_an_optimizer_without_a_scheduler(tmp_path: Path) -> None:
    class Bare(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    trainer = fit(tmp_path, Bare(), DelestCallback(plan=plan(optimizer_state={"bits": 8}), out=tmp_path / "run"))
    assert type(trainer.optimizers[0]).__name__ == "AdamW8bit"
    assert trainer.global_step == 12
    assert trainer.optimizers[0].state


def test_what_cannot_act_in_a_fit_is_refused_by_name(tmp_path: Path) -> None:
    class Manual(Module):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    cases: list[tuple[Any, DelestCallback, dict[str, Any], str]] = [
        (Module(), DelestCallback(plan=plan(optimizer_state={"bits": 8})), {}, "a StepLR is attached"),
        (Manual(), DelestCallback("80%"), {}, "automatic_optimization is False"),
        (
            Module(),
            DelestCallback(plan=plan(precision={"dtype": "bf16"})),
            {"precision": "bf16-mixed"},
            "precision='bf16-mixed'",
        ),
        (Module(), DelestCallback(plan=plan(optimizer_in_backward={})), {"gradient_clip_val": 1.0}, "clipping needs the norm"),
        (Module(), DelestCallback(plan=plan(optimizer_in_backward={})), {"accumulate_grad_batches": 2}, "until the last part"),
    ]
    for module, callback, settings, said in cases:
        with pytest.raises(errors.BadInput, match=said):
            fit(tmp_path, module, callback, **settings)


def test_more_processes_and_batches_that_cannot_be_seen_are_refused() -> None:
    from types import SimpleNamespace

    from delest.frameworks.loops import faults_in_lightning

    class Iterating(Module):
        def training_step(self, dataloader_iter: Any) -> Any: ...

    trainer = SimpleNamespace(optimizers=[1], world_size=2, precision="32-true")
    found = faults_in_lightning(trainer, Iterating(), DelestCallback("80%"))
    assert len(found) == 2
    assert faults_in_lightning(trainer, Iterating(), DelestCallback()) == []
    trainer.optimizers = []
    assert "no optimizer" in faults_in_lightning(trainer, Module(), DelestCallback())[0]


def test_a_step_that_fits_in_no_parts_ends_the_fit_with_what_would_do(tmp_path: Path) -> None:
    with pytest.raises(errors.NothingFits, match=r"with 1 row at a time.*memory=\d+MiB"):
        fit(tmp_path, Module(rows=0), DelestCallback("80%", out=tmp_path / "run"), num_sanity_val_steps=0)
    assert runs.read(tmp_path / "run").status == "failed"


def test_a_loss_that_is_not_made_of_its_rows_is_refused(tmp_path: Path) -> None:
    class Contrastive(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            scores = self.net(batch[0])
            return nn.functional.cross_entropy(scores @ scores.T, torch.arange(len(scores))) + 0.1

    with pytest.raises(errors.BadInput, match="neither the mean nor the sum"):
        fit(tmp_path, Contrastive(), DelestCallback(plan=plan(micro_batch={"rows": 4}), out=tmp_path / "run"))


def test_a_sum_is_made_and_logged_as_a_sum(tmp_path: Path) -> None:
    class Sum(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1], reduction="sum")
            self.log("sum", loss)
            self.log("share", 0.25)
            return loss

    alone, module = Sum(), Sum()
    expected = fit(tmp_path, alone).callback_metrics
    got = fit(tmp_path, module, DelestCallback(plan=plan(micro_batch={"rows": 4}), out=tmp_path / "run")).callback_metrics
    same(alone, module)
    assert {name: float(value) for name, value in got.items()} == pytest.approx({k: float(v) for k, v in expected.items()})


def test_it_stops_when_what_is_watched_gets_no_better(tmp_path: Path) -> None:
    class Stale(Module):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_f1", 0.5)

    trainer = fit(tmp_path, Stale(), DelestCallback(monitor="val_f1", patience=2, out=tmp_path / "run"), max_epochs=9)
    assert trainer.current_epoch == 3
    run = runs.read(tmp_path / "run")
    assert (run.status, run.stopped_by, run.metric) == ("done", "plateau", "f1")
    assert [row["kind"] for row in run.decisions] == ["stop"]


def test_an_error_of_the_user_ends_the_run_and_lifts_the_limit(tmp_path: Path) -> None:
    import resource

    class Breaks(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise ValueError("mine")

    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(ValueError, match="mine"):
        fit(tmp_path, Breaks(), DelestCallback("80%", out=tmp_path / "run"))
    run = runs.read(tmp_path / "run")
    assert (run.status, run.stopped_by) == ("failed", "ValueError")
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_batch_normalisation_in_parts_is_warned_of_when_it_happens(tmp_path: Path) -> None:
    class Normal(Module):
        def __init__(self, rows: int):
            super().__init__(rows)
            self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)).double()

    with pytest.warns(errors.DelestWarning, match="normalises over the batch"):
        fit(tmp_path, Normal(4), DelestCallback("80%", out=tmp_path / "run"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", errors.DelestWarning)
        fit(tmp_path, Normal(1000), DelestCallback("80%", out=tmp_path / "other"))
