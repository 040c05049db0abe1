"""Torch's optimizers without its compiler, where nothing is compiled.

Building a torch optimizer, and each step's wrapper, import torch._dynamo only to tell the compiler what to leave alone:
1.7 s and 100 MB of every process with torch 2.13 (docs/log.md). Here the methods concerned are marked beforehand and the
step inside the wrapper is called, so that the arithmetic is the same and the compiler stays on disk. Where torch is built
otherwise than expected, or the compiler is loaded already, everything is left as it is.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint

_WRAPPER = torch._disable_dynamo(lambda: None).__code__


def spare_the_compiler() -> None:
    """Let optimizers be built without importing torch._dynamo."""
    if "torch._dynamo" in sys.modules:
        return
    for method in vars(torch.optim.Optimizer).values():
        function = getattr(method, "__wrapped__", None)
        # torch._compile._disable_dynamo keeps what it will call under this name, on the function that it wraps.
        if function is not None and getattr(method, "__code__", None) is _WRAPPER and not hasattr(function, "__dynamo_disable"):
            function.__dynamo_disable = function


class _Later:
    """Stands for a module that is imported when something is asked of it that `known` does not answer."""

    def __init__(self, name: str, **known: Any):
        self.__dict__["_name"], self.__dict__["_known"] = name, known

    def __getattr__(self, attribute: str) -> Any:
        if attribute in self._known and self._name not in sys.modules:
            return self._known[attribute]
        return getattr(importlib.import_module(self._name), attribute)


def spare_the_compiler_when_checkpointing() -> None:
    """Let torch.utils.checkpoint run without importing torch._dynamo, of which it takes a setting and a decorator."""
    if "torch._dynamo" in sys.modules:
        return
    function = getattr(getattr(torch.utils.checkpoint, "_run_fn_with_dynamo_disabled", None), "__wrapped__", None)
    if function is not None and not hasattr(function, "__dynamo_disable"):
        function.__dynamo_disable = function
    config = _Later("torch._dynamo.config", error_on_nested_fx_trace=True)
    vars(torch).setdefault("_dynamo", _Later("torch._dynamo", config=config, disable=lambda function: function))


def bare_step(optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """The optimizer's step without the wrappers for hooks, profiler and compiler; without gradients, as the wrappers set it."""
    step = inspect.unwrap(type(optimizer).step)
    if optimizer.defaults.get("differentiable") or list(inspect.signature(step).parameters)[:1] != ["self"]:
        return optimizer.step

    def call() -> None:
        with torch.no_grad():
            step(optimizer)

    return call
