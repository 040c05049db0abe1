"""What is written down of the script's optimizers, models and loaders: names, settings and sizes, never the objects."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import delest_memory as memory


class OptimizerSeen:
    """One optimizer of the script, not kept alive by being watched."""

    def __init__(self, optimizer: Any):
        self.it: Callable[[], Any] = weakref.ref(optimizer)
        self.steps = 0
        self.began = self.seconds = self.closure_seconds = 0.0
        self.timed = 0
        self.facts: dict[str, Any] = {}

    def look(self, sizes: dict[int, int]) -> None:
        """Write down its class, settings and the bytes it is responsible for; `sizes` gets its parameters by identity."""
        optimizer: Any = self.it()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        sizes.update((id(parameter), memory.tensor_bytes(parameter)) for parameter in parameters)
        group = optimizer.param_groups[0]
        settings = ("foreach", "fused", "momentum", "amsgrad")
        self.facts = {
            "name": type(optimizer).__name__,
            "settings": {name: group[name] for name in settings if isinstance(group.get(name), (bool, int, float))},
            "devices": sorted({parameter.device.type for parameter in parameters}),
            "dtypes": sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters}),
            "parameters": sum(parameter.numel() for parameter in parameters),
            "parameter_bytes": sum(memory.tensor_bytes(parameter) for parameter in parameters),
            "gradient_bytes": gradient_bytes(parameters),
            "state_bytes": sum(map(memory.tensor_bytes, memory.tensors_in(dict(optimizer.state)))),
        }


def gradient_bytes(parameters: list[Any]) -> int:
    return sum(memory.tensor_bytes(parameter.grad) for parameter in parameters if parameter.grad is not None)


def describe_root(module: Any, modules: list[Any], parameters: list[Any]) -> dict[str, Any]:
    """Of a module that the script itself calls. Attributes of the user's objects may be properties that warn or compute, so
    none is read."""
    names = {type(part).__name__ for part in modules}
    return {
        "name": type(module).__name__,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "buffer_bytes": sum(memory.tensor_bytes(buffer) for buffer in module.buffers()),
        "leaves": sum(next(part.children(), None) is None for part in modules),
        "batch_statistics": any("BatchNorm" in name for name in names),
        "can_checkpoint": any(hasattr(type(part), "gradient_checkpointing_enable") for part in modules),
        "checkpoints": any(part.__dict__.get("gradient_checkpointing") is True for part in modules),
        "compiled": "OptimizedModule" in names,
    }


def describe_loader(iterator: Any) -> dict[str, Any]:
    """Of a DataLoader, before anything was drawn from it."""
    return {
        "dataset": type(iterator._dataset).__name__,
        "workers": iterator._num_workers,
        "batches": 0,
        "rows": 0,
        "bytes": 0,
        "dtypes": [],
    }
