"""A table of numbers and categories with missing values: will this loan be repaid?

    delest run examples/table.py

The table is made here, so that the example needs no download: 4,000 applications drawn from a known rule with noise.
Any CSV or Parquet table is trained the same way: delest run loans.csv --target repaid
"""

from pathlib import Path
from tempfile import gettempdir

import numpy as np
import polars as pl

import delest


def write_table(path: Path, rows: int = 4000) -> Path:
    """Draw applications and write them as CSV, once."""
    if path.exists():
        return path
    random = np.random.default_rng(7)
    income = random.lognormal(8, 0.5, rows)
    debt = random.gamma(2, 1500, rows)
    region = random.choice(["north", "south", "east", "west"], rows)
    purpose = random.choice(["car", "house", "studies"], rows, p=[0.5, 0.3, 0.2])
    score = 1.4 * np.log(income / debt) + np.where(region == "south", 0.9, -0.3) + np.where(purpose == "studies", 0.8, 0.0)
    repaid = random.random(rows) < 1 / (1 + np.exp(-2.5 * score))
    known = random.random(rows) > 0.1  # one income in ten is missing
    table = pl.DataFrame(
        {"income": income, "debt": debt, "region": region, "purpose": purpose, "repaid": np.where(repaid, "yes", "no")}
    )
    table.with_columns(pl.when(pl.Series(known)).then("income").alias("income")).write_csv(
        unfinished := path.with_suffix(".part")
    )
    return unfinished.rename(path)


job = delest.Job(data=write_table(Path(gettempdir()) / "delest-loans.csv"), target="repaid", metric="auc", name="loans")
