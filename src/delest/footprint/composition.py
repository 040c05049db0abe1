"""What lives when in a trace, and whose it is: by category, by module, along the steps. Pure arithmetic on lists."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate

from delest.records.footprint import ModuleShare, Timeline
from delest.records.trace import CATEGORIES, Trace

LASTING = ("parameters", "buffers", "optimizer")  # what stays between steps, and what a checkpoint holds
STATE = ("gradients", "optimizer")
POINTS = 400  # of a timeline: as fine as a wide screen shows


class Lives:
    """The storages of a trace at given numbers of rows, with sizes in bytes, and the scratch of its K operators.

    Where the batch is split, gradients of earlier parts stay: a gradient lives from its step's first operator on, and
    another storage of its size, which is added to it, while the operator runs that makes it.
    """

    def __init__(self, trace: Trace, *, rows: int, evaluation_rows: int, split: bool = False, resident: bool = False):
        storages, operators = trace.storages, trace.operators
        self.count = len(operators)
        self.evaluation = next((k for k, step in enumerate(operators.step) if step == 3), self.count)
        usual, evaluated = storages.sizes(rows), storages.sizes(evaluation_rows)
        self.sizes = [(usual if born < self.evaluation else evaluated)[i] for i, born in enumerate(storages.born)]
        self.unwritten: dict[int, int] = {}  # by number: pages that nobody writes take no memory
        for number, share in storages.touched.items() if resident else ():
            self.unwritten[number] = self.sizes[number] - round(self.sizes[number] * share)
            self.sizes[number] -= self.unwritten[number]
        self.step, self.kind = operators.step, operators.kind
        self.makes_node = [phase == "forward" for phase in operators.phase]  # of the graph, which goes when its step ends
        self.born, self.dies = list(storages.born), list(storages.dies)
        self.category, self.module = list(storages.category), list(storages.module)
        scratch = operators.scratch_bytes(rows)[: self.evaluation] + operators.scratch_bytes(evaluation_rows)[self.evaluation :]
        self.scratch = [round(size) for size in scratch]
        if split:
            self._keep_gradients(operators.step)

    def _keep_gradients(self, steps: list[int]) -> None:
        first = {step: steps.index(step) for step in {1, 2}.intersection(steps)}
        for i, category in enumerate(tuple(self.category)):
            start = first.get(steps[self.born[i]])
            if category == "gradients" and start is not None:
                self.sizes.append(self.sizes[i])
                self.born.append(self.born[i])
                self.dies.append(min(self.born[i] + 1, self.dies[i]))
                self.category.append(category)
                self.module.append(self.module[i])
                self.born[i] = start

    def events(self) -> tuple[list[list[int]], list[list[int]]]:
        """Numbers of the storages that are born and that die at each operator; those that outlive the trace die at K."""
        births: list[list[int]] = [[] for _ in range(self.count)]
        deaths: list[list[int]] = [[] for _ in range(self.count + 1)]
        for number, (born, dies) in enumerate(zip(self.born, self.dies, strict=True)):
            if born < dies and self.sizes[number]:
                births[born].append(number)
                deaths[dies].append(number)
        return births, deaths

    def live(self, position: int) -> list[int]:
        """Numbers of the storages that live while an operator runs."""
        return [i for i, (born, dies) in enumerate(zip(self.born, self.dies, strict=True)) if born <= position < dies]

    def at_rest(self) -> list[int]:
        """Numbers of the storages that the steps leave for good."""
        return [i for i, dies in enumerate(self.dies) if dies == self.count and self.born[i] < self.evaluation]

    def nodes(self) -> list[int]:
        """Nodes of the graph that are there while each operator runs: the loss holds them until the next step's takes its place."""
        counts: list[int] = []
        for k, makes_node in enumerate(self.makes_node):
            before = counts[-1] if k and self.step[k] == self.step[k - 1] else 0
            counts.append(before + makes_node)
        return counts

    def series(self) -> dict[str, list[int]]:
        """Live bytes by category while each operator runs; its scratch is among the temporaries."""
        changes: dict[str, list[int]] = {category: [0] * (self.count + 1) for category in CATEGORIES}
        for size, born, dies, category in zip(self.sizes, self.born, self.dies, self.category, strict=True):
            if born < dies:
                changes[category][born] += size
                changes[category][dies] -= size
        series = {category: list(accumulate(change))[: self.count] for category, change in changes.items()}
        series["temporaries"] = [a + b for a, b in zip(series["temporaries"], self.scratch, strict=True)]
        return series

    def totals(self) -> list[int]:
        """Live bytes while each operator runs, its scratch included."""
        return [sum(sizes) for sizes in zip(*self.series().values(), strict=True)]


@dataclass(frozen=True)
class Moment:
    """One point in time: what is held, what of it lives, and the scratch of the module at work."""

    held_bytes: int
    live: list[int]
    scratch_bytes: int = 0
    module: str = ""


def break_down(lives: Lives, moment: Moment) -> dict[str, int]:
    """Bytes by category, which sum to what is held; scratch and what the allocator holds beyond are temporaries."""
    parts: dict[str, int] = dict.fromkeys(CATEGORIES, 0)
    for number in moment.live:
        parts[lives.category[number]] += lives.sizes[number]
    parts["temporaries"] += moment.held_bytes - sum(parts.values())
    return parts


def share_out(trace: Trace, lives: Lives, moment: Moment) -> tuple[ModuleShare, ...]:
    """The share of every module of the trace in what lives at a moment; a module's include those of the modules inside it."""
    shares = {name: ModuleShare(name=name, kind=kind) for name, kind in trace.modules.items()}
    columns = {
        column: dict.fromkeys(shares, 0) for column in ("parameter_bytes", "state_bytes", "activation_bytes", "peak_bytes")
    }
    for number in moment.live:
        category, size = lives.category[number], lives.sizes[number]
        column = {"parameters": "parameter_bytes", "activations": "activation_bytes"}.get(category, "")
        column = "state_bytes" if category in STATE else column
        for name in _within(lives.module[number], shares):
            columns["peak_bytes"][name] += size
            if column:
                columns[column][name] += size
    for name in _within(moment.module, shares):
        columns["peak_bytes"][name] += moment.scratch_bytes
    return tuple(
        ModuleShare(name=name, kind=kind, **{column: sizes[name] for column, sizes in columns.items()})
        for name, kind in trace.modules.items()
    )


def _within(module: str, known: Iterable[str]) -> Iterator[str]:
    """Those of the known modules that hold a module: itself, its parents, the whole model."""
    while module:
        if module in known:
            yield module
        module = module.rpartition(".")[0]
    if "" in known:
        yield ""


def draw_timeline(trace: Trace, lives: Lives) -> Timeline | None:
    """Live bytes by category along the two steps in at most `POINTS` points, each the highest of its neighbourhood.

    None where the trace holds no step.
    """
    operators = trace.operators
    steps = [k for k, step in enumerate(operators.step) if step in (1, 2)]
    if not steps:
        return None
    series = lives.series()
    total = [sum(sizes) for sizes in zip(*series.values(), strict=True)]
    width = -(-len(steps) // POINTS)
    kept = [max(steps[start : start + width], key=total.__getitem__) for start in range(0, len(steps), width)]
    return Timeline(
        position=[(k - steps[0]) / max(1, steps[-1] - steps[0]) for k in kept],
        phase=[f"{operators.step[k]} {operators.phase[k]}" for k in kept],
        categories={category: [sizes[k] for k in kept] for category, sizes in series.items()},
        peak=max(range(len(kept)), key=lambda point: total[kept[point]]),
        module=[operators.module[k] for k in kept],
    )
