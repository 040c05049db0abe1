"""Who holds memory that grows: containers and tensors that the garbage collector sees, compared between two moments.

Arrays and tensors of any framework are known by their attributes. What C++ keeps, as the tensors that a graph saved, is
seen only through the Python objects that keep it.
"""

from __future__ import annotations

import gc
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import CellType, FrameType, FunctionType
from typing import Any

from delest.units import format_bytes

_CONTAINERS = (list, dict, set, deque)
_DEPTH = 4  # of holders of holders that are looked through for a name


@dataclass(frozen=True)
class Census:
    """Lengths of containers and bytes of tensors by `id`, at one moment."""

    lengths: Mapping[int, int]
    tensors: Mapping[int, int]


@dataclass(frozen=True)
class _Held:
    """What a container holds: arrays and tensors, the bytes that they keep, and whether they keep a graph."""

    count: int
    bytes: int
    graphs: bool


def census() -> Census:
    """What is alive now. Takes about 0.1 s for a million objects."""
    lengths, tensors = {}, {}
    for thing in gc.get_objects():
        if type(thing) in _CONTAINERS:
            lengths[id(thing)] = len(thing)
        elif _is_tensor(thing):
            tensors[id(thing)] = _storage(thing)[1]
    return Census(lengths, tensors)


def grown_since(before: Census, steps: int) -> str | None:
    """In words, what has grown with about every one of `steps` steps and where it is held; None where nothing has."""
    gc.collect()
    least = max(1, steps // 2)
    if (found := _fullest(before, least)) is not None:
        container, of = found
        words = f"a {type(container).__name__} of {of.count:,} tensors ({format_bytes(of.bytes)}) held by {_holder(container)}"
        return words + (", which keep the graphs of their steps: detach them" if of.graphs else "")
    tensors = [thing for thing in gc.get_objects() if _is_tensor(thing) and id(thing) not in before.tensors]
    if len(tensors) < least:
        return None
    total, count = sum(dict(map(_storage, tensors)).values()), len(tensors)
    largest = max(tensors, key=lambda thing: _storage(thing)[1])
    tensors.clear()  # it would be among the holders
    return f"{count:,} new tensors ({format_bytes(total)}), the largest held by {_holder(largest)}"


def _fullest(before: Census, least: int) -> tuple[Any, _Held] | None:
    """The container whose new items hold most, of those that got `least` or more with arrays or tensors in them."""
    best: tuple[Any, _Held] | None = None
    for thing in gc.get_objects():
        # A container that is new may be an old one that was copied with more in it.
        if type(thing) in _CONTAINERS and len(thing) - before.lengths.get(id(thing), 0) >= least:
            of = _held(thing)
            # One number that keeps the graph of its step weighs more than it shows.
            if of.count >= least and (best is None or (of.graphs, of.bytes) > (best[1].graphs, best[1].bytes)):
                best = thing, of
    return best


def _held(container: Any) -> _Held:
    count, graphs = 0, False
    storages: dict[int, int] = {}
    for leaf in _leaves(container, 2):
        count += 1
        graphs = graphs or getattr(leaf, "grad_fn", None) is not None
        where, size = _storage(leaf)
        storages[where] = size
    return _Held(count, sum(storages.values()), graphs)


def _leaves(value: Any, depth: int) -> Iterator[Any]:
    """The arrays and tensors in a container and in those inside it."""
    if isinstance(value, (list, tuple, set, deque, dict)):
        if depth >= 0:
            for item in list(value.values() if isinstance(value, dict) else value):
                yield from _leaves(item, depth - 1)
    elif hasattr(type(value), "nbytes"):
        yield value


def _is_tensor(value: Any) -> bool:
    return hasattr(type(value), "untyped_storage")


def _storage(value: Any) -> tuple[int, int]:
    """Where the memory lies that an array or tensor keeps, and its bytes: a view keeps the whole."""
    try:
        if hasattr(value, "fake_mode"):  # of a trace: shapes without memory
            return id(value), 0
        if _is_tensor(value):
            storage = value.untyped_storage()
            return storage.data_ptr(), storage.nbytes()
        while getattr(value, "base", None) is not None and hasattr(type(value.base), "nbytes"):
            value = value.base
        return id(value), int(value.nbytes)
    except (RuntimeError, NotImplementedError):  # sparse tensors have no storage of their own
        return id(value), 0


def _holder(thing: Any) -> str:
    """The name under which a thing is held, and the file: "`history` in train.py"."""
    own = {id(thing)}
    level = [thing]
    for _ in range(_DEPTH):
        above: list[Any] = []
        own |= {id(level), id(above)}
        for item in level:
            for referrer in gc.get_referrers(item):
                if id(referrer) in own or isinstance(referrer, FrameType):
                    continue
                name = _name(referrer, item)
                if name is not None:
                    return name
                own.add(id(referrer))
                above.append(referrer)
        level = above[:64]
    return "something without a name"


def _name(holder: Any, item: Any) -> str | None:
    """What `holder` calls an item that it refers to, where it is a module, a function or an object of a class."""
    if isinstance(holder, dict):
        key = next((key for key, value in list(holder.items()) if value is item), None)
        if "__name__" in holder and "__builtins__" in holder:
            return f"`{key}` in {_file(holder.get('__file__'), str(holder['__name__']))}"
        owner = next((one for one in gc.get_referrers(holder) if _attributes(one) is holder), None)
        return None if owner is None else _attribute(owner, key)
    if isinstance(holder, CellType):
        return next((name for closure in gc.get_referrers(holder) if (name := _free_name(closure, holder))), None)
    if isinstance(holder, tuple):
        functions = (one for one in gc.get_referrers(holder) if isinstance(one, FunctionType) and one.__defaults__ is holder)
        return next((f"a default of {one.__name__}() in {_file(one.__code__.co_filename, '')}" for one in functions), None)
    # Since Python 3.11 an object may hold its attributes without a dict.
    key = next((key for key, value in (_attributes(holder) or {}).items() if value is item), None)
    return None if key is None else _attribute(holder, key)


def _free_name(closure: Any, cell: CellType) -> str | None:
    """What the function of a closure calls the variable in one of its cells."""
    for function in gc.get_referrers(closure) if isinstance(closure, tuple) else ():
        if isinstance(function, FunctionType) and function.__closure__ is closure:
            code, place = function.__code__, next(number for number, one in enumerate(function.__closure__) if one is cell)
            return f"`{code.co_freevars[place]}` of {function.__qualname__}() in {_file(code.co_filename, '')}"
    return None


def _attributes(thing: Any) -> dict[str, Any] | None:
    if isinstance(thing, (type, FunctionType)) or type(thing).__dictoffset__ == 0:
        return None
    try:
        found = object.__getattribute__(thing, "__dict__")
    except AttributeError:
        return None
    return found if isinstance(found, dict) else None


def _attribute(owner: Any, key: Any) -> str:
    kind = type(owner)
    module = sys.modules.get(kind.__module__)
    return f"`{kind.__name__}.{key}` in {_file(getattr(module, '__file__', None), kind.__module__)}"


def _file(path: str | None, otherwise: str) -> str:
    return Path(path).name if path else otherwise
