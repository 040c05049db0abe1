"""Tables as a source: CSV, Parquet, or columns in memory. Numbers stay numbers, text and ids become category codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from delest import errors
from delest.data import fingerprints
from delest.data.stored import Memory, Store, StoredSource
from delest.data.targets import TARGET_NAMES, Wishes, encode_target, missing_values, refuse, roles_of_files
from delest.job import unknown
from delest.records.source import Column, Schema, Source

if TYPE_CHECKING:
    from numpy.typing import NDArray

CSV_SUFFIXES = (".csv", ".tsv", ".csv.gz")
_NULLS = ["", "NA", "N/A", "NaN", "nan", "null", "NULL", "?"]
_LEADING_ZERO = r"^0\d"
_DAY_OR_MONTH = r"^\d{1,2}\D"
_DECIMAL_COMMA = r"^\s*[+-]?(\d+,?\d*|,\d+)([eE][+-]?\d+)?\s*$"
_LOOKED_AT_ROWS = 10_000  # to tell the types of a CSV file's columns
# Words that merely end like an id.
_ENDING_SO = ("paid", "bid", "valid", "covid", "grid", "mid", "humid", "solid", "liquid", "fluid", "acid", "void", "aid")


def open_table(paths: Sequence[Path], wishes: Wishes, where: str) -> Source:
    """A source from CSV or Parquet files with the same columns; `train` and `test` in their names give roles.

    Raises `BadInput` for unreadable files, columns that differ, an unknown or incomplete target, infinite values.
    """
    frames, faults = [], []
    for path in paths:
        try:
            frames.append(read_frame(path, by=wishes.split_by))
        except (pl.exceptions.PolarsError, OSError, UnicodeDecodeError) as error:
            faults.append(f"{path} cannot be read as a table: {str(error).splitlines()[0]}")
    refuse(faults)
    for path, frame in zip(paths, frames, strict=True):
        differing = sorted(set(frame.columns) ^ set(frames[0].columns))
        if differing:
            faults.append(
                f"{path}: columns {', '.join(map(repr, differing[:5]))} are not in all files of {where}; they must have the same."
            )
    refuse(faults)
    frame = pl.concat([part.select(frames[0].columns) for part in frames], how="vertical_relaxed")
    roles = roles_of_files([path.name for path in paths], [len(part) for part in frames])
    fingerprint = fingerprints.of_files(paths, paths[0].parent, str(wishes.target), str(wishes.split_by))
    return _assemble(frame, wishes, fingerprint, where, roles)


def open_frame(data: Any, wishes: Wishes, where: str) -> Source:
    """A source from columns in memory: a mapping of arrays [N], or a data frame."""
    columns: Mapping[str, Any] = data if isinstance(data, Mapping) else {name: data[name] for name in data.columns}
    arrays = {str(name): np.asarray(values) for name, values in columns.items()}
    lengths = {name: len(values) for name, values in arrays.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} {count:,}" for name, count in lengths.items())
        raise errors.BadInput(f"{where}: columns differ in length: {listed}. Each needs a value a row.")
    try:
        frame = pl.DataFrame({name: values if isinstance(data, Mapping) else data[name] for name, values in arrays.items()})
    except (TypeError, ValueError, pl.exceptions.PolarsError) as error:
        raise errors.BadInput(f"{where} cannot be read as a table: {str(error).splitlines()[0]}") from None
    texts = {name: values.astype(str) if values.dtype.kind == "O" else values for name, values in arrays.items()}
    fingerprint = fingerprints.of_arrays(texts, str(wishes.target), str(wishes.split_by))
    return _assemble(frame, wishes, fingerprint, where, None)


def read_frame(path: Path, *, as_text: bool = False, by: str | None = None) -> pl.DataFrame:
    """A CSV or Parquet file as it is; `as_text` leaves each column of a CSV file text, whatever its values look like.

    Else codes such as 007 stay text, and so do the dates of `by` where day or month come first. Where semicolons separate
    columns, 1,5 is a number.
    """
    if path.name.lower().endswith(".parquet"):
        return pl.read_parquet(path)
    read = partial(
        pl.read_csv,
        path,
        separator=separator(path),
        null_values=_NULLS,
        infer_schema=not as_text,
        try_parse_dates=True,
        encoding="utf8-lossy",
    )
    try:
        frame = read(infer_schema_length=_LOOKED_AT_ROWS)
    except pl.exceptions.ComputeError:  # a column changes its type further down: the whole file tells, ten times slower
        frame = read(infer_schema_length=None)
    if as_text:
        return frame
    frame = frame.with_columns(_as_written(path, frame, by))
    if separator(path) != ";":
        return frame
    return frame.with_columns(with_point(series) for series in frame if _has_decimal_commas(series))


def _as_written(path: Path, frame: pl.DataFrame, by: str | None) -> list[pl.Series]:
    """Columns as text that the types which polars finds would change: codes with leading zeros, and dates whose day may be
    their month."""
    asked = [
        pl.col(series.name).str.contains(_LEADING_ZERO if series.dtype.is_integer() else _DAY_OR_MONTH).any()
        for series in frame
        if series.dtype.is_integer() or (series.name == by and series.dtype.is_temporal())
    ]
    if not asked:
        return []
    file = pl.scan_csv(path, separator=separator(path), null_values=_NULLS, infer_schema=False, encoding="utf8-lossy")
    found = file.select(asked).collect()
    names = [name for name in found.columns if found[name][0]]
    return file.select(names).collect().get_columns() if names else []


def _has_decimal_commas(series: pl.Series) -> bool:
    if series.dtype != pl.String or not series.str.contains(",", literal=True).any():
        return False
    return bool(series.drop_nulls().str.contains(_DECIMAL_COMMA).all())


def with_point(series: pl.Series) -> pl.Series:
    """Texts as float64 with a comma read as the decimal point; null for what is no number."""
    return series.str.strip_chars().str.replace(",", ".", literal=True).cast(pl.Float64, strict=False)


def separator(path: Path) -> str:
    """What separates the columns of a CSV file, by its header."""
    if path.suffix == ".gz":
        return ","
    with open(path, encoding="utf-8", errors="replace") as file:
        header = file.readline()
    return max((",", ";", "\t"), key=header.count)


def _assemble(frame: pl.DataFrame, wishes: Wishes, fingerprint: str, where: str, roles: NDArray | None) -> Source:
    target = wishes.target or next((name for name in TARGET_NAMES if name in frame.columns), None)
    faults = _naming_faults(frame, target, wishes, where)
    refuse(faults)
    assert target is not None
    found, labels, faults = _target(frame[target], where)
    stores: dict[str, Store] = {}
    columns: list[Column] = []
    left_out: list[str] = []
    for series in frame:
        if series.name in (target, wishes.split_by):
            continue
        reason = _unusable(series)
        if reason is not None:
            left_out.append(f"column {series.name!r}: {reason}")
            continue
        column, stores[series.name] = _category(series) if _is_category(series) else _number(series, where, faults)
        columns.append(column)
    if not columns and not faults:
        faults.append(f"{where} has no usable input column beside the target {target!r}. " + "; ".join(left_out))
    refuse(faults)
    return StoredSource(
        fingerprint=fingerprint,
        schema=Schema(inputs=tuple(columns), target=found),
        stores={**stores, target: Memory(labels)},
        description=f"{len(frame):,} rows of {len(columns)} columns in {where}",
        left_out=tuple(left_out),
        given_roles=roles,
        extra={} if wishes.split_by is None else {wishes.split_by: _dividing(frame[wishes.split_by], where)},
    )


def _naming_faults(frame: pl.DataFrame, target: str | None, wishes: Wishes, where: str) -> list[str]:
    names = frame.columns
    faults = []
    if target is None:
        faults.append(f"{where} has the columns {', '.join(names)}, and none is plainly the target: name one with --target.")
    elif target not in names:
        faults.append(f"{where}: " + unknown("target", target, names))
    if wishes.split_by is not None and wishes.split_by not in names:
        faults.append(f"{where}: " + unknown("column to split by", wishes.split_by, names))
    if not len(frame):
        faults.append(f"{where} has 0 rows.")
    return faults


def _target(series: pl.Series, where: str) -> tuple[Any, NDArray, list[str]]:
    gaps = series.is_null()
    if gaps.any():
        return None, np.empty(0), [missing_values(where, series.name, int(gaps.sum()), int(gaps.arg_max() or 0))]
    if not (series.dtype.is_numeric() or series.dtype == pl.Boolean):
        series = series.cast(pl.String, strict=False)
    return encode_target(series.name, series.to_numpy(), where)


def _dividing(series: pl.Series, where: str) -> NDArray:
    """The values of the column to split by: text, numbers or times, without gaps."""
    if series.null_count():
        raise errors.BadInput(
            f"{where}: {series.null_count():,} rows have no value in {series.name!r}, the column to split by. Fill them in."
        )
    values = series.to_numpy()
    return values.astype(str) if values.dtype.kind == "O" else values


def _is_id(series: pl.Series) -> bool:
    name = series.name
    lower = name.lower()
    if not series.dtype.is_integer() or not lower.endswith("id"):
        return False
    return name.endswith(("Id", "ID")) or not lower.rpartition("_")[2].endswith(_ENDING_SO)


def _is_category(series: pl.Series) -> bool:
    return not series.dtype.is_numeric() or _is_id(series)


def _unusable(series: pl.Series) -> str | None:
    """Why a column cannot be an input, None where it can."""
    dtype, rows = series.dtype, len(series)
    if series.null_count() == rows:
        return "it has no value in any row"
    if dtype.is_temporal():
        return "dates and times are no input yet; add what matters of them as numbers"
    if not (dtype.is_numeric() or dtype in (pl.Boolean, pl.String, pl.Categorical, pl.Enum)):
        return f"its type {dtype} is no number and no text"
    if dtype == pl.String or _is_id(series):
        distinct = series.n_unique()
        if (distinct == rows and rows > 50) or (distinct > 1000 and distinct > rows / 2):
            return f"{distinct:,} distinct values in {rows:,} rows say nothing about other rows"
    return None


def _category(series: pl.Series) -> tuple[Column, Store]:
    known = series.drop_nulls().unique()
    text = pl.String
    names = known.sort().cast(text).to_list() if series.dtype.is_integer() else sorted(known.cast(text).to_list())
    names = [name for name in names if name != ""]  # "" is how a missing value is written
    codes = (
        series.cast(text)
        .replace_strict(names, range(1, len(names) + 1), default=0, return_dtype=pl.Int32)
        .fill_null(0)
        .to_numpy()
    )
    missing = int((codes == 0).sum())
    column = Column(name=series.name, kind="category", dtype="int64", categories=tuple(names), missing=missing)
    return column, Memory(codes, np.int64)


def _number(series: pl.Series, where: str, faults: list[str]) -> tuple[Column, Store]:
    if series.dtype.is_decimal():
        series = series.cast(pl.Float64)
    values = series.to_numpy()
    missing = 0
    if values.dtype.kind == "f":
        infinite = np.flatnonzero(np.isinf(values))
        if len(infinite):
            faults.append(
                f"{where}: column {series.name!r} has {len(infinite):,} infinite values, the first in row {infinite[0]}. "
                "Leave them empty or remove those rows."
            )
        missing = int(np.isnan(values).sum())
    return Column(name=series.name, kind="number", dtype=str(values.dtype), missing=missing), Memory(values, np.float64)
