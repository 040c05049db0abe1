"""What an operator's kernel takes for itself, which fake tensors cannot show: a call is written down and run alone.

Convolutions of oneDNN copy operands into blocked layouts, recurrent layers have workspaces of a size only the library knows,
reductions and attention keep one buffer a thread. A call is known by its operator and the shapes, strides and formats of its
operands (`signature`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from delest import storage

_PLAIN = (  # nothing beyond their outputs
    "empty", "zeros", "ones", "full", "arange", "copy_", "_to_copy", "clone", "fill_", "zero_", "_foreach", "_fused_",
    "lift_fresh", "scalar_tensor", "new_", "normal", "uniform", "bernoulli", "native_dropout", "_local_scalar_dense",
    "_unsafe_view", "as_strided_", "rand", "tril", "triu",
)  # fmt: skip
_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)  # in fp32 their buffers are the library's own


def signature(func: Any, args: Any, kwargs: Any) -> str:
    """The call as JSON that `probe` can repeat, "" for operators that need no probe (views, elementwise, copies)."""
    if not _is_opaque(func) or (func in _PRODUCTS and args[-1].dtype == torch.float32):
        return ""
    try:
        return json.dumps(
            [str(func), [_plain(value) for value in args], {name: _plain(value) for name, value in kwargs.items()}]
        )
    except TypeError:
        return ""


_opaque: dict[Any, bool] = {}


def _is_opaque(func: Any) -> bool:
    known = _opaque.get(func)
    if known is None:
        name = str(func).split(".")[1]
        known = not (func.is_view or torch.Tag.pointwise in func.tags or name.startswith(_PLAIN)) and func.namespace == "aten"
        _opaque[func] = known
    return known


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.layout != torch.strided:
            raise TypeError(f"a {value.layout} tensor")
        return {"dtype": str(value.dtype)[6:], "size": list(value.shape), "stride": list(value.stride())}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, torch.dtype):
        return {"torch": str(value)[6:]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (torch.memory_format, torch.layout)):
        return {"torch": str(value)[6:]}
    if isinstance(value, torch.device):
        return None
    raise TypeError(type(value).__name__)


def between(small: str, large: str, rows: tuple[int, int], wanted: int) -> str | None:
    """The signature that a call has at `wanted` rows, from those at two other numbers of rows; None where sizes do not
    grow in proportion."""
    try:
        return json.dumps(_between(json.loads(small), json.loads(large), rows, wanted))
    except ValueError:
        return None


def _between(small: Any, large: Any, rows: tuple[int, int], wanted: int) -> Any:
    if type(small) is not type(large):
        raise ValueError
    if isinstance(small, dict):
        return {name: _between(value, large[name], rows, wanted) for name, value in small.items()}
    if isinstance(small, list):
        if len(small) != len(large):
            raise ValueError
        return [_between(a, b, rows, wanted) for a, b in zip(small, large, strict=True)]
    if small == large or isinstance(small, (bool, str, float)):
        return small
    each, rest = divmod(large - small, rows[1] - rows[0])
    if rest:
        raise ValueError
    return small + each * (wanted - rows[0])


# Running them


def operand_bytes(text: str) -> int:
    """Bytes of all tensors that a call is given."""
    found = 0
    stack = [json.loads(text)[1:]]
    while stack:
        item = stack.pop()
        if isinstance(item, dict) and "size" in item:
            found += _extent(item) * getattr(torch, item["dtype"]).itemsize
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
    return found


def _extent(tensor: dict[str, Any]) -> int:
    if 0 in tensor["size"]:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor["size"], tensor["stride"], strict=True))


def probe(signatures: Sequence[str], threads: int, path: str) -> None:
    """Run each call on zeros and write what it took, line by line: a call may end the process. Runs in a child process."""
    torch.set_num_threads(threads)
    with torch.no_grad():
        for text in signatures:
            try:
                took = _watch(text)
            except Exception:  # not every call can be repeated on zeros; it then has no figure
                took = None
            storage.append_line(Path(path), {"call": text, "took": took})


def _watch(text: str) -> dict[str, Any]:
    """Bytes that one call takes beyond its outputs, and of its outputs, from the allocator's own events."""
    name, args, kwargs = json.loads(text)
    _, packet, overload = name.split(".")
    func = getattr(getattr(torch.ops.aten, packet), overload)
    given, named = [_real(value) for value in args], {key: _real(value) for key, value in kwargs.items()}
    if packet == "mkldnn_rnn_layer_backward":
        given[-1] = _recurrent_workspace(given)
    with torch.enable_grad():  # where nothing could need a gradient, recurrent layers make no workspace
        func(*given, **named)  # the first call also builds the kernel
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            outputs = func(*given, **named)
    live = highest = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            highest = max(highest, live)
    made = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    sizes = [_held_bytes(tensor) for tensor in made]
    took: dict[str, Any] = {"scratch": highest - max(0, live), "outputs": sizes}
    if packet == "mkldnn_rnn_layer" and sizes[-1] >= 1 << 20:
        del outputs, made
        took["touched"] = _touched_share(lambda: func(*given, **named), sizes[-1])
    return took


def _touched_share(call: Callable[[], Any], size: int) -> float:
    """How much of a call's last output it has written: what the resident set loses when that is freed. Mapped blocks alone
    go back to the system at once."""
    with torch.enable_grad():
        *others, last = call()
    before = _resident_bytes()
    del last
    return min(1.0, max(0.0, (before - _resident_bytes()) / size))


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _held_bytes(tensor: Any) -> int:
    """Bytes behind a tensor; those of oneDNN's own tensors are not told."""
    try:
        return tensor.untyped_storage().nbytes() if isinstance(tensor, Tensor) else 0
    except NotImplementedError:
        return 0


def _recurrent_workspace(given: list[Any]) -> Tensor:
    """What the forward pass leaves to the backward pass; fake tensors do not know its size, and without it the kernel crashes."""
    inputs, weights, (hidden, cell) = given[0], given[1:5], given[5:7]
    reverse, mode, hidden_size, layers, biases, train, both, sizes, batch_first = given[13:22]
    forward = torch.ops.aten.mkldnn_rnn_layer.default
    with torch.enable_grad():
        return forward(
            inputs, *weights, hidden, cell, reverse, sizes, mode, hidden_size, layers, biases, both, batch_first, train
        )[3]


def _real(value: Any) -> Any:
    if isinstance(value, dict) and "size" in value:
        dtype = getattr(torch, value["dtype"])
        return torch.empty_strided(value["size"], value["stride"], dtype=dtype).zero_()
    if isinstance(value, dict):
        return getattr(torch, value["torch"])
    if isinstance(value, list):
        return [_real(item) for item in value]
    return value
