"""Files that a bundle is asked about: pictures, arrays and tables become the raw inputs that its graph takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from delest import errors
from delest.bundle.graph import input_name
from delest.bundle.texts import predict_texts
from delest.data.targets import refuse

if TYPE_CHECKING:
    import polars
    from numpy.typing import NDArray

    from delest.bundle.model import Model
    from delest.records.source import Column, Schema

    Raw = tuple[list[str], dict[str, NDArray]]  # a name a row, inputs by name

_ROWS = 64  # of a batch: pictures are large


def predict_rows(model: Model, paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Answers for every row of the files: `input` with `label` and `probability`, with `value`, or with `outputs` (lists) where
    the job's outputs are neither; for texts as `texts.predict_texts` says.

    Raises `BadInput` naming all files, columns and values that cannot be used.
    """
    if model.description["head"] == "logits":
        return predict_texts(model, _listed(paths, model.preprocessing.schema))
    return [answer for names, raw in read_inputs(model, paths) for answer in _answers(model, names, model.predict(raw))]


def read_inputs(model: Model, paths: Sequence[Path]) -> Iterator[Raw]:
    """Names of the rows and raw inputs, batch by batch, of files and folders of pictures.

    A picture is named by its path, a row of another file by `file:row`, counted from 0. Pictures are fitted to the bundle's
    size by the function that training uses.

    Raises `BadInput` naming all files, columns and values that cannot be used: before the first batch where the files say so
    at a glance, after the last for pictures that turn out to be damaged.
    """
    schema = model.preprocessing.schema
    files = _listed(paths, schema)
    if schema.is_table:
        yield from _read_tables(schema, files)
        return
    arrays = [file for file in files if _is_arrays(file)]
    if schema.is_image:
        yield from _read_pictures(model, [file for file in files if not _is_arrays(file)])
    yield from _read_arrays(model, arrays)


def _answers(model: Model, names: list[str], given: Any) -> list[dict[str, Any]]:
    head = model.description["head"]
    if head == "value":
        return [{"input": name, "value": float(value)} for name, value in zip(names, given, strict=True)]
    if head == "none":
        parts = given if isinstance(given, tuple) else (given,)
        return [{"input": name, "outputs": [part[row].tolist() for part in parts]} for row, name in enumerate(names)]
    best = given.argmax(1)
    labels = model.labels or []
    return [
        {"input": name, "label": labels[choice], "probability": float(row[choice])}
        for name, row, choice in zip(names, given, best.tolist(), strict=True)
    ]


def _listed(paths: Sequence[Path], schema: Schema) -> list[Path]:
    """The files that paths stand for. Raises `BadInput` where one does not exist or is of another kind than the bundle takes."""
    refuse([f"{path} does not exist (looked in {Path.cwd()})." for path in paths if not path.exists()])
    if not paths:
        raise errors.BadInput(f"nothing to predict: name {_wanted(schema)}.")
    faults: list[str] = []
    files = [file for path in paths for file in _files(path, schema, faults)]
    refuse(faults)
    return files


def _wanted(schema: Schema) -> str:
    """What kind of file this bundle can be asked about, in words."""
    if schema.is_text:
        return "a text file (UTF-8)"
    if schema.is_table:
        return "a CSV or Parquet file with its columns"
    return "an image, a folder of images, or a .npy or .npz file" if schema.is_image else "a .npy or .npz file"


def _is_arrays(file: Path) -> bool:
    return file.suffix.lower() in (".npy", ".npz")


def _files(path: Path, schema: Schema, faults: list[str]) -> list[Path]:
    """The files that a path stands for; a file of another kind than the bundle takes is a fault."""
    from delest.data.encoded import SUFFIXES
    from delest.data.tables import CSV_SUFFIXES

    if path.is_dir() and schema.is_image:
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and not file.name.startswith("."))
        if not found:
            faults.append(f"{path} holds no images ({', '.join(SUFFIXES)}).")
        return found
    name = path.name.lower()
    if schema.is_text:
        fits = not _is_arrays(path)
    else:
        fits = name.endswith((*CSV_SUFFIXES, ".parquet")) if schema.is_table else _is_arrays(path) or schema.is_image
    if path.is_dir() or not fits:
        faults.append(f"{path} is of another kind than this model takes: name {_wanted(schema)}.")
    return [path]


# Pictures


def _read_pictures(model: Model, files: Sequence[Path]) -> Iterator[Raw]:
    from PIL import Image

    from delest.data.images import decode, fit

    height, width, channels = model.preprocessing.schema.inputs[0].shape
    faults: list[str] = []
    for start in range(0, len(files), _ROWS):
        names, pictures = [], []
        for file in files[start : start + _ROWS]:
            try:
                image = decode(file, channels)
            except (OSError, ValueError, SyntaxError, IndexError, Image.DecompressionBombError) as error:
                faults.append(f"{file} cannot be read as an image ({error}). Replace it or leave it out.")
                continue
            pixels = fit(image, height) if height == width else fit(image, None)
            if pixels.shape != (height, width, channels):
                faults.append(
                    f"{file} is {pixels.shape[1]} x {pixels.shape[0]} pixels, the model takes {width} x {height}: resize it."
                )
                continue
            names.append(str(file))
            pictures.append(pixels)
        if names:
            yield names, {"image": np.stack(pictures)}
    refuse(faults)


# Arrays


def _read_arrays(model: Model, files: Sequence[Path]) -> Iterator[Raw]:
    schema = model.preprocessing.schema
    faults: list[str] = []
    opened = [(file, _open_arrays(file, schema, model.preprocessing.image_size is not None, faults)) for file in files]
    refuse(faults)
    for file, arrays in opened:
        rows = min(len(array) for array in arrays.values())
        for start in range(0, rows, _ROWS):
            raw = {name: np.ascontiguousarray(array[start : start + _ROWS]) for name, array in arrays.items()}
            yield [f"{file}:{row}" for row in range(start, min(start + _ROWS, rows))], raw


def _open_arrays(file: Path, schema: Schema, any_size: bool, faults: list[str]) -> dict[str, NDArray]:
    """The bundle's inputs from a file, [N, ...] each; what is missing or does not fit becomes a fault."""
    from delest.data.arrays import INPUT_NAMES, not_finite
    from delest.data.stored import Memory

    try:
        loaded = np.load(file, mmap_mode="r", allow_pickle=False)
        held = {"": loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
    except (ValueError, OSError, EOFError) as error:
        faults.append(f"{file} cannot be read as arrays ({error}).")
        return {}
    arrays: dict[str, NDArray] = {}
    for column in schema.inputs:
        names = [
            column.name,
            *(INPUT_NAMES if len(schema.inputs) == 1 else ()),
            *(held if len(held) == 1 == len(schema.inputs) else ()),
        ]
        found_name = next((name for name in names if name in held), None)
        if found_name is None:
            faults.append(f"{file} holds {', '.join(held)}; the array {column.name!r} is missing.")
            continue
        array = _in_layout(held[found_name], column)
        fault = _misfit(array, column, any_size)
        if fault:
            faults.append(f"{file}: {fault}")
        elif not len(array):
            faults.append(_no_rows(file))
        elif array.dtype.kind == "f":
            faults += not_finite(found_name, Memory(array), str(file))
        arrays[input_name(column)] = array
    if len({len(array) for array in arrays.values()}) > 1:
        faults.append(
            f"{file}: arrays differ in length: {', '.join(f'{name} {len(array):,}' for name, array in arrays.items())}."
        )
    return arrays


def _no_rows(file: Path) -> str:
    return f"{file} holds no rows: there is nothing to predict."


def _in_layout(array: NDArray, column: Column) -> NDArray:
    """Grey pictures get their channel, channels come last, single values [N] become [N, 1]."""
    if column.kind == "image":
        channels = column.shape[2]
        if array.ndim == 3 and channels == 1:
            return array[..., None]
        if array.ndim == 4 and array.shape[3] != channels and array.shape[1] == channels:
            return array.transpose(0, 2, 3, 1)
    elif column.shape == (1,) and array.ndim == 1:
        return array[:, None]
    return array


def _misfit(array: NDArray, column: Column, any_size: bool) -> str | None:
    """Why an array cannot be this input, None where it can."""
    is_image = column.kind == "image"
    shape = array.shape[3:] if is_image and any_size and array.ndim == 4 else array.shape[1:]
    if shape != (column.shape[2:] if shape != array.shape[1:] else column.shape):
        wanted = "x".join(map(str, column.shape)) or "1"
        return f"rows of {'x'.join(map(str, array.shape[1:])) or '1'}, the model takes {wanted}."
    if is_image and array.dtype != np.uint8:
        return f"pixels are {array.dtype}, the model takes them as they are stored: uint8, 0 to 255."
    kinds = "iub" if column.dtype == "int64" else "iubf"
    if array.dtype.kind not in kinds:
        return f"values are {array.dtype}, the model takes {column.dtype}."
    return None


# Tables


def _read_tables(schema: Schema, files: Sequence[Path]) -> Iterator[Raw]:
    faults: list[str] = []
    read = [(file, _read_table(file, schema, faults)) for file in files]
    refuse(faults)
    for file, columns in read:
        rows = len(next(iter(columns.values())))
        for start in range(0, rows, _ROWS * 64):
            raw = {name: values[start : start + _ROWS * 64] for name, values in columns.items()}
            yield [f"{file}:{row}" for row in range(start, min(start + _ROWS * 64, rows))], raw


def _read_table(file: Path, schema: Schema, faults: list[str]) -> dict[str, NDArray]:
    """The bundle's columns [N]: float64 with NaN for missing, text with "" for missing."""
    import polars

    from delest.data.tables import read_frame, separator, with_point

    try:
        # As text: this file alone must not decide that a column of codes such as "007" holds numbers.
        frame = read_frame(file, as_text=True)
    except (polars.exceptions.PolarsError, OSError, UnicodeDecodeError) as error:
        faults.append(f"{file} cannot be read as a table: {str(error).splitlines()[0]}")
        return {}
    missing = [column.name for column in schema.inputs if column.name not in frame.columns]
    if missing:
        faults.append(
            f"{file}: columns missing: {', '.join(map(repr, missing))}; it has {', '.join(map(repr, frame.columns))}."
        )
    if not len(frame):
        faults.append(_no_rows(file))
    read_numbers = with_point if file.suffix != ".parquet" and separator(file) == ";" else _with_floats
    return {
        input_name(column): _numbers(frame[column.name], read_numbers, file, faults)
        if column.kind == "number"
        else _texts(frame[column.name], column)
        for column in schema.inputs
        if column.name in frame.columns
    }


def _with_floats(series: polars.Series) -> polars.Series:
    import polars

    return series.cast(polars.Float64, strict=False)


def _numbers(series: polars.Series, read: Callable[[polars.Series], polars.Series], file: Path, faults: list[str]) -> NDArray:
    values = read(series)
    wrong = series.is_not_null() & (values.is_null() | values.is_infinite())
    if wrong.any():
        row = int(wrong.arg_max() or 0)
        faults.append(
            f"{file}: column {series.name!r} holds numbers in training, and {int(wrong.sum()):,} values here are none: "
            f"row {row} has {series[row]!r}. Correct them, or leave them empty where unknown."
        )
    return values.to_numpy()


def _texts(series: polars.Series, column: Column) -> NDArray:
    import polars

    texts = series.cast(polars.String).fill_null("")
    if set(column.categories or ()) <= {"true", "false"}:  # truth values are read in any spelling in training
        texts = texts.str.to_lowercase()
    return texts.to_numpy().astype(object)
