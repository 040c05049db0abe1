"""What is to be predicted: raw labels as class codes or numbers; which name is a target, which a role."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from delest import errors
from delest.records.source import ROLES, Target

if TYPE_CHECKING:
    from numpy.typing import NDArray

TARGET_NAMES = ("target", "targets", "label", "labels", "y", "Y", "class")
ROLE_NAMES = {
    **{role: role for role in ROLES},
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "testing": "test",
}
_ROLE_WORD = re.compile(r"(?<![a-z])(train|test|val|dev|selection)")
_ROLE_OF_WORD = {"train": "train", "test": "test", "val": "validation", "dev": "validation", "selection": "selection"}
_LISTED_FAULTS = 10


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the user asked for beside the data: arguments of `open_source`."""

    target: str | None = None
    rows: int | None = None
    image_size: int | None = None
    skip_bad: bool = False
    split_by: str | None = None
    context: int | None = None
    tokenizer: str | None = None
    seed: int = 0


def refuse(faults: Sequence[str]) -> None:
    """Raise `BadInput` with the faults, if there are any: at most 10 of them, then how many more."""
    if faults:
        more = len(faults) - _LISTED_FAULTS
        raise errors.BadInput([*faults[:_LISTED_FAULTS], *([f"and {more:,} more"] if more > 0 else [])])


def role_in_name(name: str) -> str | None:
    """The role that a file's name holds: `train-00000-of-00002.parquet`, `my_test.csv`, `valid.csv`."""
    found = _ROLE_WORD.search(name.lower())
    return _ROLE_OF_WORD[found[1]] if found else None


def roles_of_files(names: Iterable[str], rows: Iterable[int]) -> NDArray | None:
    """Per row the role of its file; files without one count as train; None where no file but train's is named."""
    roles = [role_in_name(name) or "train" for name in names]
    if set(roles) == {"train"}:
        return None
    return np.repeat(np.array(roles), list(rows))


def encode_target(name: str, raw: NDArray, where: str) -> tuple[Target, NDArray, list[str]]:
    """Labels [N] as a `Target` with class codes int64 [N] or numbers float64 [N], and the faults that were found; arrays [N, ...]
    of numbers as they are, float32 or int64.

    Text, truth values and few distinct whole numbers are classes, named by their text in sorted order; floating values
    are a number, and so are whole numbers with more distinct values than 50 and than 5 % of the rows.
    """
    if raw.ndim == 2 and raw.shape[1] == 1:
        raw = raw[:, 0]
    nothing = Target(name=name, kind="number"), np.empty(0)
    if raw.ndim > 1 and raw.dtype.kind in "iufb":
        bad = np.unique(np.argwhere(~np.isfinite(raw))[:, 0])
        faults = [missing_values(where, name, len(bad), int(bad[0]))] if len(bad) else []
        kept = raw.astype(np.float32 if raw.dtype.kind == "f" else np.int64, copy=False)
        return Target(name=name, kind="array", shape=raw.shape[1:]), kept, faults
    if raw.ndim != 1:
        shape = "x".join(map(str, raw.shape))
        return *nothing, [
            f"{where}: target {name!r} has shape {shape} and type {raw.dtype}; it must hold numbers, or one value a row."
        ]
    if raw.dtype.kind == "O":
        if not all(isinstance(value, str) for value in raw):
            return *nothing, [f"{where}: target {name!r} holds Python objects; give numbers or text without gaps."]
        raw = raw.astype(str)
    if raw.dtype.kind == "f":
        bad = np.flatnonzero(~np.isfinite(raw))
        faults = [] if not len(bad) else [missing_values(where, name, len(bad), int(bad[0]))]
        return Target(name=name, kind="number"), raw.astype(np.float64), faults
    if raw.dtype.kind not in "iubUS":
        return *nothing, [f"{where}: target {name!r} has type {raw.dtype}; it must hold numbers or text."]
    values, codes = np.unique(raw, return_inverse=True)
    if raw.dtype.kind in "iu" and len(values) > max(50, 0.05 * len(raw)):
        return Target(name=name, kind="number"), raw.astype(np.float64), []
    names = tuple(_text(value) for value in values.tolist())
    faults = []
    if len(names) == 1:
        faults = [
            f"{where}: target {name!r} has a single class, {names[0]!r}: there is nothing to learn. Add rows of another class."
        ]
    return Target(name=name, kind="class", classes=names), codes.astype(np.int64), faults


def missing_values(where: str, name: str, count: int, first: int) -> str:
    """The fault of a target with gaps."""
    return (
        f"{where}: target {name!r} has {count:,} missing or infinite value{'s' if count > 1 else ''}, the first in row {first}. "
        "Remove those rows or fill them in."
    )


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return str(value).lower() if isinstance(value, bool) else str(value)
