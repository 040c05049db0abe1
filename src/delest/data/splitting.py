"""Dividing rows into train, validation, selection and test: seeded, stratified, respecting what the data bring."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import numpy as np

from delest import errors
from delest.data.targets import ROLE_NAMES
from delest.data.times import look_like_dates, read_times
from delest.job import Split
from delest.records.source import ROLES, Source

if TYPE_CHECKING:
    from numpy import int64
    from numpy.typing import NDArray

_TIME_WORDS = {"time", "date", "datetime", "timestamp", "year"}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


class Division(dict[str, "NDArray[int64]"]):
    """Sorted row numbers by role, and in `how` what `Split.by` was taken for ("" where there is none)."""

    how: str = ""


def split(source: Source, spec: Split, seed: int) -> Division:
    """Sorted row numbers of train, validation, selection and test.

    A text is divided in its own order, train first and test last. Roles that the data bring are left as they are; those they lack are taken out of train, in the proportion of their
    shares. Shares are exact to rounding (to whole groups, where rows are kept together), and every class of 4 rows or
    more has one in train. Raises `BadInput` where a share would be left without a row.
    """
    roles, kind, by = _given_roles(source, spec)
    pool = np.arange(len(source)) if roles is None else np.flatnonzero(roles == "train")
    given = set() if roles is None else set(np.unique(roles).tolist()) - {"train"}
    if not len(pool):
        raise errors.BadInput("the data bring their own roles, but no row to train on: name one file, folder or value `train`.")
    shares = {role: getattr(spec, role) for role in ROLES if role not in given}
    shares = {role: share / sum(shares.values()) for role, share in shares.items() if share > 0}
    if kind == "group":
        assigned = _by_group(by[pool], shares, seed)
    elif kind == "time":
        assigned = np.repeat(np.arange(len(shares)), _counts(len(pool), shares))
        assigned = assigned[np.argsort(np.argsort(by[pool], kind="stable"))]
    elif source.schema.is_text:
        assigned = np.repeat(np.arange(len(shares)), _counts(len(pool), shares))
    else:
        assigned = _stratified(_strata(source)[pool], shares, seed)
    divided = Division({role: np.empty(0, np.int64) for role in ROLES})
    divided |= {role: np.flatnonzero(roles == role) for role in given}
    divided |= {role: np.sort(pool[assigned == place]) for place, role in enumerate(shares)}
    groups = len(np.unique(by[pool])) if kind == "group" else None
    _refuse_empty(divided, shares, len(pool), groups, "windows" if source.schema.is_text else "rows")
    if source.schema.is_text:
        divided.how = "split in the order of the text: train is its beginning, test its end"
    elif kind is not None:
        divided.how = (
            f"split by {kind} of {spec.by!r}: "
            + {
                "role": "each row has the role that is written there",
                "group": f"rows of each of its {groups} values stay together",
                "time": "test is the latest",
            }[kind]
        )
    return divided


def sample_rows(source: Source, rows: int, seed: int) -> NDArray[int64]:
    """Sorted numbers of `rows` rows, each class and role in its proportion."""
    return choose_rows(_strata(source), source.roles(), rows, seed)


def sample(source: Source, index: NDArray[int64], share: float, seed: int) -> NDArray[int64]:
    """Sorted rows out of `index`, about `share` of them, each class in its proportion."""
    return index[choose_rows(_strata(source)[index], None, round(share * len(index)), seed)]


def choose_rows(labels: NDArray, roles: NDArray | None, rows: int, seed: int) -> NDArray[int64]:
    """`sample_rows` for labels [N] and roles [N] or None; all rows where there are no more than `rows`."""
    if len(labels) <= rows:
        return np.arange(len(labels))
    order = _shuffled(len(labels), seed)
    order = order[np.argsort(labels[order], kind="stable")]
    if roles is not None:
        order = order[np.argsort(roles[order], kind="stable")]
    # Evenly spaced places in rows sorted by role and class: each gets its share to within one row.
    return np.sort(order[((np.arange(rows) + 0.5) * len(labels) / rows).astype(np.int64)])


def _strata(source: Source) -> NDArray:
    target = source.schema.target
    if target is None or target.kind != "class":
        return np.zeros(len(source), np.int64)
    return source.values(target.name)


def _shuffled(count: int, seed: int) -> NDArray[int64]:
    return np.random.Generator(np.random.PCG64([seed, 0x5EED])).permutation(count)


def _given_roles(source: Source, spec: Split) -> tuple[NDArray | None, str | None, NDArray]:
    """Roles by row (None: none given), and for `Split.by` its kind and values."""
    if spec.by is None:
        return source.roles(), None, np.empty(0)
    values = source.values(spec.by)
    if values.dtype.kind == "O":
        values = values.astype(str)
    kind = spec.kind or _guessed_kind(spec.by, values)
    if kind == "role":
        return _named_roles(spec.by, values), kind, values
    if kind == "time" and values.dtype.kind in "US":
        values = read_times(spec.by, values.astype(str))
    missing = int(np.count_nonzero(values != values)) if values.dtype.kind in "fmM" else 0
    if missing:
        raise errors.BadInput(f"split by {spec.by!r}: {missing:,} rows have no value there. Fill them in or remove those rows.")
    return source.roles(), kind, values


def _guessed_kind(name: str, values: NDArray) -> str:
    if values.dtype.kind in "US" and {str(value).lower() for value in np.unique(values)} <= set(ROLE_NAMES):
        return "role"
    words = {word.lower() for word in _WORD.findall(name)}
    if values.dtype.kind == "M" or (values.dtype.kind in "iuf" and words & _TIME_WORDS):
        return "time"
    if values.dtype.kind in "US" and look_like_dates(values.astype(str)):
        return "time"
    return "group"


def _named_roles(name: str, values: NDArray) -> NDArray:
    distinct, codes = np.unique(values.astype(str), return_inverse=True)
    unknown = [value for value in distinct.tolist() if value.lower() not in ROLE_NAMES]
    if unknown:
        shown = ", ".join(repr(value) for value in unknown[:5])
        raise errors.BadInput(f"split by {name!r}: {shown} is no role. Roles: {', '.join(ROLE_NAMES)}.")
    return np.array([ROLE_NAMES[value.lower()] for value in distinct.tolist()])[codes]


def _counts(rows: int, shares: dict[str, float]) -> NDArray[int64]:
    """Rows a role by largest remainder; they add up to `rows`."""
    exact = np.array([share * rows for share in shares.values()])
    counts = np.floor(exact + 1e-9).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: rows - counts.sum()]] += 1
    return counts


def _stratified(labels: NDArray, shares: dict[str, float], seed: int) -> NDArray[int64]:
    """Place of the role of each row: roles, evenly interleaved, are dealt to rows shuffled and sorted by class."""
    counts = _counts(len(labels), shares)
    places = np.repeat(np.arange(len(shares)), counts)
    even = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
    order = _shuffled(len(labels), seed)
    order = order[np.argsort(labels[order], kind="stable")]
    assigned = np.empty(len(labels), np.int64)
    assigned[order] = places[np.argsort(even, kind="stable")]
    _give_each_class_training_rows(assigned, labels)
    return assigned


def _give_each_class_training_rows(assigned: NDArray[int64], labels: NDArray) -> None:
    """Swap roles, in place, so that a class of 4 rows or more has one in train (place 0); counts a role stay."""
    classes, codes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    in_train = np.bincount(codes[assigned == 0], minlength=len(classes))
    for k in np.flatnonzero((sizes >= 4) & (in_train == 0)).tolist():
        giver = int(in_train.argmax())
        if in_train[giver] < 2:
            return
        receives = np.flatnonzero(codes == k)[0]
        gives = np.flatnonzero((codes == giver) & (assigned == 0))[0]
        assigned[gives], assigned[receives] = assigned[receives], 0
        in_train[giver] -= 1
        in_train[k] += 1


def _by_group(groups: NDArray, shares: dict[str, float], seed: int) -> NDArray[int64]:
    """Place of the role of each row, whole groups together: shuffled groups, cut where the shares are reached."""
    names, codes, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = _shuffled(len(names), seed)
    middles = (np.cumsum(sizes[order]) - sizes[order] / 2) / len(groups)
    ends = np.cumsum(list(shares.values()))[:-1]
    role_of_group = np.empty(len(names), np.int64)
    role_of_group[order] = np.searchsorted(ends, middles, side="right")
    for place in range(len(shares)):  # a role that fell inside one large group takes the smallest of the richest role
        owned = np.bincount(role_of_group, minlength=len(shares))
        if owned[place] == 0 and owned.max() > 1:
            candidates = np.flatnonzero(role_of_group == owned.argmax())
            role_of_group[candidates[sizes[candidates].argmin()]] = place
    return role_of_group[codes]


def _refuse_empty(
    divided: dict[str, NDArray[int64]], shares: dict[str, float], rows: int, groups: int | None, noun: str
) -> None:
    faults = []
    have = f"{rows:,} {noun}" if groups is None else f"{rows:,} {noun} in {groups:,} groups"
    for role, share in shares.items():
        if not len(divided[role]):
            need = f"at least {math.ceil(1 / share):,} {noun}" if groups is None else f"at least {len(shares)} groups"
            faults.append(f"split: {have} leave none for {role} (share {share:.3g}). Give {need}, or set that share to 0.")
    if faults:
        raise errors.BadInput(faults)
