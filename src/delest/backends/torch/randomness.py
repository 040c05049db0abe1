"""The random states that user code may draw from: torch's, NumPy's and Python's."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Seed torch, NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def hold() -> Callable[[], None]:
    """Note all random states, and give the function that brings them back: what every guarded step pays, so nothing is converted."""
    ours, pythons, numpys = torch.get_rng_state(), random.getstate(), _numpy_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def back() -> None:
        torch.set_rng_state(ours)
        random.setstate(pythons)
        _set_numpy_state(numpys)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)

    return back


def _numpy_state() -> Any:
    """NumPy's state, which NumPy collects word by word: that of the last time where the generator's memory is the same. It does not show
    whether one of a pair of normal numbers is left; after a state that had none, that would take a draw, or a state that was set."""
    global _last
    generator = np.random.get_bit_generator()  # type: ignore[attr-defined]  # public, and left out of its stubs
    if not isinstance(generator, np.random.MT19937):
        return np.random.get_state(legacy=False)
    words = ctypes.string_at(generator.ctypes.state_address, _MT19937_BYTES)
    if _last is None or _last[0] != words or _last[1]["has_gauss"]:
        _last = words, np.random.get_state(legacy=False)
    return _last[1]


def _set_numpy_state(state: Any) -> None:
    global _last
    np.random.set_state(state)
    _last = None


_MT19937_BYTES = 4 * (624 + 1)  # of its state: 624 words and the position in them
_last: tuple[bytes, Any] | None = None


def capture() -> dict[str, Any]:
    """All random states as named arrays."""
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    arrays: dict[str, Any] = {
        "torch": torch.get_rng_state().numpy(),
        "numpy.keys": np.asarray(keys),
        "numpy.rest": np.array([position, has_gauss, cached], dtype=np.float64),
        "python.state": np.array(internal, dtype=np.uint64),
        "python.rest": np.array([version, np.nan if gauss is None else gauss], dtype=np.float64),
    }
    if torch.cuda.is_available():
        for number, state in enumerate(torch.cuda.get_rng_state_all()):
            arrays[f"cuda.{number}"] = state.numpy()
    return arrays


def restore(arrays: dict[str, Any]) -> None:
    """Set the random states that `capture` gave."""
    torch.set_rng_state(torch.from_numpy(np.array(arrays["torch"])))
    position, has_gauss, cached = arrays["numpy.rest"].tolist()
    _set_numpy_state(("MT19937", arrays["numpy.keys"], int(position), int(has_gauss), cached))
    version, gauss = arrays["python.rest"].tolist()
    random.setstate((int(version), tuple(int(word) for word in arrays["python.state"]), None if gauss != gauss else gauss))
    cuda = [torch.from_numpy(np.array(arrays[name])) for name in sorted(arrays) if name.startswith("cuda.")]
    if cuda and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(cuda)
