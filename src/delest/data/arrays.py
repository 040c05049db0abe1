"""Arrays as a source: in memory, in `.npz`, or in `.npy` files that are read by `pread`."""

from __future__ import annotations

import re
import shutil
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from delest import errors, storage
from delest.data import fingerprints
from delest.data.packing import has_room
from delest.data.stored import Joined, Memory, PackedFile, Store, StoredSource, Viewed, blocks
from delest.data.targets import ROLE_NAMES, TARGET_NAMES, Wishes, encode_target, refuse
from delest.job import unknown
from delest.records.source import ROLES, Column, Schema, Source, Target

if TYPE_CHECKING:
    from numpy.typing import NDArray

INPUT_NAMES = ("images", "image", "x", "X", "data", "inputs", "input", "features")
_ROLE = "|".join(sorted(ROLE_NAMES, key=len, reverse=True))
_ROLE_LAST = re.compile(rf"(.+(?=_)|[xy])_?({_ROLE})", re.IGNORECASE)
_ROLE_FIRST = re.compile(rf"({_ROLE})_(.+)", re.IGNORECASE)
_HELD_BYTES = 64 << 20  # a larger member of an .npz is unpacked to disk instead of held in memory


def open_arrays(data: Any, wishes: Wishes) -> Source:
    """A source from `(inputs, targets)`, a mapping of arrays, or one array (no target)."""
    faults: list[str] = []
    positional = False
    if isinstance(data, Mapping):
        target, named = wishes.target, dict(data)
    else:
        inputs, targets = data if isinstance(data, (tuple, list)) else (data, None)
        target = wishes.target or "target"
        named = dict(inputs) if isinstance(inputs, Mapping) else {"x": inputs}
        positional = isinstance(inputs, tuple)
        if positional:
            named = {f"x{place}": array for place, array in enumerate(inputs)}
        if targets is not None:
            named[target] = targets
        else:
            target = None
    arrays = {str(name): _as_array(str(name), value, faults) for name, value in named.items()}
    refuse(faults)
    if isinstance(data, Mapping) and _is_table(arrays, target):
        from delest.data.tables import open_frame

        return open_frame(arrays, wishes, "memory")
    fingerprint = fingerprints.of_arrays(arrays, str(target), str(wishes.split_by))
    stores: dict[str, Store] = {name: Memory(array) for name, array in arrays.items()}
    if not isinstance(data, Mapping) and target is None:
        source = _assemble(stores, None, wishes, fingerprint, "memory", None)
    else:
        source = _from_named(stores, replace(wishes, target=target), fingerprint, "memory", all_inputs=True)
    return replace(source, positional=positional)


def open_npz(path: Path, wishes: Wishes) -> Source:
    """A source from the arrays of an `.npz`; large members are unpacked to the cache, not held in memory."""
    fingerprint = fingerprints.of_files([path], path.parent, str(wishes.target), str(wishes.split_by))
    faults: list[str] = []
    stores: dict[str, Store] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                try:
                    stores[name] = _npz_member(archive, member, fingerprint)
                except ValueError as error:
                    faults.append(f"{path}: array {name!r} cannot be used: {_reason(error)}")
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise errors.BadInput(f"{path} is no readable .npz file ({error}): write it again with numpy.savez.") from None
    refuse(faults)
    if not stores:
        raise errors.BadInput(f"{path} holds no arrays.")
    return _from_named(stores, wishes, fingerprint, path.name)


def open_npy(paths: Sequence[Path], wishes: Wishes, where: str, inputs: str | None = None) -> Source:
    """A source from `.npy` files by their stems, read by `pread`; `inputs` names the only input among them."""
    faults: list[str] = []
    stores: dict[str, Store] = {}
    for path in paths:
        try:
            stores[path.stem] = _npy_file(path)
        except (ValueError, EOFError) as error:
            faults.append(f"{path} cannot be used: {_reason(error)}")
    refuse(faults)
    fingerprint = fingerprints.of_files(paths, paths[0].parent, str(wishes.target), str(wishes.split_by), str(inputs))
    return _from_named(stores, wishes, fingerprint, where, inputs=inputs)


def _as_array(name: str, value: Any, faults: list[str]) -> NDArray:
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        faults.append(f"{name!r} cannot be made an array: {error}")
        return np.empty(0)
    if array.ndim == 0:
        faults.append(
            f"{name!r} is {type(value).__name__}, not an array of rows: give NumPy arrays, or anything with `__array__`."
        )
    return array


def _is_table(arrays: Mapping[str, NDArray], target: str | None) -> bool:
    inputs = [array for name, array in arrays.items() if name != target]
    return len(arrays) > 1 and all(array.ndim == 1 for array in inputs)


def _npz_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, fingerprint: str) -> Store:
    if member.file_size > _HELD_BYTES and has_room(member.file_size):
        path = storage.cache_folder("packed") / f"{fingerprints.of_text(fingerprint, member.filename)}.npy"
        if not path.exists() or path.stat().st_size != member.file_size:
            with archive.open(member) as source, storage.written_atomically(path) as file:
                shutil.copyfileobj(source, file, 1 << 20)
        return _npy_file(path)
    with archive.open(member) as source:
        return Memory(np.lib.format.read_array(source, allow_pickle=False))


def _npy_file(path: Path) -> Store:
    with open(path, "rb") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(file)
        offset = file.tell()
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded")
    if not shape:
        raise ValueError("it holds a single value, not rows")
    if fortran_order and len(shape) > 1:  # rows are not together in the file
        return Memory(np.load(path, allow_pickle=False))
    need = offset + dtype.itemsize * int(np.prod(shape))
    if path.stat().st_size < need:
        raise ValueError(f"the file has {path.stat().st_size:,} of {need:,} bytes: it was cut; copy it again")
    return PackedFile(path, shape[1:], dtype, shape[0], offset)


def _reason(error: Exception) -> str:
    if "bject arrays" in str(error):
        return "it holds Python objects, which are never unpickled; save it as numbers or text (`array.astype(str)`)."
    return f"{error}."


def _from_named(
    stores: dict[str, Store],
    wishes: Wishes,
    fingerprint: str,
    where: str,
    *,
    all_inputs: bool = False,
    inputs: str | None = None,
) -> StoredSource:
    """A source from stores by name: roles in the names, then which is the target and which are inputs."""
    left_out: list[str] = []
    stores, roles = _join_roles(stores, where, left_out)
    target = wishes.target or next((name for name in TARGET_NAMES if name in stores), None)
    if target is not None and target not in stores:
        raise errors.BadInput(f"{where}: " + unknown("target", target, list(stores)))
    if target is None and len(stores) > 1 and inputs is None:
        raise errors.BadInput(f"{where} holds {', '.join(stores)}, and none is plainly the target: name one with --target.")
    if wishes.split_by is not None and wishes.split_by not in stores:
        raise errors.BadInput(f"{where}: " + unknown("column to split by", wishes.split_by, list(stores)))
    others = [name for name in stores if name not in (target, wishes.split_by)]
    guessed = inputs or next((name for name in INPUT_NAMES if name in others), None)
    if not all_inputs and guessed is not None:
        left_out += [f"array {name!r}: {guessed!r} is the input" for name in others if name != guessed]
        others = [guessed]
    if not others:
        raise errors.BadInput(f"{where} holds no array beside the target {target!r}: there is no input.")
    kept = {name: stores[name] for name in others}
    by = {} if wishes.split_by is None else {wishes.split_by: stores[wishes.split_by]}
    labels = None if target is None else (target, stores[target])
    return _assemble(kept, labels, wishes, fingerprint, where, roles, tuple(left_out), by)


def _join_roles(stores: dict[str, Store], where: str, left_out: list[str]) -> tuple[dict[str, Store], NDArray | None]:
    """`x_train, y_train, x_test, y_test` joined by role; arrays as they are where no name holds `train`."""
    by_role: dict[str, dict[str, Store]] = {}
    for name, store in stores.items():
        last, first = _ROLE_LAST.fullmatch(name), _ROLE_FIRST.fullmatch(name)
        if last or first:
            base, role = (last[1], last[2]) if last else (first[2], first[1])  # type: ignore[index]
            by_role.setdefault(ROLE_NAMES[role.lower()], {})[base] = store
    if "train" not in by_role:
        return stores, None
    roles = [role for role in ROLES if role in by_role]
    bases = list(by_role["train"])
    faults = [
        f"{where}: there is {base!r} for train and none for {role}: give each role the same arrays."
        for role in roles
        for base in bases
        if base not in by_role[role]
    ]
    refuse(faults or _unequal_parts(by_role, roles, where))
    named = sum(len(part) for part in by_role.values())
    if named < len(stores):
        known = {id(store) for part in by_role.values() for store in part.values()}
        left_out += [f"array {name!r}: its name holds no role" for name, store in stores.items() if id(store) not in known]
    joined: dict[str, Store] = {base: Joined([by_role[role][base] for role in roles]) for base in bases}
    return joined, np.repeat(np.array(roles), [len(by_role[role][bases[0]]) for role in roles])


def _unequal_parts(by_role: dict[str, dict[str, Store]], roles: list[str], where: str) -> list[str]:
    faults = []
    for role in roles:
        lengths = {base: len(store) for base, store in by_role[role].items()}
        if len(set(lengths.values())) > 1:
            faults.append(_unequal(lengths, f"{where}, {role}"))
        for base, store in by_role[role].items():
            if base in by_role["train"] and store.shape != by_role["train"][base].shape:
                faults.append(
                    f"{where}: rows of {base!r} have shape {store.shape} in {role}, {by_role['train'][base].shape} in train."
                )
    return faults


def _unequal(lengths: Mapping[str, int], where: str) -> str:
    return f"{where}: arrays differ in length: {', '.join(f'{name} {count:,}' for name, count in lengths.items())}. Each needs a row for each."


def _assemble(
    inputs: dict[str, Store],
    labels: tuple[str, Store] | None,
    wishes: Wishes,
    fingerprint: str,
    where: str,
    roles: NDArray | None,
    left_out: tuple[str, ...] = (),
    by: Mapping[str, Store] | None = None,
) -> StoredSource:
    every = {**inputs, **({} if labels is None else dict([labels])), **(by or {})}
    lengths = {name: len(store) for name, store in every.items()}
    faults = [_unequal(lengths, where)] if len(set(lengths.values())) > 1 else []
    faults += [f"{where}: {name!r} has 0 rows." for name, count in lengths.items() if count == 0]
    target: Target | None = None
    stores: dict[str, Store] = {}
    columns = []
    for name, store in inputs.items():
        found, column = _input_column(name, store, alone=len(inputs) == 1, faults=faults, where=where)
        stores[column.name] = found
        columns.append(column)
    if labels is not None and len(labels[1]):
        target, codes, found_faults = encode_target(labels[0], labels[1].take(np.arange(len(labels[1]))), where)
        faults += found_faults
        stores[target.name] = Memory(codes)
    refuse(faults)
    stores, columns, image_size = _fit_images(stores, columns, wishes.image_size)
    rows = len(stores[columns[0].name])
    return StoredSource(
        fingerprint=fingerprint,
        schema=Schema(inputs=tuple(columns), target=target),
        stores=stores,
        description=f"{rows:,} {_in_words(columns)} in {where}",
        left_out=left_out,
        image_size=image_size,
        given_roles=roles,
        extra={name: store.take(np.arange(rows)) for name, store in (by or {}).items()},
    )


def _in_words(columns: Sequence[Column]) -> str:
    shapes = ["x".join(map(str, column.shape)) or "1" for column in columns]
    return f"images of {shapes[0]}" if columns[0].kind == "image" else f"rows of {' and '.join(shapes)}"


def _input_column(name: str, store: Store, *, alone: bool, faults: list[str], where: str) -> tuple[Store, Column]:
    """A store as an input: images as [H, W, C], ids as int64, everything else as float32 or bytes."""
    layout = _image_layout(store)
    if layout is not None:
        # Beside other inputs a picture is an array whose channels come first, as a model expects them.
        order = (0, 1, 2, 3) if layout == "last" else (0, 2, 3, 1)
        axes = order if alone else tuple(order[i] for i in (0, 3, 1, 2))
        grey = len(store.shape) == 2
        changed = grey or axes != (0, 1, 2, 3)
        view = Viewed(store, lambda rows: (rows[..., None] if grey else rows).transpose(axes)) if changed else store
        if alone:
            return view, Column(name="image", kind="image", shape=view.shape, dtype="uint8")
        return view, Column(name=name, kind="array", shape=view.shape, dtype="uint8")
    kind = store.dtype.kind
    if kind not in "iufb":
        faults.append(
            f"{where}: {name!r} has type {store.dtype}; inputs must be numbers. Text and dates belong in a table (CSV, Parquet)."
        )
    elif kind == "f":
        faults += not_finite(name, store, where)
    dtype = "uint8" if store.dtype == np.uint8 else "int64" if kind in "iu" else "float32"
    one_value = not store.shape
    if kind in "iufb" and (one_value or store.dtype != dtype):
        store = Viewed(store, lambda rows: (rows[:, None] if one_value else rows).astype(dtype))
    return store, Column(name=name, kind="array", shape=store.shape, dtype=dtype)


def _image_layout(store: Store) -> str | None:
    """Where the channels of uint8 pictures are: "last" (or none, grey), "first", None for what is no picture."""
    if store.dtype != np.uint8 or len(store.shape) not in (2, 3):
        return None
    if len(store.shape) == 2 or store.shape[2] in (1, 3, 4):
        return "last"
    return "first" if store.shape[0] in (1, 3, 4) else None


def not_finite(name: str, store: Store, where: str) -> list[str]:
    """The fault of a store with NaN or infinite values; none where all are finite."""
    count, first = 0, ""
    for start, rows in blocks(store):
        bad = ~np.isfinite(rows)
        if bad.any():
            place = np.argwhere(bad)[0]
            first = first or str([int(place[0]) + start, *place[1:].tolist()])
            count += int(bad.sum())
    if not count:
        return []
    return [f"{where}: {name!r} has {count:,} NaN or infinite values, the first at {first}. Fill them in or remove those rows."]


def _fit_images(
    stores: dict[str, Store], columns: list[Column], side: int | None
) -> tuple[dict[str, Store], list[Column], int | None]:
    """Pictures resized and cropped to `side`, where one is asked for and they have another size."""
    column = columns[0]
    if side is None or column.kind != "image" or column.shape[:2] == (side, side):
        return stores, columns, None
    from delest.data.images import fit_pixels

    view = Viewed(stores[column.name], lambda rows: fit_pixels(rows, side))
    return {**stores, column.name: view}, [Column(name="image", kind="image", shape=view.shape, dtype="uint8")], side
