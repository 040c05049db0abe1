"""A summary of the data: what is there, what is worth knowing about it, and what must be beaten."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from delest.records.run import Summary
from delest.records.source import Column, Schema, Source

if TYPE_CHECKING:
    from numpy import int64
    from numpy.typing import NDArray

_SAMPLE_BYTES = 4 << 20  # of arrays and images looked at for their statistics
_COMPARED_BYTES = 256 << 20  # of rows compared to find duplicates
_BLOCK_BYTES = 8 << 20


def summarise(source: Source, splits: Mapping[str, NDArray[int64]]) -> Summary:
    """What `inspect` shows of a source and its division. Statistics of arrays and images are those of a sample."""
    schema = source.schema
    columns = tuple(_column(source, column) for column in schema.inputs)
    target = schema.target
    labels = None if target is None or schema.is_text else source.values(target.name)
    classes = None
    if labels is not None and schema.classes is not None:
        counts = np.bincount(labels, minlength=len(schema.classes))
        classes = dict(zip(schema.classes, counts.tolist(), strict=True))
    return Summary(
        source=getattr(source, "description", f"{len(source):,} rows"),
        fingerprint=source.fingerprint,
        rows=len(source),
        kind="images" if schema.is_image else "table" if schema.is_table else "text" if schema.is_text else "arrays",
        columns=columns,
        target=None if target is None else target.name,
        classes=classes,
        splits={role: len(index) for role, index in splits.items()},
        row_bytes=_row_bytes(schema),
        left_out=tuple(getattr(source, "left_out", ())),
        notes=tuple(_notes(source, splits, columns, classes)),
        baseline=_baseline(source, labels, splits),
    )


def _column(source: Source, column: Column) -> dict[str, Any]:
    described: dict[str, Any] = {"name": column.name, "kind": column.kind, "shape": column.shape, "dtype": column.dtype}
    described["missing"] = column.missing
    if column.kind == "category":
        return {**described, "cardinality": column.cardinality}
    if column.kind == "tokens":
        return {**described, "cardinality": source.schema.outputs}
    if column.kind == "number":
        values = source.values(column.name).astype(np.float64)
    else:
        step = max(1, len(source) * _row_size(source.schema) // _SAMPLE_BYTES)
        values = source.read(np.arange(0, len(source), step))[column.name]
    if column.missing:
        values = values[~np.isnan(values)]
    if not values.size:
        return described
    statistics = {
        "mean": values.mean(dtype=np.float64),
        "std": _deviation(values),
        "low": values.min(),
        "high": values.max(),
    }
    return {**described, **{name: float(value) for name, value in statistics.items()}}


def _deviation(values: NDArray[Any]) -> float:
    """Standard deviation, block by block: NumPy's own takes eight bytes for each value."""
    flat, mean = values.reshape(-1), values.mean(dtype=np.float64)
    count = _BLOCK_BYTES // 8
    blocks = (flat[start : start + count] for start in range(0, flat.size, count))
    return float(np.sqrt(sum(float(np.square(block - mean).sum()) for block in blocks) / flat.size))


def _row_size(schema: Schema) -> int:
    """Bytes of one row as it is read."""
    return sum(int(np.prod(column.shape)) * (1 if column.dtype == "uint8" else 8) for column in schema.inputs) or 1


def _row_bytes(schema: Schema) -> int:
    """Bytes of one row as the model receives it: float32, category codes and ids int64."""
    if schema.is_table:
        return 4 * schema.number_width + 8 * len(schema.categories)
    return sum(int(np.prod(column.shape)) * (8 if column.dtype == "int64" else 4) for column in schema.inputs)


def _notes(
    source: Source, splits: Mapping[str, NDArray[int64]], columns: tuple[dict[str, Any], ...], classes: dict[str, int] | None
) -> Iterator[str]:
    how = getattr(splits, "how", "")
    if how:
        yield how
    if source.schema.is_text:
        yield f"the vocabulary has {source.schema.outputs:,} tokens"
    if classes:
        most, least = max(classes, key=classes.__getitem__), min(classes, key=classes.__getitem__)
        if classes[most] > 10 * classes[least]:
            yield (
                f"classes are unbalanced: {classes[most]:,} rows of {most!r}, {classes[least]:,} of {least!r}; "
                "judge by balanced_accuracy or f1 (--metric)"
            )
    for column in columns:
        share = column["missing"] / max(1, len(source))
        if share > 0.2:
            yield f"column {column['name']!r} has no value in {share:.0%} of the rows"
        if column.get("std") == 0 or (column.get("cardinality") == 2 and not column["missing"]):
            yield f"column {column['name']!r} is constant: it says nothing"
    if getattr(source, "left_out", ()):
        yield f"{len(source.left_out):,} files or columns are left out"
    duplicates = _duplicates(source, splits)
    if duplicates:
        yield f"{duplicates:,} rows of test are also in train, exactly: the test score will flatter the model"


def _duplicates(source: Source, splits: Mapping[str, NDArray[int64]]) -> int:
    """Rows of test whose inputs are also in train; 0 where finding out would be slow, and for tables, where it is usual."""
    train, test = splits.get("train", np.empty(0, np.int64)), splits.get("test", np.empty(0, np.int64))
    too_much = (len(train) + len(test)) * _row_size(source.schema) > _COMPARED_BYTES
    if source.schema.is_table or getattr(source, "decodes", False) or too_much or not len(test):
        return 0
    tested = list(_row_hashes(source, test))
    seen = set(_row_hashes(source, train))
    return sum(row in seen for row in tested)


def _row_hashes(source: Source, index: NDArray[int64]) -> Iterator[int]:
    step = max(1, _BLOCK_BYTES // _row_size(source.schema))
    for start in range(0, len(index), step):
        rows = source.read(index[start : start + step])
        for place in range(len(index[start : start + step])):
            yield hash(tuple(rows[column.name][place].tobytes() for column in source.schema.inputs))


def _baseline(source: Source, labels: NDArray | None, splits: Mapping[str, NDArray[int64]]) -> dict[str, float]:
    """Score on test (else validation, else train) of the answer that is best on train whatever the inputs are; none for arrays."""
    target, train = source.schema.target, splits.get("train")
    judged = next((splits[role] for role in ("test", "validation", "train") if len(splits.get(role, ()))), None)
    if target is None or train is None or judged is None or not len(train):
        return {}
    if target.kind == "tokens":
        return {"loss": _cross_entropy_of_frequencies(source, train, judged)}
    if labels is None or target.kind == "array":
        return {}
    if target.kind == "class":
        return {"accuracy": float((labels[judged] == np.bincount(labels[train]).argmax()).mean())}
    return {"rmse": float(np.sqrt(((labels[judged] - labels[train].mean()) ** 2).mean()))}


def _cross_entropy_of_frequencies(source: Source, train: NDArray[int64], judged: NDArray[int64]) -> float:
    """In nats a token, of answering with the frequencies of train whatever came before; a token that train lacks counts once."""
    counts = _token_counts(source, train)
    logarithms = np.log(np.maximum(counts, 1) / counts.sum())
    expected = _token_counts(source, judged)
    return float(-(expected * logarithms).sum() / expected.sum())


def _token_counts(source: Source, index: NDArray[int64]) -> NDArray[int64]:
    """How often each token is a target, [V]."""
    schema = source.schema
    assert schema.target is not None
    counts = np.zeros(schema.outputs, np.int64)
    step = max(1, _BLOCK_BYTES // _row_size(schema))
    for start in range(0, len(index), step):
        tokens = source.read(index[start : start + step])[schema.target.name]
        counts += np.bincount(tokens.reshape(-1), minlength=len(counts))
    return counts
