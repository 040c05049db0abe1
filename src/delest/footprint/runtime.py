"""What a warm idle process holds before there is any model: Python, torch and its libraries."""

from __future__ import annotations

import ctypes
import gc
from typing import Any

import torch
from torch import nn

from delest import processes
from delest.hardware import machine, probes


def runtime_bytes(threads: int) -> int:
    """Resident bytes of a process that has imported torch and has made two tiny steps; measured once a machine and kept."""
    key = probes.machine_key(threads)
    kept = probes.kept("runtime", key)
    if not isinstance(kept, dict):
        kept = processes.call(f"{__name__}:measure", None, threads=threads)
        probes.keep("runtime", key, kept)
    return int(kept["bytes"])


def measure(threads: int) -> dict[str, Any]:
    """In a process of its own: two steps of a small network with the usual kinds of layers, all given back."""
    torch.set_num_threads(threads)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 10))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.zeros(4, 3, 8, 8)), torch.zeros(4, dtype=torch.int64)).backward()
        optimizer.step()
    del model, optimizer
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return {"bytes": machine.resident_bytes()}
