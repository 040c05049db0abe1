"""Named arrays in safetensors files, written from and read into memory piece by piece: neither needs room for a second copy of all.

A run saves and resumes under a limit on its memory. The safetensors package copies all arrays first, and hangs where an allocation of its
own fails. Format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from delest import errors

if TYPE_CHECKING:
    from numpy.typing import NDArray

_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "?",
}
_NAMES = {np.dtype(code): name for name, code in _DTYPES.items() if name != "BF16"}  # bf16 is told apart by who writes it
_LONGEST_HEADER = 100_000_000  # as the package has it


def write(file: BinaryIO, arrays: Mapping[str, NDArray], metadata: Mapping[str, str] | None = None) -> None:
    """Write arrays one after the other, the widest numbers first so that each is aligned. Each is asked for twice, and let go."""
    forms = {name: (array.dtype, array.shape, array.nbytes) for name, array in arrays.items()}
    names = sorted(forms, key=lambda name: (-forms[name][0].itemsize, name))
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        dtype, shape, size = forms[name]
        start, end = end, end + size
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        file.write(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)


class Arrays(Mapping[str, "NDArray"]):
    """The arrays of a file, each read when it is asked for; bf16 as uint16. The file stays open, also where it is replaced."""

    def __init__(self, path: Path):
        """Raises `BadInput` where the file is missing or damaged."""
        if not path.is_file():
            raise errors.BadInput(f"{path} does not exist: it should be a safetensors file with the model's weights.")
        self._file = open(path, "rb")  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        try:
            self._start, self._places = _read_header(self._file, path.stat().st_size)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise errors.BadInput(f"{path} is no intact safetensors file ({error}).") from None

    def __getitem__(self, name: str) -> NDArray:
        dtype, shape, offset = self._places[name]
        self._file.seek(self._start + offset)
        return np.fromfile(self._file, dtype, math.prod(shape)).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _read_header(file: BinaryIO, size: int) -> tuple[int, dict[str, tuple[np.dtype, tuple[int, ...], int]]]:
    """Where the arrays begin; of each its type, shape and offset from there."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
        raise ValueError("its header is cut off")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    places, end = {}, 0
    for name, entry in header.items():
        dtype, shape, (first, last) = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"]), entry["data_offsets"]
        if last - first != math.prod(shape) * dtype.itemsize or not 0 <= first <= last:
            raise ValueError(f"{name} does not have the size of its shape")
        places[name], end = (dtype, shape, first), max(end, last)
    if 8 + length + end != size:
        raise ValueError(f"it has {size} bytes instead of {8 + length + end}")
    return 8 + length, places


class Under(Mapping[str, "NDArray"]):
    """Those of some arrays whose names begin with a prefix, by what follows it."""

    def __init__(self, arrays: Mapping[str, NDArray], prefix: str):
        self._arrays, self._prefix = arrays, prefix

    def __getitem__(self, name: str) -> NDArray:
        return self._arrays[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._arrays if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return f"{self._prefix}{name}" in self._arrays
