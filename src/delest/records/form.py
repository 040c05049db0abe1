"""The JSON form of records: plain data with a `format` number, checked when read back."""

from __future__ import annotations

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
    """The JSON object of a record: its fields and `format`."""
    return {"format": FORMAT, **to_plain(record)}


def from_json(kind: type[T], data: dict[str, Any], where: str = "this file") -> T:
    """Build the record `kind` from its JSON object.

    Raises `BadInput` for a newer format, missing or wrongly typed fields (all named).
    """
    import pydantic

    data = dict(data)
    found = data.pop("format", FORMAT)
    if not isinstance(found, int) or found > FORMAT:
        raise errors.BadInput(
            f"{where} has format {found}, this delest reads up to {FORMAT}: a newer delest wrote it; upgrade delest to read it."
        )
    try:
        return pydantic.TypeAdapter(kind).validate_python(data)
    except pydantic.ValidationError as error:
        raise errors.BadInput(
            [f"{where}: {'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors()]
        ) from None


def read_json(kind: type[T], path: Path) -> T:
    """Read the record `kind` from a JSON file; `BadInput` names the file when it is missing or damaged."""
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise errors.BadInput(f"{path} does not exist.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise errors.BadInput(f"{path} is not valid JSON ({error}).") from None
    return from_json(kind, data, str(path))
