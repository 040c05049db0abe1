"""The JSON form of records: plain data with a `format` number, checked when read back."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any, TypeVar

from delest import errors

FORMAT = 1
T = TypeVar("T")


def to_plain(value: Any) -> Any:
    """JSON-ready data of a record, mapping, sequence, path or NumPy scalar. Non-finite floats become None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and not isinstance(value, (str, bytes)) and getattr(value, "ndim", None) == 0:
        value = value.item()
    elif hasattr(value, "tolist"):
        return to_plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def to_json(record: Any) -> dict[str, Any]:
    """The JSON object of a record or mapping: its fields and `format`."""
    return {"format": FORMAT, **to_plain(record)}


def from_json(kind: type[T], data: dict[str, Any], where: str = "this file") -> T:
    """Build the record `kind` from its JSON object; null where a float belongs becomes NaN again.

    Raises `BadInput` for a newer format, missing or wrongly typed fields (all named).
    """
    import pydantic

    data = without_format(data, where)
    adapter = pydantic.TypeAdapter(kind)
    try:
        return adapter.validate_python(data)
    except pydantic.ValidationError as error:
        faults = error.errors()
    nulls = [fault["loc"] for fault in faults if fault["type"] == "float_type" and fault["input"] is None]
    if len(nulls) == len(faults):
        return adapter.validate_python(_with_nan(data, nulls))
    raise errors.BadInput(
        [f"{where}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in faults if fault["loc"] not in nulls]
    )


def read_json(kind: type[T], path: Path) -> T:
    """Read the record `kind` from a JSON file; `BadInput` names the file when it is missing or damaged."""
    return from_json(kind, read_object(path), str(path))


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file; `BadInput` names the file where it is missing, damaged or of a newer format."""
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise errors.BadInput(f"{path} does not exist.") from None
    except OSError as error:
        raise errors.BadInput(f"{path} cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise errors.BadInput(f"{path} is not valid JSON ({error}).") from None
    return without_format(data, str(path))


def without_format(data: Any, where: str) -> dict[str, Any]:
    """A JSON object without its `format`. Raises `BadInput` where it is no object or its format is a newer one."""
    if not isinstance(data, dict):
        raise errors.BadInput(f"{where} holds a JSON {type(data).__name__}, not an object.")
    found = data.get("format", FORMAT)
    if not isinstance(found, int) or found > FORMAT:
        raise errors.BadInput(
            f"{where} has format {found}, this delest reads up to {FORMAT}: a newer delest wrote it; upgrade delest to read it."
        )
    return {key: value for key, value in data.items() if key != "format"}


def _with_nan(data: dict[str, Any], places: list[tuple[int | str, ...]]) -> dict[str, Any]:
    """A copy of JSON data with NaN at these places."""
    copied: Any = copy.deepcopy(data)
    for *outer, last in places:
        inner = copied
        for key in outer:
            inner = inner[key]
        inner[last] = math.nan
    return copied
