"""A table of numbers and categories with a network of Keras: how many minutes late will this flight arrive?

    KERAS_BACKEND=tensorflow delest run examples/keras_table.py

Needs `pip install 'delest[keras]'`. The table is made here, so that the example needs no download: 6,000 flights drawn from a known rule
with noise. Columns reach the network by name: `numbers` [B, D], standardised, and `categories` [B, K], a code for each column.
"""

from pathlib import Path
from tempfile import gettempdir

import keras
import numpy as np
import polars as pl
from keras import layers

import delest


def write_table(path: Path, rows: int = 6000) -> Path:
    """Draw flights and write them as CSV, once."""
    if path.exists():
        return path
    random = np.random.default_rng(11)
    hour, distance = random.integers(5, 23, rows), random.gamma(4, 250, rows)
    carrier, origin = random.choice(["AA", "BB", "CC", "DD"], rows), random.choice(["EWR", "JFK", "LGA"], rows)
    busy = np.where(origin == "EWR", 9.0, 0.0) + np.where(carrier == "DD", 12.0, -4.0)
    delay = 1.6 * (hour - 12) + busy + 0.004 * distance * (carrier == "BB") + random.normal(0, 6, rows)
    table = pl.DataFrame({"hour": hour, "distance": distance, "carrier": carrier, "origin": origin, "delay": delay})
    table.write_csv(unfinished := path.with_suffix(".part"))
    return unfinished.rename(path)


def network(schema) -> keras.Model:
    """An embedding for each category, the numbers beside them, two hidden layers."""
    numbers = keras.Input((schema.number_width,), name="numbers")
    categories = keras.Input((len(schema.categories),), name="categories", dtype="int64")
    embedded = [
        layers.Flatten()(layers.Embedding(column.cardinality, 4)(categories[:, place : place + 1]))
        for place, column in enumerate(schema.categories)
    ]
    hidden = layers.Dense(64, activation="relu")(layers.Concatenate()([numbers, *embedded]))
    hidden = layers.Dense(32, activation="relu")(hidden)
    return keras.Model({"numbers": numbers, "categories": categories}, layers.Dense(1)(hidden))


job = delest.Job(
    model=network,
    data=write_table(Path(gettempdir()) / "delest-flights.csv"),
    target="delay",
    metric="rmse",
    name="keras-table",
)
