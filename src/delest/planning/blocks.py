"""Which blocks of a model recompute their activations instead of keeping them: an integer program over traced bytes and seconds.

As in Jain et al., "Checkmate" (2020, arXiv 1910.02653), but over modules instead of operators: what is chosen can be applied to any
model by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from delest.footprint.composition import Lives
from delest.footprint.time import STEADY
from delest.records.trace import Trace

_BARE = ("ModuleList", "ModuleDict")  # which have no forward of their own that could be done again
_CONTAINERS = ("Sequential", *_BARE)
_UNIT = float(1 << 20)  # the program is solved in MiB: figures near 1 keep it well scaled
_SOLVER_SECONDS = 5.0


@dataclass(frozen=True)
class Block:
    """A module that can be recomputed as a whole."""

    name: str
    saved_bytes: int  # activations that need not be kept
    seconds: float  # of its forward pass, which is done once more


def find_blocks(trace: Trace, seconds: Sequence[float], rows: int) -> list[Block]:
    """The blocks of a traced model, in order of the forward pass; `seconds` are those of each operator at `rows` rows.

    A block is the largest module below which nothing repeats: a transformer's layer, a residual block, a stage of a plain network.
    """
    owner = {
        inside: name for name in _names(trace) for inside in trace.modules if inside == name or inside.startswith(f"{name}.")
    }
    saved, spent, last = dict.fromkeys(owner.values(), 0), dict.fromkeys(owner.values(), 0.0), dict.fromkeys(owner.values(), 0)
    lives = Lives(trace, rows=rows, evaluation_rows=rows)
    for k, (module, phase, step) in enumerate(
        zip(trace.operators.module, trace.operators.phase, trace.operators.step, strict=True)
    ):
        if step == STEADY and phase == "forward" and module in owner:
            spent[owner[module]] += seconds[k]
    for size, born, category, module in zip(lives.sizes, lives.born, lives.category, lives.module, strict=True):
        if category == "activations" and born < lives.count and lives.step[born] == STEADY and module in owner:
            saved[owner[module]] += size
            last[owner[module]] = size
    # The last one is the block's output: the next one's input, which is kept.
    found = [Block(name, saved[name] - last[name], spent[name]) for name in dict.fromkeys(owner.values())]
    return [block for block in found if block.saved_bytes > 0]


def choose_blocks(blocks: Sequence[Block], need_bytes: float) -> tuple[str, ...] | None:
    """The blocks whose recomputation costs least and lowers the peak by `need_bytes`; None where all of them do not.

    While a block's backward pass runs, its own activations are there again: the largest of those chosen counts against the sum.
    """
    import highspy

    if need_bytes > sum(block.saved_bytes for block in blocks) - min((block.saved_bytes for block in blocks), default=0):
        return None
    program = highspy.Highs()
    program.silent()
    program.setOptionValue("time_limit", _SOLVER_SECONDS)
    chosen = [program.addBinary(obj=block.seconds + 1e-9) for block in blocks]
    largest = program.addVariable(lb=0.0, obj=0.0)
    for variable, block in zip(chosen, blocks, strict=True):
        program.addConstr(largest - block.saved_bytes / _UNIT * variable >= 0.0)
    total = sum(block.saved_bytes / _UNIT * variable for variable, block in zip(chosen, blocks, strict=True))
    program.addConstr(total - largest >= need_bytes / _UNIT)
    program.minimize()
    if program.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        return None
    values = [program.val(variable) for variable in chosen]
    return tuple(block.name for block, value in zip(blocks, values, strict=True) if value > 0.5)


def _names(trace: Trace) -> list[str]:
    """Dotted names of the blocks: going down from the whole model until nothing inside repeats."""
    children: dict[str, list[str]] = {name: [] for name in trace.modules}
    for name in trace.modules:
        if name:
            children[_parent(name, children)].append(name)
    return list(_below("", trace, children))


def _below(name: str, trace: Trace, children: dict[str, list[str]]) -> Iterable[str]:
    composite = [child for child in children[name] if children[child]]
    if name and trace.modules[name] not in _BARE and not _repeats(name, trace, children):
        yield name
        return
    for child in composite:
        yield from _below(child, trace, children)


def _repeats(name: str, trace: Trace, children: dict[str, list[str]]) -> bool:
    """Whether a module is, or holds, a container of several modules that have modules of their own."""
    composite = [child for child in children[name] if children[child]]
    if trace.modules[name] in _CONTAINERS and len(composite) > 1:
        return True
    return any(_repeats(child, trace, children) for child in composite)


def _parent(name: str, known: dict[str, list[str]]) -> str:
    parent = name.rpartition(".")[0]
    while parent not in known:  # modules that were registered under a dotted path of plain objects
        parent = parent.rpartition(".")[0]
    return parent
