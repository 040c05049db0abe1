"""What kernels take for themselves, call by call: each is run once on this machine, in a child process, and kept.

Kept in the user's cache by machine, instruction sets, torch version and threads, on all of which it depends.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from delest import errors, processes, storage
from delest.backends.torch import kernels
from delest.footprint.runtime import MAPPED
from delest.hardware import probes

# Operands of one call; larger ones are not run. Only convolutions and recurrent layers take much for themselves.
LARGEST_BYTES, LARGEST_LAYER_BYTES = 64 << 20, 512 << 20
_LAYERS = ("convolution", "rnn")


KERNELS = "delest.backends.torch.kernels:probe"


@contextlib.contextmanager
def soon() -> Iterator[Callable[[Iterable[str]], dict[str, dict[str, Any]]]]:
    """`scratch` for a caller that has work of its own before: the process in which calls are run first loads torch meanwhile."""
    with processes.prepare(KERNELS, None, environment=MAPPED) as running:
        yield functools.partial(scratch, loading=[running])


def scratch(signatures: Iterable[str], loading: list[processes.Running] | None = None) -> dict[str, dict[str, Any]]:
    """What each call takes: `scratch` bytes beyond its outputs, bytes of each of its `outputs`.

    Calls that are too large or cannot be run alone are left out. The process in `loading` is taken out of it and used first.
    """
    wanted = [text for text in dict.fromkeys(signatures) if text]
    key = probes.machine_key(torch.get_num_threads())
    known = _kept(key)
    missing = [text for text in wanted if text not in known and _is_small(text)]
    if missing:
        known = {**_kept(key), **_run_apart(missing, loading or [])}
        probes.keep("kernels", key, known)
    return {text: known[text] for text in wanted if known.get(text)}


def _is_small(text: str) -> bool:
    limit = LARGEST_LAYER_BYTES if any(layer in text for layer in _LAYERS) else LARGEST_BYTES
    return kernels.operand_bytes(text) <= limit


def _kept(key: list[Any]) -> dict[str, Any]:
    kept = probes.kept("kernels", key)
    return kept if isinstance(kept, dict) else {}


def _run_apart(signatures: list[str], loading: list[processes.Running]) -> dict[str, Any]:
    """Run calls in child processes. One that kills its process has no figure; the next child goes on behind it."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="delest-") as folder:
        path = Path(folder, "kernels.jsonl")
        while len(found) < len(signatures):
            left = [text for text in signatures if text not in found]
            with contextlib.suppress(errors.ProbeFailed):
                asked: dict[str, Any] = {"signatures": left, "threads": torch.get_num_threads(), "path": str(path)}
                if loading:
                    running = loading.pop()
                    running.give(asked)
                    running.answer()
                else:
                    processes.call(KERNELS, None, environment=MAPPED, **asked)
            found.update({row["call"]: row["took"] for row in storage.read_lines(path)})
            if len(found) < len(signatures):
                found[next(text for text in signatures if text not in found)] = None
    return found
