"""What taking blocks or the loss in parts of the batch does to a trace, near enough to rank combinations; which layer gives the logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from delest.footprint.composition import Lives
from delest.footprint.time import STEADY
from delest.records.hardware import Roofline
from delest.records.plan import Choice
from delest.records.trace import Storages, Trace

PARTS = (2, 4, 8)  # of a batch in layered accumulation: more save little beside what enters the blocks
CHUNK_BYTES = 16 << 20  # of logits
MOST_CHUNKS = 64  # each adds to the gradient of the whole layer's weight
WORTH = 0.05  # share of the peak that logits must be
_MADE = ("activations", "temporaries")


def evaluation_rows(choices: Sequence[Choice], rows: int, batch_size: int) -> int:
    """Rows of an evaluation's batch: what takes blocks or the loss in parts evaluates in as many."""
    parts = max((choice.config.get("parts", 1) for choice in choices), default=1)
    return min(rows, -(-batch_size // parts))


def find_head(trace: Trace, rows: int) -> dict[str, Any] | None:
    """The configuration of `chunked_loss`: the last linear layer, where its outputs are much of the peak; None where they are not."""
    operators = trace.operators
    last = max(
        (
            k
            for k, kind in enumerate(operators.kind)
            if kind == "matmul" and (operators.step[k], operators.phase[k]) == (STEADY, "forward")
        ),
        default=None,
    )
    if last is None or trace.modules.get(operators.module[last]) != "Linear":
        return None
    lives = Lives(trace, rows=rows, evaluation_rows=rows)
    size = max((lives.sizes[number] for number in operators.writes[last]), default=0)
    if size < WORTH * max(lives.totals()):
        return None
    parts = 4
    while parts < MOST_CHUNKS and size > parts * CHUNK_BYTES:
        parts *= 2
    return {"module": operators.module[last], "parts": parts}


def in_chunks(trace: Trace, config: Mapping[str, Any]) -> Trace:
    """Logits, and what the loss makes of their size, are there in parts."""
    storages, operators = trace.storages, trace.operators
    heads = [k for k, module in enumerate(operators.module) if module == config["module"] and operators.phase[k] == "forward"]
    size = max((storages.per_sample_bytes[number] for k in heads for number in operators.writes[k]), default=0.0)
    each = [
        one / config["parts"] if category in _MADE and size and one >= size / 2 and module in ("", config["module"]) else one
        for one, category, module in zip(storages.per_sample_bytes, storages.category, storages.module, strict=True)
    ]
    return replace(trace, storages=replace(storages, per_sample_bytes=each))


def in_layers(trace: Trace, names: Sequence[str], parts: int) -> Trace:
    """Inside the named blocks everything is there in parts, for the forward pass and again for the backward pass; what enters and what
    leaves a block is there whole."""
    found = trace.storages
    for name in names:
        for step in (1, STEADY):
            found = _in_one_block(replace(trace, storages=found), name, step, parts)
    return replace(trace, storages=found)


def _in_one_block(trace: Trace, name: str, step: int, parts: int) -> Storages:
    storages, operators = trace.storages, trace.operators
    inside = [module == name or module.startswith(f"{name}.") for module in operators.module]
    at = {
        phase: [k for k, here in enumerate(inside) if here and operators.step[k] == step and operators.phase[k] == phase]
        for phase in ("forward", "backward")
    }
    if not at["forward"] or not at["backward"]:
        return storages
    forward, backward = at["forward"], at["backward"]
    columns: dict[str, Any] = {
        column: list(getattr(storages, column))
        for column in ("born", "dies", "fixed_bytes", "per_sample_bytes", "category", "module")
    }
    made = [
        i
        for i, (born, category, module) in enumerate(zip(storages.born, storages.category, storages.module, strict=True))
        if category in _MADE and (module == name or module.startswith(f"{name}."))
    ]
    first = [i for i in made if forward[0] <= storages.born[i] <= forward[-1]]
    kept = [i for i in first if storages.dies[i] > forward[-1] + 1]
    leaving = max((i for i in kept if storages.category[i] == "activations"), default=None)
    for i in first:
        if i == leaving:
            continue
        columns["per_sample_bytes"][i] /= parts
        if i in kept:  # gone, and there again
            columns["dies"][i] = forward[-1] + 1
            for column, value in (("born", backward[0]), ("dies", storages.dies[i])):
                columns[column].append(value)
            for column in ("fixed_bytes", "per_sample_bytes", "category", "module"):
                columns[column].append(columns[column][i])
    # Its gradients are summed over the parts, so that all of them stay until the last.
    summed = [
        i
        for i, (born, category, module) in enumerate(zip(storages.born, storages.category, storages.module, strict=True))
        if category == "gradients" and backward[0] <= born <= backward[-1] and (module == name or module.startswith(f"{name}."))
    ]
    for i in summed:
        columns["born"][i] = backward[0]
        columns["dies"][i] = max(storages.dies[i], backward[-1] + 1)
    for i in made:
        if backward[0] <= storages.born[i] <= backward[-1] and storages.dies[i] <= backward[-1] + 1:
            columns["per_sample_bytes"][i] /= parts
    return replace(storages, **columns)


def launching(trace: Trace, names: Sequence[str], parts: int, roofline: Roofline) -> float:
    """Seconds that the operators of these blocks take to be launched for every further part, once more for what is recomputed."""
    inside = sum(
        any(module == name or module.startswith(f"{name}.") for name in names)
        for module, step in zip(trace.operators.module, trace.operators.step, strict=True)
        if step == STEADY
    )
    return (parts - 1) * 1.5 * inside * roofline.overhead_seconds
