"""Writing a bundle: all of it or nothing."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from onnx import helper

import delest
from delest import storage
from delest.bundle.graph import assemble, head
from delest.records.form import to_plain

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from delest.data import Preprocessing

_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_HERE = -100  # AT_FDCWD


def write_bundle(
    folder: Path,
    network: Path,
    preprocessing: Preprocessing,
    *,
    name: str,
    metric: str,
    weights: Mapping[str, NDArray] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write `model.onnx`, `labels.json` (of a text its vocabulary), `tokenizer.json` (of a text whose tokens are no characters),
    `weights.safetensors` (where given) and `bundle.json` as `folder`.

    `network` is the bare network as ONNX; preprocessing and probabilities are put around it. `extra` goes into
    `bundle.json` as it is. An existing folder is replaced in one step; a crash leaves the old one or the new one.

    Raises `DiskFull`; the old folder then stays.
    """
    bare = onnx.load(network)
    model = assemble(bare, preprocessing)
    schema = preprocessing.schema
    labels = list(schema.classes) if schema.classes is not None else None
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        storage.write_atomic(temporary / "model.onnx", model.SerializeToString())
        storage.write_json(temporary / "labels.json", {"labels": labels})
        if schema.inputs[0].tokenizer is not None:
            storage.write_atomic(temporary / "tokenizer.json", schema.inputs[0].tokenizer)
        if weights is not None:
            from safetensors.numpy import save

            storage.write_atomic(temporary / "weights.safetensors", save(dict(weights)))
        description = {
            **to_plain(dict(extra or {})),
            "delest": delest.__version__,
            "name": name,
            "metric": metric,
            "inputs": [_describe(value) for value in model.graph.input],
            "outputs": [_describe(value) for value in model.graph.output],
            "head": head(bare, schema),
            "labels": labels,
            "preprocessing": to_plain(preprocessing),
            "files": {path.name: storage.checksum(path) for path in sorted(temporary.iterdir())},
        }
        storage.write_json(temporary / "bundle.json", description)
        replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(new: Path, old: Path) -> None:
    """Move the folder `new` to where `old` is or would be; what was there is removed afterwards.

    Both must be on one file system. The exchange is one step on Linux; where the file system has no exchange, two renames.
    """
    if not old.exists():
        os.rename(new, old)
    elif _exchange(new, old):
        shutil.rmtree(new)
    else:
        aside = old.with_name(f".{old.name}.{os.getpid()}.old")
        os.rename(old, aside)
        os.rename(new, old)
        shutil.rmtree(aside)
    storage.sync_folder(old.parent)


def _exchange(new: Path, old: Path) -> bool:
    """Swap two folders in one step; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_HERE, os.fsencode(new), _HERE, os.fsencode(old), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(old))


def _describe(value: onnx.ValueInfoProto) -> dict[str, Any]:
    """Name, dtype and shape of an input or output; a dimension that varies is named."""
    tensor = value.type.tensor_type
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    return {
        "name": value.name,
        "dtype": "string" if dtype.kind == "O" else str(dtype),
        "shape": [dimension.dim_param or dimension.dim_value for dimension in tensor.shape.dim],
    }
