"""One published measurement as a training loop: which model, batch, loss, optimizer and precision its row says."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from published_convnets import CONVNETS
from published_models import GPT, GPTShape, VisionTransformer, bert, llama, next_token_loss
from published_optimizers import Lamb, PlainAdamW, QuantizedAdamW
from torch import Tensor, nn
from torch.nn import functional

from delest.backends.torch.recorder import Recorder

Row = Mapping[str, str]
ESSENTIAL = ("gpu", "model", "batch_per_gpu", "precision", "optimizer")
LABELS = 45  # of the data set that torchao's rows were finetuned on


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a row says, in a form that can be built."""

    model: Callable[[], nn.Module]
    batch: Callable[[int], dict[str, Tensor]]
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor]
    optimizer: Callable[[Any], torch.optim.Optimizer] | None
    weights: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    keeps_gradients: bool = False  # between steps, filled with zeros
    channels_last: bool = False
    retains_graph: bool = False  # an operator whose script gives a gradient and keeps the graph through the backward pass


class RowLoop:
    """A training step as the measured script took it."""

    def __init__(self, setup: Setup):
        self.setup = setup
        self.model = setup.model()
        if setup.weights != torch.float32:
            for parameter in self.model.parameters():  # tables of positions are made anew in fp32, or are not kept as buffers
                parameter.data = parameter.data.to(setup.weights)
        if setup.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizers = [setup.optimizer(trained)] if setup.optimizer else []

    def batch(self, rows: int) -> dict[str, Tensor]:
        return self.setup.batch(rows)

    def step(self, batch: dict[str, Tensor], recorder: Recorder) -> None:
        with self._autocast():
            loss = self.setup.loss(self.model, batch)
        if self.setup.retains_graph:
            loss.backward(batch["dy"] if "dy" in batch else torch.randn_like(loss), retain_graph=True)
        else:
            loss.backward()
        recorder.update()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=not self.setup.keeps_gradients)

    def evaluate(self, batch: dict[str, Tensor]) -> None:
        """Nothing: published peaks are of training."""

    def _autocast(self) -> Any:
        dtype = self.setup.autocast
        return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)


def missing_fields(row: Row) -> list[str]:
    """Fields without which no loop can be built of a row."""
    wanted = ESSENTIAL[:-1] if is_operator(row) else ESSENTIAL
    return [name for name in wanted if not row[name]]


def is_operator(row: Row) -> bool:
    return "operator" in row["mem_grade"]


def torch_version(row: Row) -> tuple[int, int]:
    """The version of PyTorch that a row names; NVIDIA's containers of 2021 held previews of 1.9 to 1.11."""
    if row["framework"].startswith("NGC"):
        return 1, 10
    found = re.search(r"PyTorch (\d+)\.(\d+)", row["framework"])
    return (int(found[1]), int(found[2])) if found else (2, 4)


def updates_in_step(row: Row) -> float:
    """Share of an optimizer's update in the time that a row gives."""
    if "excludes optimizer" in row["notes"]:
        return 0.0
    return 1 / int(row["grad_accum"] or 1) if "micro-batch" in row["step_time_basis"] else 1.0


def setup_of(row: Row) -> Setup:
    """Raises `KeyError` for a model that is not known here."""
    if is_operator(row):
        return _operator(row)
    model = row["model"]
    precision: dict[str, Any] = {"weights": _weights(row["precision"]), "autocast": _autocast(row["precision"])}
    common = {**precision, "optimizer": _optimizer(row), "keeps_gradients": torch_version(row) < (2, 0)}
    if model in CONVNETS or model.startswith(("vit_", "ViT")):
        return Setup(**_vision(row, precision["weights"]), **common)
    if model == "BERT-large":
        return Setup(**_bert(row), **common)
    return Setup(**(_llama(row) if "optimum" in row["source_repo"] else _gpt(row)), **common)


def _weights(precision: str) -> torch.dtype:
    if precision.startswith(("bf16-true", "bf16 (")):
        return torch.bfloat16
    return torch.float16 if precision.startswith("fp16 weights") else torch.float32


def _autocast(precision: str) -> torch.dtype | None:
    if "AMP" not in precision:
        return None
    return torch.bfloat16 if precision.startswith("bf16") else torch.float16


def _optimizer(row: Row) -> Callable[[Any], torch.optim.Optimizer]:
    """Where the name says no more, what PyTorch takes on CUDA: foreach, but a loop over parameters before 2.0."""
    name = row["optimizer"].partition(";")[0]
    foreach = torch_version(row) >= (2, 0)
    if name.startswith("Adafactor"):
        from transformers.optimization import Adafactor

        return partial(Adafactor, lr=5e-5, scale_parameter=False, relative_step=False)
    if "8bit (b" in name or "8bit (bitsandbytes" in name:
        return QuantizedAdamW
    if "8bit" in name or "Fp8" in name:
        return partial(QuantizedAdamW, block=256)
    if "4bit" in name:
        return partial(QuantizedAdamW, bits=4, block=128)
    if name.startswith("LAMB"):
        return Lamb
    if name.startswith("SGD"):
        return partial(torch.optim.SGD, lr=0.1, momentum=0.9, foreach=foreach)
    if "adamw_hf" in name:
        return PlainAdamW
    fused = "fused" in name.lower()
    return partial(torch.optim.AdamW, lr=1e-4, **({"fused": True} if fused else {"foreach": foreach}))


def _classification(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch["images"]), batch["labels"])


def _vision(row: Row, dtype: torch.dtype) -> dict[str, Any]:
    size, name = int(row["image_size"]), row["model"]
    last = "NHWC" in row["compile"] or "NHWC" in row["precision"]

    def batch(rows: int) -> dict[str, Tensor]:
        images = torch.empty(rows, 3, size, size, dtype=dtype)
        images = images.contiguous(memory_format=torch.channels_last) if last else images
        return {"images": images, "labels": torch.zeros(rows, dtype=torch.int64)}

    factory = CONVNETS.get(name) or partial(
        VisionTransformer,
        int(row["hidden"]),
        int(row["layers"]),
        int(row["heads"]),
        int(row["ffn"].split()[0]),
        image=size,
        patch=14 if "14" in name else 16,
        classes=LABELS if name.startswith("ViT") else 1000,
        gated="SwiGLU" in row["ffn"],
        scaled="DINOv2" in name,
        fused="SDPA" in row["attn"],
        checkpointed=row["act_ckpt"] != "none",
    )
    return {"model": factory, "batch": batch, "loss": _classification, "channels_last": last}


def _tokens(length: int, **more: int) -> Callable[[int], dict[str, Tensor]]:
    def batch(rows: int) -> dict[str, Tensor]:
        tokens = {"input_ids": torch.zeros(rows, length, dtype=torch.int64)}
        return {**tokens, **{name: torch.zeros((rows, size)[: size + 1], dtype=torch.int64) for name, size in more.items()}}

    return batch


def _bert(row: Row) -> dict[str, Any]:
    length = int(row["seq_len"])
    if row["workload"].startswith("pretraining"):
        factory, batch = partial(bert, task="pretraining"), _tokens(length)
        return {"model": factory, "batch": batch, "loss": lambda model, given: model(**given)}
    if row["workload"].startswith("SQuAD"):
        factory, batch = partial(bert, task="span"), _tokens(length, start_positions=0, end_positions=0)
    else:
        checkpointed = row["act_ckpt"] != "none"
        factory, plain = partial(bert, task="classification", checkpointed=checkpointed), _tokens(length, labels=0)

        def batch(rows: int) -> dict[str, Tensor]:
            """transformers 4 added an fp32 mask to the scores even where it hides nothing."""
            return {**plain(rows), "attention_mask": torch.zeros(rows, 1, 1, length)}

    return {"model": factory, "batch": batch, "loss": lambda model, given: model(**given).loss}


def _gpt(row: Row) -> dict[str, Any]:
    low_rank, length = "LoRA" in row["workload"], int(row["seq_len"])
    forms: dict[str, dict[str, Any]] = {
        "phi-1.5": {"rotated": 0.5, "parallel": True, "shared_norm": True, "head_bias": True, "approximate": "tanh"},
        "StableLM-base-alpha-3b": {"rotated": 0.25, "parallel": True},
        "Llama-2-7B": {"gated": True},
        "Llama-2-13B": {"gated": True},
        "TinyLlama-1.1B": {"gated": True},
    }
    shape = GPTShape(
        layers=int(row["layers"]),
        width=int(row["hidden"]),
        heads=int(row["heads"]),
        groups=int(row["kv_heads"]),
        hidden=int(row["ffn"]),
        vocabulary=int(row["vocab"]),
        rank=8 if low_rank else 0,
        **forms[row["model"]],
    )
    factory = partial(GPT, shape, length, chunk=128 if low_rank else None)
    return {
        "model": factory,
        "batch": _tokens(length),
        "loss": lambda model, given: next_token_loss(model(given["input_ids"]), given["input_ids"]),
    }


def _llama(row: Row) -> dict[str, Any]:
    sizes = [int(row[name]) for name in ("hidden", "layers", "heads", "ffn")]
    length = int(row["seq_len"])
    return {
        "model": partial(llama, *sizes, low_rank=row["workload"].endswith("LoRA")),
        "batch": _tokens(length, labels=length),
        "loss": lambda model, given: model(**given).loss,
    }


# Single operators: gradients of weights and inputs stay from one call to the next, as the measured loop leaves them


class _Head(nn.Module):
    """Projection to a vocabulary and cross-entropy, beside the idle twin that the script builds for the other provider."""

    def __init__(self, width: int, vocabulary: int):
        super().__init__()
        self.linear, self.idle = nn.Linear(width, vocabulary, bias=False), nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(self.linear(x), target)


class _Gated(nn.Module):
    """Llama's perceptron."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class _Norm(nn.Module):
    """Llama's normalisation with an fp32 weight."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class _CrossEntropy(nn.Module):
    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(x, target)


def _operator(row: Row) -> Setup:
    name, length = row["model"].removeprefix("OPERATOR "), int(row["seq_len"])
    halves = torch.bfloat16

    def batch(rows: int) -> dict[str, Tensor]:
        """Each row of the batch is one sequence."""
        if name.startswith("Llama MLP"):
            return {"x": torch.randn(rows, length, int(row["hidden"]), dtype=halves).requires_grad_()}
        count = rows * length
        if name.startswith("RMSNorm"):
            shape = (count, int(row["hidden"]))
            return {"x": torch.randn(shape, dtype=halves).requires_grad_(), "dy": torch.randn(shape, dtype=halves)}
        x = (
            torch.randn(count, int(row["vocab"]))
            if name == "cross_entropy"
            else torch.randn(count, int(row["hidden"]), dtype=halves)
        )
        return {"x": x.requires_grad_(), "target": torch.zeros(count, dtype=torch.int64)}

    models: dict[str, tuple[Callable[[], nn.Module], torch.dtype]] = {
        "cross_entropy": (_CrossEntropy, torch.float32),
        "linear lm_head + cross_entropy": (lambda: _Head(int(row["hidden"]), int(row["vocab"])), halves),
        "Llama MLP (SwiGLU)": (lambda: _Gated(int(row["hidden"]), int(row["ffn"])), halves),
        "RMSNorm (HF Llama)": (lambda: _Norm(int(row["hidden"])), torch.float32),
    }
    factory, weights = models[name]
    scalar = "cross_entropy" in name
    return Setup(
        model=factory,
        batch=batch,
        loss=lambda model, given: model(**{key: value for key, value in given.items() if key != "dy"}),
        optimizer=None,
        weights=weights,
        retains_graph=not scalar,
    )
