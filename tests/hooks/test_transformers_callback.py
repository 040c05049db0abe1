"""delest's callback in transformers' own Trainer, against the same training without it."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from delest import errors, runs, storage
from delest.records.plan import Choice, Plan

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed  # noqa: E402

from delest.frameworks.transformers import DelestCallback  # noqa: E402

NO_MEMORY = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 512 bytes."
WORDS, LENGTH = 32, 12


class Text(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Rows whose targets are ignored up to a place that differs from row to row; none counts in the first three."""

    def __init__(self, rows: int):
        self.rows = torch.randint(WORDS, (rows, LENGTH), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, k: int) -> dict[str, Tensor]:
        labels = self.rows[k].clone()
        labels[: LENGTH if k < 3 else (5 * k) % LENGTH] = -100
        return {"input_ids": self.rows[k], "labels": labels}


def language_model(rows: int = 1000) -> Any:
    set_seed(0)
    config = GPT2Config(
        vocab_size=WORDS, n_positions=LENGTH, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    config.bos_token_id = config.eos_token_id = None
    return scarce(GPT2LMHeadModel(config).double(), rows)


def scarce(model: nn.Module, rows: int) -> nn.Module:
    """The model, with memory for so many rows at once."""

    def check(module: nn.Module, given: Any, named: Any) -> None:
        model.seen.append(len(named["labels"]))  # type: ignore[union-attr, operator]
        if len(named["labels"]) > rows:
            raise RuntimeError(NO_MEMORY)

    model.seen = []  # type: ignore[assignment]
    model.register_forward_pre_hook(check, with_kwargs=True)
    return model


class Tagger(nn.Module):
    """A model that has no keyword for the number of targets: its loss is a mean over those that it does not ignore."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(WORDS, 8), nn.Linear(8, WORDS)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        scores = self.head(self.words(input_ids))
        return {"loss": nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten()), "logits": scores}


def trained(
    folder: Path, model: Any, *callbacks: Any, make: type[Trainer] = Trainer, more: Any = None, **settings: Any
) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        **{"max_steps": 5, "per_device_train_batch_size": 12, "max_grad_norm": 0.1, **settings},
        learning_rate=0.01,
        logging_steps=1,
        save_strategy="no",
        eval_strategy="steps",
        eval_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_drop_last=False,
    )
    trainer = make(
        model=model, args=arguments, train_dataset=Text(44), eval_dataset=Text(20), callbacks=list(callbacks), **(more or {})
    )
    trainer.train()
    return trainer


def plan(**configs: dict[str, Any]) -> Plan:
    choices = tuple(Choice(method=name, config=config, keeps="rounding", why="") for name, config in configs.items())
    return Plan(choices=choices, batch_size=12, micro_batch=12)


def same(one: Trainer, other: Trainer) -> None:
    """Weights, and all that was logged but times."""
    for left, right in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(right, left, rtol=1e-7, atol=1e-9)
    keys = ("loss", "grad_norm", "learning_rate", "eval_loss", "epoch", "step")
    logs = [[{key: row[key] for key in keys if key in row} for row in trainer.state.log_history] for trainer in (one, other)]
    for left, right in zip(*logs, strict=True):
        assert right == pytest.approx(left, rel=1e-5)


MODELS = {"scaled by the trainer": language_model, "a mean of its own": lambda rows=1000: scarce(Tagger().double(), rows)}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("accumulated", [1, 2])
def test_steps_that_do_not_fit_are_made_in_parts_with_the_same_results(tmp_path: Path, name: str, accumulated: int) -> None:
    settings = {"gradient_accumulation_steps": accumulated}
    alone = trained(tmp_path, MODELS[name](), **settings)
    parted = trained(tmp_path, MODELS[name](4), DelestCallback("80%", out=tmp_path / "run"), **settings)
    same(alone, parted)
    assert parted.state.global_step == 5
    run = runs.read(tmp_path / "run")
    assert (run.status, run.steps, run.plan.batch_size, run.plan.micro_batch) == ("done", 5, 12 * accumulated, 3)
    assert {row["kind"] for row in run.decisions} == {"split"}
    losses = [row["eval_loss"] for row in parted.state.log_history if "eval_loss" in row]
    assert [row["loss"] for row in lines(tmp_path / "run", "validation")] == pytest.approx(losses)
    assert run.best.score == pytest.approx(min(losses))
    (row,) = lines(tmp_path / "run", "train")
    logged = [row["loss"] for row in alone.state.log_history if "loss" in row]
    assert row["loss"] == pytest.approx(sum(logged) / 5, rel=1e-5)
    assert (tmp_path / "run" / "report.html").exists()


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in storage.read_lines(folder / "metrics.jsonl") if row["kind"] == kind]


CHOSEN = {
    "parts": {"micro_batch": {"rows": 5}},
    "checkpointing": {"activation_checkpointing": {"modules": ["transformer.h.0"]}},
    "in backward": {"optimizer_in_backward": {}},
}


@pytest.mark.parametrize("name", CHOSEN)
def test_a_plan_gives_the_same_results(tmp_path: Path, name: str) -> None:
    alone = trained(tmp_path, language_model(), max_grad_norm=0.0)
    other = trained(
        tmp_path, language_model(), DelestCallback("80%", plan(**CHOSEN[name]), out=tmp_path / "run"), max_grad_norm=0.0
    )
    for left, right in zip(alone.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(right, left, rtol=1e-7, atol=1e-9)


def test_without_anything_given_it_keeps_the_run_and_leaves_training_alone(tmp_path: Path) -> None:
    alone = trained(tmp_path, language_model())
    other = trained(tmp_path, language_model(), DelestCallback(out=tmp_path / "run"))
    for left, right in zip(alone.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(left, right)
    assert other.model.seen == alone.model.seen
    run = runs.read(tmp_path / "run")
    assert (run.status, run.steps, run.job["loop"]) == ("done", 5, f"transformers {transformers.__version__}")
    assert not {"training_step", "compute_loss", "prediction_step", "_run_epoch"} & vars(other).keys()


def test_predictions_of_parts_are_put_together(tmp_path: Path) -> None:
    def measured(prediction: Any) -> dict[str, float]:
        return {
            "hits": float((prediction.predictions.argmax(-1) == prediction.label_ids).sum()),
            "rows": len(prediction.label_ids),
        }

    more = {"compute_metrics": measured}
    callback = DelestCallback("80%", out=tmp_path / "run", monitor="eval_hits", mode="max")
    alone = trained(tmp_path, language_model(), more=more)
    parted = trained(tmp_path, language_model(3), callback, more=more)
    expected, got = (
        [(row["eval_hits"], row["eval_rows"]) for row in trainer.state.log_history if "eval_hits" in row]
        for trainer in (alone, parted)
    )
    assert got == expected
    assert {rows for _, rows in got} == {20}
    assert runs.read(tmp_path / "run").metric == "hits"


def test_a_loss_of_a_subclass_is_called_with_parts(tmp_path: Path) -> None:
    class Own(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            outputs = model(**inputs)
            rows = nn.functional.cross_entropy(outputs["logits"].movedim(-1, 1), inputs["input_ids"], reduction="none").mean(1)
            return (rows.mean(), outputs) if return_outputs else rows.mean()

    alone = trained(tmp_path, MODELS["a mean of its own"](), make=Own)
    parted = trained(tmp_path, MODELS["a mean of its own"](4), DelestCallback("80%", out=tmp_path / "run"), make=Own)
    for left, right in zip(alone.model.parameters(), parted.model.parameters(), strict=True):
        torch.testing.assert_close(right, left, rtol=1e-7, atol=1e-9)


def test_moments_of_8_bits_come_before_the_scheduler(tmp_path: Path) -> None:
    given = plan(optimizer_state={"bits": 8})
    trainer = trained(tmp_path, language_model().float(), DelestCallback(plan=given, out=tmp_path / "run"))
    bare = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert type(bare).__name__ == "AdamW8bit"
    assert bare.param_groups[0]["lr"] == trainer.lr_scheduler.get_last_lr()[0]
    assert trainer.lr_scheduler.get_last_lr()[0] < 0.01
    assert bare.state


def test_a_scheduler_that_is_there_already_is_refused_by_name(tmp_path: Path) -> None:
    given = plan(optimizer_state={"bits": 8})
    model = language_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    pair = (optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10))
    with pytest.raises(errors.BadInput, match="a CosineAnnealingLR is attached"):
        trained(tmp_path, model, DelestCallback(plan=given), more={"optimizers": pair})

    class Late(Trainer):
        def train(self, *given_: Any, **named: Any) -> Any:
            self.add_callback(DelestCallback(plan=given))
            return super().train(*given_, **named)

    with pytest.raises(errors.BadInput, match="a LambdaLR is attached.*not by add_callback"):
        trained(tmp_path, language_model(), make=Late)


def test_what_cannot_act_in_a_training_is_refused_by_name(tmp_path: Path) -> None:
    in_backward = plan(optimizer_in_backward={})
    with pytest.raises(errors.BadInput, match="clipping needs the norm"):
        trained(tmp_path, language_model(), DelestCallback(plan=in_backward))
    with pytest.raises(errors.BadInput, match="until the last part"):
        trained(tmp_path, language_model(), DelestCallback(plan=in_backward), max_grad_norm=0.0, gradient_accumulation_steps=2)
    with pytest.raises(errors.BadInput, match="bf16 or fp16 already"):
        trained(tmp_path, language_model(), DelestCallback(plan=plan(precision={"dtype": "bf16"})), bf16=True)


def test_more_processes_and_other_callers_are_refused() -> None:
    from delest.frameworks.loops import calling, faults_in_transformers

    args = SimpleNamespace(world_size=2, n_gpu=0, bf16=False, fp16=False)
    trainer = SimpleNamespace(args=args, is_deepspeed_enabled=False, is_fsdp_enabled=False, optimizer=None)
    assert "one process and one device" in faults_in_transformers(trainer, DelestCallback("80%"))[0]
    assert faults_in_transformers(trainer, DelestCallback()) == []
    with pytest.raises(errors.BadInput, match="called by something else"):
        calling(Trainer)


def test_a_callback_that_is_added_later_guards_too(tmp_path: Path) -> None:
    class Late(Trainer):
        def train(self, *given: Any, **named: Any) -> Any:
            self.add_callback(DelestCallback("80%", out=tmp_path / "run"))
            return super().train(*given, **named)

    same(trained(tmp_path, language_model()), trained(tmp_path, language_model(4), make=Late))
    assert runs.read(tmp_path / "run").status == "done"


def test_a_step_that_fits_in_no_parts_ends_with_what_would_do_and_lifts_the_limit(tmp_path: Path) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(errors.NothingFits, match=r"with 1 row at a time.*memory=\d+MiB"):
        trained(tmp_path, language_model(0), DelestCallback("80%", out=tmp_path / "run"))
    run = runs.read(tmp_path / "run")
    assert (run.status, run.stopped_by) == ("failed", "NothingFits")
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_it_stops_when_what_is_watched_gets_no_better(tmp_path: Path) -> None:
    more = {"compute_metrics": lambda prediction: {"f1": 0.5}}
    callback = DelestCallback(monitor="f1", patience=1, out=tmp_path / "run")
    trainer = trained(tmp_path, language_model(), callback, more=more, max_steps=9)
    assert trainer.state.global_step == 4
    run = runs.read(tmp_path / "run")
    assert (run.status, run.stopped_by, run.metric, run.validation["f1"]) == ("done", "plateau", "f1", 0.5)
