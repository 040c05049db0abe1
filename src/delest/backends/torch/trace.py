"""A training loop traced on fake tensors: two steps and an evaluation, at two sizes of the micro-batch."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from delest import errors
from delest.backends.torch import kernels
from delest.backends.torch.building import all_fake, fake_when_registered, without_packing
from delest.backends.torch.loops import Loop, needs_values, tensors_of
from delest.backends.torch.model import where
from delest.backends.torch.recorder import NoUpdate, Recorder
from delest.records.trace import Operators, Storages, Trace

Scratch = Callable[[Iterable[str]], dict[str, dict[str, Any]]]  # what calls take, by signature
Build = Callable[[Any], Loop]  # gets the fake mode, None where tensors are real
SCRATCH_ROWS = (2, 4)  # at which kernels are run alone; what they take grows in proportion beyond


class NeedsProbe(Exception):
    """The model reads values of tensors, which fake ones do not have."""


def trace_loop(build: Build, rows: int, *, scratch: Scratch, real: bool = False, growing: bool = True) -> Trace:
    """Trace the loop that `build` gives, with `rows` rows and with few; nothing is allocated unless `real`.

    Without `growing` the trace holds for `rows` rows alone, and takes a third less time.

    `scratch` says what kernels take for themselves, which no fake tensor shows: this machine's are run, another device's follow
    rules.

    Raises `NeedsProbe` where the model branches on data, `BadInput` where it cannot be built or run.
    """
    sizes = (2, rows) if rows > 2 else (rows, rows + 1) if rows > 1 else (1, 2)
    if not growing:
        return _trace_alone(build, rows, sizes[0] if sizes[1] == rows else sizes[1], scratch, real)
    recorders, how, loop = [], "", None
    for size in sizes:
        recorder, how, loop = _record(build, size, real, whole=True)
        recorders.append(recorder)
    assert loop is not None
    return _merge(recorders[0], recorders[1], sizes, loop, how, scratch)


def _trace_alone(build: Build, rows: int, few: int, scratch: Scratch, real: bool) -> Trace:
    """At one size; a pass on few rows says at what smaller sizes kernels can be run alone, where the model takes them."""
    large, how, loop = _record(build, rows, real, whole=True)
    try:
        small = _record(build, few, real, whole=False)[0]
    except errors.BadInput:  # a model that takes no other batch than this one
        small = Recorder()
        small.step = 1
    return _merge(small, large, (few, rows), loop, how, scratch)


def _record(build: Build, rows: int, real: bool, whole: bool) -> tuple[Recorder, str, Loop]:
    if real:
        loop = build(None)
        return _run(loop, rows, whole), "real tensors", loop
    from torch._subclasses.fake_tensor import FakeTensorMode

    failed: BaseException | None = None
    for how, building in (
        ("fake tensors", all_fake),
        ("real tensors, each made fake when a module took it", fake_when_registered),
    ):
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        try:
            with _quiet(), building(mode):
                loop = build(mode)
        except Exception as error:
            if needs_values(error):  # also where it is why a job's factory failed
                failed = error
                continue
            if isinstance(error, errors.DelestError):
                raise
            raise errors.BadInput(f"building the model failed: {where(error)}") from error
        try:
            with _quiet(), without_packing(), mode:
                return _run(loop, rows, whole), how, loop
        except errors.DelestError:
            raise
        except Exception as error:
            if needs_values(error):
                raise NeedsProbe(where(error)) from error
            raise errors.BadInput(f"a training step failed on {_words(loop, rows, mode)}: {where(error)}") from error
    raise NeedsProbe(where(failed) if failed else "")


def _run(loop: Loop, rows: int, whole: bool) -> Recorder:
    """Two steps and an evaluation; unless `whole` one forward and backward pass, enough to see how sizes depend on the rows."""
    batch = loop.batch(rows)
    recorder = Recorder(loop.model, updates=whole)
    gc.freeze()  # collections that come by themselves then pass over all that was there before
    try:
        with contextlib.suppress(NoUpdate), recorder:
            recorder.register_model(loop.model)
            for optimizer in loop.optimizers:
                recorder.register_optimizer(optimizer, loop.model)
            recorder.register(tensors_of(batch), "data")
            for step in (1, 2) if whole else (1,):
                recorder.begin(step, "forward")
                loop.step(batch, recorder)
                for optimizer in loop.optimizers:
                    recorder.register_optimizer(optimizer, loop.model)
            if whole:
                gc.collect()
                recorder.begin(3, "evaluation")
                try:
                    loop.evaluate(batch)
                except Exception as error:
                    if needs_values(error):
                        raise
                    recorder.notes.append(f"evaluation could not be traced whole: {where(error)}")
    finally:
        gc.unfreeze()
    return recorder


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Torch logs a traceback of its own for each operator that refuses its operands; the error is told once, by us."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _words(loop: Loop, rows: int, mode: Any) -> str:
    with contextlib.suppress(Exception), mode:
        return " and ".join(f"{tuple(tensor.shape)} {str(tensor.dtype)[6:]}" for tensor in tensors_of(loop.batch(rows)))
    return f"{rows} rows"


# Two recordings into one trace


def _merge(small: Recorder, large: Recorder, sizes: tuple[int, int], loop: Loop, how: str, scratch_of: Scratch) -> Trace:
    """Figures as a fixed part and a part for each row; where the two recordings do not tell the same story, those of
    the larger one with the whole of what is no weight in proportion to the rows."""
    notes = list(large.notes)
    alike = [row[0] for row in small.rows] == [row[0] for row in large.rows] and small.born == large.born
    if small.step != 1 and not alike:
        notes.append(f"the steps differ with the number of rows: figures are those of {sizes[1]} rows in proportion")
    signatures = _signatures(small, large, sizes)
    found = scratch_of(text for pair in signatures for text in pair if text)
    unseen = sum(1 for pair in signatures if pair[0] and pair[0] not in found)
    if unseen:
        notes.append(
            f"{unseen} calls of kernels were too large to be run alone, or could not be: their own scratch memory is not counted"
        )
    scratch = [_line([_bytes_of(found, text) for text in pair], SCRATCH_ROWS) for pair in signatures]
    fixed, each = _storage_lines(small, large, sizes, alike)
    touched = _correct_outputs(large, signatures, found, fixed, each)
    flops = _cost_lines(small, large, sizes, alike, 2)
    moved = _cost_lines(small, large, sizes, alike, 3)
    count, rows = len(large.rows), large.rows
    return Trace(
        storages=Storages(
            born=large.born,
            dies=[min(position, count) for position in large.dies],
            fixed_bytes=fixed,
            per_sample_bytes=each,
            category=large.category,
            module=large.storage_module,
            touched=touched,
        ),
        operators=Operators(
            name=[row[0] for row in rows],
            module=[row[1] for row in rows],
            phase=[row[2] for row in rows],
            step=[row[3] for row in rows],
            reads=[row[4] for row in rows],
            writes=[row[5] for row in rows],
            kind=[row[6].kind for row in rows],
            dtype=[row[6].dtype for row in rows],
            fixed_flops=[line[0] for line in flops],
            per_sample_flops=[line[1] for line in flops],
            fixed_moved_bytes=[line[0] for line in moved],
            per_sample_moved_bytes=[line[1] for line in moved],
            fixed_scratch_bytes=[line[0] for line in scratch],
            per_sample_scratch_bytes=[line[1] for line in scratch],
            signature=[pair[0] or "" for pair in signatures],
        ),
        rows=sizes,
        how=how,
        optimizer="+".join(type(optimizer).__name__ for optimizer in loop.optimizers),
        state_bytes=sum(
            large.bytes[i] for i, kind in enumerate(large.category) if kind in ("parameters", "buffers", "optimizer")
        ),
        modules={name: _kind(module) for name, module in loop.model.named_modules()},
        notes=tuple(notes),
    )


def _kind(module: nn.Module) -> str:
    """Its class; that of torch where it is a list or dictionary of modules under a name of its own, which has no forward either."""
    bare = type(module).forward is nn.Module.forward
    return next(
        (kind.__name__ for kind in (nn.ModuleList, nn.ModuleDict) if bare and isinstance(module, kind)), type(module).__name__
    )


def _line(values: list[float], sizes: tuple[int, int]) -> tuple[float, float]:
    """Fixed part and part for each row of a straight line through two points."""
    each = (values[1] - values[0]) / (sizes[1] - sizes[0])
    return values[0] - each * sizes[0], each


def _storage_lines(small: Recorder, large: Recorder, sizes: tuple[int, int], alike: bool) -> tuple[list[float], list[float]]:
    if alike:
        lines = [_line([a, b], sizes) for a, b in zip(small.bytes, large.bytes, strict=True)]
    elif small.step == 1:
        lines = [(float(size), 0.0) for size in large.bytes]
    else:
        fixed = ("parameters", "buffers", "optimizer", "gradients")
        lines = [
            (size, 0.0) if kind in fixed else (0.0, size / sizes[1])
            for size, kind in zip(large.bytes, large.category, strict=True)
        ]
    return [line[0] for line in lines], [line[1] for line in lines]


def _cost_lines(
    small: Recorder, large: Recorder, sizes: tuple[int, int], alike: bool, column: int
) -> list[tuple[float, float]]:
    if alike:
        return [_line([a[6][column], b[6][column]], sizes) for a, b in zip(small.rows, large.rows, strict=True)]
    if small.step == 1:
        return [(row[6][column], 0.0) for row in large.rows]
    return [(row[6][column], 0.0) if row[2] == "update" else (0.0, row[6][column] / sizes[1]) for row in large.rows]


def _signatures(small: Recorder, large: Recorder, sizes: tuple[int, int]) -> list[tuple[str | None, str | None]]:
    """For each operator the calls at the two sizes at which kernels are run alone; one that the smaller recording does not
    have stands for itself."""
    known: dict[str, tuple[str | None, str | None]] = {"": (None, None)}
    for a, b in zip(small.rows, large.rows, strict=False):
        if a[0] == b[0] and a[7] and b[7] not in known:
            first, second = (kernels.between(a[7], b[7], sizes, rows) for rows in SCRATCH_ROWS)
            known[b[7]] = (first, second) if first and second else (b[7], b[7])
    return [known.get(row[7], (row[7], row[7])) for row in large.rows]


def _bytes_of(found: dict[str, dict[str, Any]], text: str | None) -> float:
    return found[text]["scratch"] if text in found else 0.0


def _correct_outputs(
    large: Recorder,
    signatures: list[tuple[str | None, str | None]],
    found: dict[str, dict[str, Any]],
    fixed: list[float],
    each: list[float],
) -> dict[int, float]:
    """Outputs that have no size under fake tensors (workspaces of recurrent layers) get that of the probe; gives the share
    of them that is written."""
    touched: dict[int, float] = {}
    for row, pair in zip(large.rows, signatures, strict=True):
        known = [found.get(text or "") for text in pair]
        if known[0] is None or known[1] is None:
            continue
        empty = [number for number in row[5] if large.bytes[number] == 0]
        if not empty:
            continue
        ends = [known[0]["outputs"], known[1]["outputs"]]
        if len(ends[0]) == len(ends[1]) == len(row[5]):
            for number, pair_of_bytes in zip(row[5], zip(*ends, strict=True), strict=True):
                if number in empty:
                    fixed[number], each[number] = _line(list(pair_of_bytes), SCRATCH_ROWS)
                    if "touched" in known[1]:
                        touched[number] = known[1]["touched"]
    return touched
