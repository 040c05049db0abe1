"""The forty named training cases of `zoo.json` that predictions of memory and time are held against.

    python benchmarks/zoo.py

lists them. A case is a network, its data, a batch size, an optimizer with its implementation, and a precision. Ten are `held_out`:
no rule is ever set by them. Cases under `extra` are run beside the forty: bf16 where the machine has kernels for it, and networks
that cannot be traced. Nothing is downloaded: transformers' models are built from small configs with random weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import zoo_networks
from torch import Tensor, nn
from torch.nn import functional

ZOO = Path(__file__).with_name("zoo.json")
SEED = 0
LOSSES: dict[str, Callable[[Any, Any], Tensor]] = {
    "cross_entropy": functional.cross_entropy,  # classes on axis 1
    "mean_squared_error": functional.mse_loss,
    "binary_cross_entropy": functional.binary_cross_entropy_with_logits,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One network trained in one way."""

    name: str
    kind: str
    network: dict[str, Any]  # `function` of zoo_networks.py, the rest are its arguments
    data: dict[str, Any]  # likewise, of this file
    loss_name: str | None  # of `LOSSES`; None where the model returns its `.loss`
    batch_size: int
    optimizer_name: str  # sgd, adamw
    implementation: str  # loop, foreach, fused
    precision: str  # fp32, bf16: the forward pass under autocast
    momentum: float = 0.9  # of sgd
    held_out: bool = False

    def model(self) -> nn.Module:
        """The network in training mode, always with the same weights."""
        torch.manual_seed(SEED)
        return _call(vars(zoo_networks), self.network).train()

    def inputs(self, rows: int) -> tuple[Any, Tensor | None]:
        """Inputs and targets of `rows` rows: a tensor, a tuple for `model(*inputs)` or a mapping for `model(**inputs)`; the targets
        are None where they are among the inputs."""
        torch.manual_seed(SEED + 1)
        return _call(globals(), self.data, rows=rows)

    @property
    def loss(self) -> Callable[[Any, Any], Tensor] | None:
        return None if self.loss_name is None else LOSSES[self.loss_name]

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        foreach, fused = self.implementation == "foreach", self.implementation == "fused"
        if self.optimizer_name == "adamw":
            return torch.optim.AdamW(parameters, lr=1e-4, foreach=foreach, fused=fused)
        return torch.optim.SGD(parameters, lr=1e-3, momentum=self.momentum, foreach=foreach, fused=fused)

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Any, targets: Tensor | None) -> None:
        """One training step as tutorials write it."""
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
            outputs = apply(model, inputs)
            loss = outputs.loss if self.loss is None else self.loss(outputs, targets)
        loss.backward()
        optimizer.step()

    @property
    def needs_transformers(self) -> bool:
        return self.network["function"] == "pretrained"

    def fingerprint(self) -> str:
        """Changes with anything that says how the case is trained; `held_out` does not."""
        described = {key: value for key, value in asdict(self).items() if key not in ("name", "kind", "held_out")}
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def load_cases(*, extra: bool = False) -> list[Case]:
    """The forty in order of the file, or with `extra` the further ones."""
    entries = json.loads(ZOO.read_text())["extra" if extra else "cases"]
    return [Case(**entry) for entry in entries]


def find_case(name: str) -> Case:
    """Raises KeyError where there is none of that name."""
    return {case.name: case for case in load_cases() + load_cases(extra=True)}[name]


def apply(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _call(functions: dict[str, Any], description: dict[str, Any], **more: Any) -> Any:
    arguments = {key: value for key, value in description.items() if key != "function"}
    return functions[description["function"]](**arguments, **more)


# Data. Each returns inputs and targets; R rows.


def images(*, rows: int, shape: list[int], classes: int, layout: str = "contiguous") -> tuple[Tensor, Tensor]:
    """Float inputs [R, *shape] and a class for each row."""
    pixels = torch.randn(rows, *shape)
    if layout == "channels_last":
        pixels = pixels.to(memory_format=torch.channels_last)
    return pixels, torch.randint(0, classes, (rows,))


def labelled_images(*, rows: int, shape: list[int], classes: int) -> tuple[dict[str, Tensor], None]:
    """For transformers: pixel_values [R, *shape] with labels."""
    pixels, labels = images(rows=rows, shape=shape, classes=classes)
    return {"pixel_values": pixels, "labels": labels}, None


def masks(*, rows: int, shape: list[int], classes: int) -> tuple[Tensor, Tensor]:
    """Float inputs [R, *shape] and a class for each pixel."""
    return torch.randn(rows, *shape), torch.randint(0, classes, (rows, *shape[1:]))


def signals(*, rows: int, shape: list[int], target: list[int]) -> tuple[Tensor, Tensor]:
    """Float inputs [R, *shape] and float targets [R, *target]."""
    return torch.randn(rows, *shape), torch.randn(rows, *target)


def texts(*, rows: int, length: int, vocabulary: int, classes: int) -> tuple[Tensor, Tensor]:
    """Tokens [R, length] and a class for each row."""
    return torch.randint(0, vocabulary, (rows, length)), torch.randint(0, classes, (rows,))


def next_tokens(*, rows: int, length: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Tokens [R, length] and the token that follows each."""
    tokens = torch.randint(0, vocabulary, (rows, length + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def labelled_texts(*, rows: int, length: int, vocabulary: int, labels: int | None = None) -> tuple[dict[str, Tensor], None]:
    """For transformers: input_ids [R, length] with a label for each token, of `labels` tokens where decoder and encoder differ."""
    tokens = torch.randint(0, vocabulary, (rows, length))
    return {"input_ids": tokens, "labels": torch.randint(0, vocabulary, (rows, labels or length))}, None


def translations(*, rows: int, length: int, answer: int, vocabulary: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Tokens of a source [R, length] and of a target [R, answer], and the token that follows each of the target's."""
    source = torch.randint(0, vocabulary, (rows, length))
    target = torch.randint(0, vocabulary, (rows, answer + 1))
    return (source, target[:, :-1].contiguous()), target[:, 1:].contiguous()


def clicks(*, rows: int, cardinalities: list[int], several: int, numbers: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Category numbers [R, columns, several], numbers [R, numbers], and whether it was clicked [R]."""
    columns = [torch.randint(0, cardinality, (rows, several)) for cardinality in cardinalities]
    return (torch.stack(columns, 1), torch.randn(rows, numbers)), torch.randint(0, 2, (rows,)).float()


def main() -> None:
    print(f"{'case':24}{'batch':>6}  {'optimizer':16}{'precision':11}")
    for case in load_cases() + load_cases(extra=True):
        optimizer = f"{case.optimizer_name} {case.implementation}"
        print(f"{case.name:24}{case.batch_size:>6}  {optimizer:16}{case.precision:11}{'held out' if case.held_out else ''}")


if __name__ == "__main__":
    main()
