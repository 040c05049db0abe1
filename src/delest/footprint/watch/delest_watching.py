"""Watches a training script from inside its process, through hooks that torch offers to everybody, and writes down what it saw.

Nothing here computes on a tensor, draws a random number or waits for a device. A fault of the watching becomes a note in the
report and the script goes on. Only raw figures are written; what they mean is worked out by `delest.footprint.script`.
"""

from __future__ import annotations

import atexit
import collections
import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import delest_memory as memory
import torch
from delest_seen import OptimizerSeen, describe_loader, describe_root, gradient_bytes
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data.dataloader import _BaseDataLoaderIter

WARM_UP = 2  # steps before the peak counts as steady: optimizers make their state in the first
SAMPLED = range(2, 6)  # steps after which the allocator is read, once more before the backward pass that follows
TIMELINE_AFTER = 6
KEPT = 1000  # intervals between steps that are remembered
WRITE_SECONDS = 2.0
READ_EACH = 20  # steps up to which the peak is read after each
MOST_ROOTS = 8
MOST_NOTES = 20

clock = time.perf_counter


def begin(folder: str, timeline: bool = False) -> None:
    """Register all hooks; reports go to `folder`."""
    watcher = Watcher(folder, timeline)
    _wrap_loaders(watcher)
    _wrap_backward(watcher)
    register_optimizer_step_pre_hook(watcher.before_step)
    register_optimizer_step_post_hook(watcher.after_step)
    watcher.look_for_roots()
    atexit.register(watcher.finish)
    os.register_at_fork(after_in_child=watcher.stop)  # a forked worker is not the script


def guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that notes its own failure instead of letting it reach the script."""

    @functools.wraps(method)
    def call(self: Watcher, *given: Any) -> Any:
        if not self.active:
            return None
        try:
            return method(self, *given)
        except Exception as error:
            self.note(f"{method.__name__} failed: {type(error).__name__}: {error}")
            return None

    return call


class Watcher:
    """What was seen so far. A step is one of the optimizer that steps most regularly."""

    def __init__(self, folder: str, timeline: bool):
        self.active, self.pid, self.main_thread = True, os.getpid(), threading.get_ident()
        self.path = os.path.join(folder, f"{self.pid}-{time.time_ns()}.json")
        self.notes: list[str] = []
        self.optimizers: dict[int, OptimizerSeen] = {}
        self.leading: int | None = None
        self.steps = self.others_since = 0
        self.intervals: collections.deque[tuple[float, ...]] = collections.deque(maxlen=KEPT)
        self.ended = self.written = clock()
        self.waited = self.waited_in_all = self.backward_seconds = 0.0
        self.batches = self.rows = 0
        self.is_mixed = False  # whether something other than training happened since the last step
        self.drawing: set[int] = set()  # threads that are inside a draw
        self.loaders: dict[int, dict[str, Any]] = {}  # by identity of the data set
        self.drawn: set[int] = set()  # data sets drawn from since the last step
        self.training: set[int] = set()  # data sets that steps draw from
        self.peaks = memory.Peaks()
        self.cuda = False
        self.sizes: dict[int, int] = {}  # bytes of every parameter by identity
        self.roots: list[dict[str, Any]] = []
        self.inside: set[int] = set()
        self.roots_hook: Any = None
        self.evaluation_hook: Any = None
        self.evaluations_checked = 0
        self.evaluates_with_gradients = False
        self.rest: dict[str, int] | None = None
        self.samples: list[dict[str, Any]] = []
        self.gradients_kept: list[bool] = []
        self.new_recorder: Any = None
        self.recorder: Any = None
        self.timeline: dict[str, Any] | None = None
        if timeline:
            from delest_timeline import Recorder  # now, while this folder is on the path

            self.new_recorder = Recorder

    def note(self, text: str) -> None:
        if text not in self.notes and len(self.notes) < MOST_NOTES:
            self.notes.append(text)

    def stop(self) -> None:
        self.active = False

    # -- models

    @guarded
    def look_for_roots(self) -> None:
        self.roots_hook = register_module_forward_pre_hook(self.root_called)

    def stop_looking_for_roots(self) -> None:
        if self.roots_hook is not None:
            self.roots_hook.remove()
            self.roots_hook = None

    @guarded
    def root_called(self, module: Any, _: Any) -> None:
        """Note a module that no module seen so far contains: the script itself called it."""
        if torch.compiler.is_compiling() or id(module) in self.inside:
            return
        modules = list(module.modules())
        self.inside.update(map(id, modules))
        parameters = list(module.parameters())
        if not parameters:
            return
        self.sizes.update((id(parameter), memory.tensor_bytes(parameter)) for parameter in parameters)
        self.roots.append(describe_root(module, modules, parameters))
        # A compiled module must be compiled, and compiled once, without this hook.
        if len(self.roots) >= MOST_ROOTS or self.is_compiled():
            self.stop_looking_for_roots()

    def is_compiled(self) -> bool:
        return any(root["compiled"] for root in self.roots)

    @guarded
    def evaluation_called(self, module: Any, _: Any) -> None:
        """Note whether the first call after other data were drawn keeps what only a backward pass needs."""
        self.evaluation_hook.remove()
        self.evaluation_hook = None
        tracks = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters())
        self.evaluates_with_gradients = self.evaluates_with_gradients or (not module.training and tracks)

    # -- data

    @guarded
    def before_draw(self, iterator: Any) -> None:
        """Data for something else than steps: what the peak was until here is that of steps."""
        if self.recorder is not None:
            self.recorder.enter("data")
        if not self.training or id(iterator._dataset) in self.training:
            return
        self.leave_steps()
        if self.evaluation_hook is None and self.evaluations_checked < 3 and self.roots_hook is None:
            self.evaluations_checked += 1
            if not self.is_compiled():
                self.evaluation_hook = register_module_forward_pre_hook(self.evaluation_called)

    @guarded
    def drew(self, iterator: Any, batch: Any, seconds: float) -> None:
        dataset = id(iterator._dataset)
        if dataset not in self.loaders:
            self.loaders[dataset] = describe_loader(iterator)
        seen = self.loaders[dataset]
        tensors = memory.tensors_in(batch)
        rows = int(tensors[0].shape[0]) if tensors and tensors[0].ndim else 0
        size = sum(map(memory.tensor_bytes, tensors))
        seen["batches"] += 1
        seen["rows"], seen["bytes"] = max(seen["rows"], rows), max(seen["bytes"], size)
        if seen["batches"] == 1:
            seen["dtypes"] = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
        self.drawn.add(dataset)
        self.rows += rows
        self.batches += 1
        if threading.get_ident() == self.main_thread:
            self.waited += seconds
        if self.recorder is not None:
            self.recorder.enter("forward")

    @guarded
    def exhausted(self, iterator: Any) -> None:
        """An epoch's end: what comes before the next step is no part of one."""
        if id(iterator._dataset) in self.training:
            self.leave_steps()

    # -- steps

    @guarded
    def before_backward(self) -> None:
        if self.recorder is not None:
            self.recorder.enter("backward")
        if self.rest is None:
            return
        kept = gradient_bytes(self.known_parameters())
        if self.rest["backwards"] == 0:
            self.gradients_kept.append(kept > 0)
        self.rest["backwards"] += 1
        figures = self.figures()
        if figures is not None:
            self.samples.append({"rest": dict(self.rest), "full": {**figures, "gradient_bytes": kept}})

    @guarded
    def after_backward(self, seconds: float) -> None:
        self.backward_seconds += seconds
        if self.recorder is not None:
            self.recorder.backward_ended(self.known_parameters())

    @guarded
    def before_step(self, optimizer: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            return None
        seen = self.optimizers.get(id(optimizer))
        if seen is None or seen.it() is not optimizer:
            seen = self.optimizers[id(optimizer)] = OptimizerSeen(optimizer)
        seen.closure_seconds = 0.0
        seen.began = clock()
        if self.recorder is not None:
            self.recorder.enter("update")
        # Lightning and LBFGS run forward and backward inside the optimizer's step; that time is not the optimizer's.
        if callable(named.get("closure")):
            return given, {**named, "closure": self.timed(named["closure"], seen)}
        if len(given) > 1 and callable(given[1]):
            return (given[0], self.timed(given[1], seen), *given[2:]), named
        return None

    def timed(self, closure: Callable[[], Any], seen: OptimizerSeen) -> Callable[[], Any]:
        def call() -> Any:
            if self.recorder is not None:
                self.recorder.enter("forward")
            began = clock()
            try:
                return closure()
            finally:
                seen.closure_seconds += clock() - began
                if self.recorder is not None:
                    self.recorder.enter("update")

        return call

    @guarded
    def after_step(self, optimizer: Any, _: Any, __: Any) -> None:
        if torch.compiler.is_compiling():
            return
        now = clock()
        seen = self.optimizers[id(optimizer)]
        seen.steps += 1
        if seen.steps > WARM_UP:
            seen.seconds += now - seen.began - seen.closure_seconds
            seen.timed += 1
        if seen.steps in (1, WARM_UP + 1):
            seen.look(self.sizes)
        if self.leading is None:
            self.leading = id(optimizer)
        if id(optimizer) == self.leading:
            self.others_since = 0
            self.step_ended(now)
        else:
            self.others_since += 1
            if self.others_since > 10:  # the one that led has gone: another phase of the script
                self.leading = id(optimizer)

    def step_ended(self, now: float) -> None:
        self.steps += 1
        self.stop_recording()
        if self.steps > WARM_UP:
            self.intervals.append(
                (now - self.ended, self.waited, self.backward_seconds, self.rows, self.batches, float(self.is_mixed))
            )
        # What the first step drew may be a check of the evaluation before training; the second's is training data.
        if self.steps > 1 and not self.drawn & self.training:
            self.training |= self.drawn
        self.rest = None
        if self.steps == 1:
            self.stop_looking_for_roots()
            self.cuda = memory.uses_cuda()
        if self.steps >= WARM_UP:
            self.peaks.step_ended(now, self.steps <= READ_EACH)
        if self.steps in SAMPLED and (figures := self.figures()) is not None:
            self.rest = {**figures, "gradient_bytes": gradient_bytes(self.known_parameters()), "backwards": 0}
        if self.steps in (1, WARM_UP + 1) or now - self.written > WRITE_SECONDS:
            self.write()
        self.waited_in_all += self.waited
        self.waited = self.backward_seconds = 0.0
        self.rows = self.batches = 0
        self.drawn.clear()
        self.is_mixed = False
        if self.new_recorder is not None and self.steps == TIMELINE_AFTER:
            self.start_recording()
        self.ended = clock()  # what the watching itself took is not the script's

    def known_parameters(self) -> list[Any]:
        optimizers = [seen.it() for seen in self.optimizers.values()]
        parameters = [
            parameter
            for optimizer in optimizers
            if optimizer is not None
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]
        return list({id(parameter): parameter for parameter in parameters}.values())

    # -- memory

    def figures(self) -> dict[str, int] | None:
        held = memory.heap(self.cuda)
        return None if held is None else {"resident": memory.resident(), "used": held[0], "free": held[1]}

    def leave_steps(self) -> None:
        self.is_mixed = True
        self.peaks.leave_steps()

    # -- timeline

    def start_recording(self) -> None:
        if self.is_compiled():
            self.note("no timeline: the model is compiled, and its operators cannot be watched one by one")
            return
        self.leave_steps()
        recorder = self.new_recorder()
        recorder.__enter__()
        self.recorder = recorder

    def stop_recording(self) -> None:
        if self.recorder is not None:
            recorder, self.recorder = self.recorder, None
            recorder.__exit__(None, None, None)
            self.timeline = recorder.result()
            self.notes.extend(recorder.faults)
            self.is_mixed = True

    # -- the report

    @guarded
    def finish(self) -> None:
        """The last report, when the interpreter ends."""
        self.peaks.is_steady = False  # what came after the last step, such as saving, is no part of the steady peak
        self.write()
        self.stop()

    @guarded
    def write(self) -> None:
        if os.getpid() != self.pid:
            return
        self.written = clock()
        self.peaks.read(self.written, self.cuda)
        told = {
            "argv": list(getattr(sys, "orig_argv", sys.argv)),
            "rank": int(os.environ.get("RANK", 0)),
            "steps": self.steps,
            "warm_up": WARM_UP,
            "intervals": list(self.intervals),
            "waited_in_all": self.waited_in_all + self.waited,
            **self.peaks.told(self.cuda),
            "parameter_bytes": sum(self.sizes.values()),
            "roots": self.roots,
            "optimizers": [
                {**seen.facts, "steps": seen.steps, "seconds": seen.seconds / seen.timed if seen.timed else None}
                for seen in self.optimizers.values()
                if seen.facts
            ],
            "training": [seen for dataset, seen in self.loaders.items() if dataset in self.training],
            "evaluation": [seen for dataset, seen in self.loaders.items() if dataset not in self.training],
            "evaluates_with_gradients": self.evaluates_with_gradients,
            "gradients_kept": bool(self.gradients_kept) and all(self.gradients_kept),
            "samples": self.samples,
            "timeline": self.timeline,
            "frameworks": [name for name in ("lightning", "pytorch_lightning", "transformers.trainer") if name in sys.modules],
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "notes": self.notes,
        }
        temporary = self.path + ".tmp"
        with open(temporary, "w") as file:
            json.dump(told, file)
        os.replace(temporary, self.path)


def _wrap_loaders(watcher: Watcher) -> None:
    """Time every draw from a DataLoader; a loader inside another's data set counts as part of the outer one."""
    draw = _BaseDataLoaderIter.__next__

    @functools.wraps(draw)
    def __next__(iterator: Any) -> Any:
        thread = threading.get_ident()
        if not watcher.active or thread in watcher.drawing:
            return draw(iterator)
        watcher.before_draw(iterator)
        watcher.drawing.add(thread)
        began = clock()
        try:
            batch = draw(iterator)
        except StopIteration:
            watcher.exhausted(iterator)
            raise
        finally:
            watcher.drawing.discard(thread)
        watcher.drew(iterator, batch, clock() - began)
        return batch

    _BaseDataLoaderIter.__next__ = __next__  # type: ignore[method-assign, assignment]


def _wrap_backward(watcher: Watcher) -> None:
    """Time every backward pass; `Tensor.backward` looks this function up at each call."""
    run = torch.autograd.backward

    @functools.wraps(run)
    def backward(*given: Any, **named: Any) -> Any:
        watcher.before_backward()
        began = clock()
        try:
            return run(*given, **named)
        finally:
            watcher.after_backward(clock() - began)

    torch.autograd.backward = backward
