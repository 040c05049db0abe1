"""The random states that user code may draw from: torch's, NumPy's and Python's."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Seed torch, NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


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
    np.random.set_state(("MT19937", arrays["numpy.keys"], int(position), int(has_gauss), cached))
    version, gauss = arrays["python.rest"].tolist()
    random.setstate((int(version), tuple(int(word) for word in arrays["python.state"]), None if gauss != gauss else gauss))
    cuda = [torch.from_numpy(np.array(arrays[name])) for name in sorted(arrays) if name.startswith("cuda.")]
    if cuda and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(cuda)
