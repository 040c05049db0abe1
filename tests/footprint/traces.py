"""Traces made by hand: bytes and lifetimes that a reader can check, no framework needed."""

from __future__ import annotations

from typing import Any

from delest.records.trace import Category, Operators, Phase, Storages, Trace


class Maker:
    """Writes a trace operator by operator; a storage lives until it is freed, at the latest until the end.

    `step` and `phase` hold for the operators that follow. Bytes and flops are (fixed, per sample) or fixed alone.
    """

    def __init__(self) -> None:
        self.step = 0
        self.phase: Phase = "start"
        self._operators: list[dict[str, Any]] = []
        self._storages: list[dict[str, Any]] = []
        self._pending: list[int] = []

    def operator(
        self,
        name: str = "aten.mm.default",
        *,
        module: str = "",
        reads: tuple[int, ...] = (),
        writes: tuple[int, ...] = (),
        kind: str = "matmul",
        flops: Any = 0,
        moved: Any = 0,
        scratch: Any = 0,
    ) -> int:
        """Add an operator that frees what was given to `free` since the last one; its position."""
        position = len(self._operators)
        for number in self._pending:
            self._storages[number]["dies"] = position
        self._pending.clear()
        columns = {"name": name, "module": module, "phase": self.phase, "step": self.step, "reads": reads, "kind": kind}
        for what, amount in (("flops", flops), ("moved_bytes", moved), ("scratch_bytes", scratch)):
            columns[f"fixed_{what}"], columns[f"per_sample_{what}"] = _parts(amount)
        self._operators.append({**columns, "writes": writes, "dtype": "fp32", "signature": f"{name} {module}"})
        return position

    def storage(self, size: Any, category: Category, *, module: str = "") -> int:
        """A storage that is born at the last operator; its number."""
        number, position = len(self._storages), len(self._operators) - 1
        fixed, per_sample = _parts(size)
        self._operators[position]["writes"] = (*self._operators[position]["writes"], number)
        self._storages.append(
            {
                "born": position,
                "dies": None,
                "fixed_bytes": fixed,
                "per_sample_bytes": per_sample,
                "category": category,
                "module": module,
            }
        )
        return number

    def free(self, *numbers: int) -> None:
        """These storages are gone when the next operator begins."""
        self._pending.extend(numbers)

    def trace(self, **fields: Any) -> Trace:
        """The whole; `fields` are those of `Trace`."""
        for entry in self._storages:
            entry["dies"] = len(self._operators) if entry["dies"] is None else entry["dies"]
        columns = [key for key in Storages.__dataclass_fields__ if key != "touched"]
        storages = Storages(**{key: [entry[key] for entry in self._storages] for key in columns})
        operators = Operators(**{key: [entry[key] for entry in self._operators] for key in Operators.__dataclass_fields__})
        return Trace(**{"storages": storages, "operators": operators, "rows": (4, 8), "how": "by hand", **fields})


def _parts(amount: Any) -> tuple[float, float]:
    return (float(amount[0]), float(amount[1])) if isinstance(amount, tuple) else (float(amount), 0.0)


def make_trace(*, layers: int = 3, width: int = 256, state_copies: int = 2, scratch_per_sample: int = 0) -> Trace:
    """A stack of square linear layers `blocks.0` ... with AdamW-like state made in the first update.

    With W = 4 * width * width bytes of weight a layer and A = 4 * width bytes a row: every layer keeps its output of A a row
    for the backward; gradients are W a layer and are gone before the next step; state is `state_copies` W a layer.
    """
    maker, weight, row = Maker(), 4 * width * width, 4 * width
    names = [f"blocks.{i}" for i in range(layers)]
    for name in names:
        maker.operator("aten.empty.memory_format", module=name, kind="memory")
        maker.storage(weight, "parameters", module=name)
    for step in (1, 2, 3):
        maker.step, maker.phase = step, "forward" if step < 3 else "evaluation"
        maker.operator("aten.clone.default", kind="memory", moved=(0, 2 * row))
        batch = maker.storage((0, row), "data")
        kept = []
        for number, name in enumerate(names):
            previous = kept[-1] if kept else batch
            if step == 3 and kept:
                maker.free(*kept[:-1])
                kept = kept[-1:]
            maker.operator(module=name, reads=(number, previous), flops=(0, 2 * width * width), scratch=(0, scratch_per_sample))
            kept.append(maker.storage((0, row), "activations" if step < 3 else "temporaries", module=name))
        if step < 3:
            _add_backward_and_update(maker, names, batch, kept, weight, row, state_copies)
        else:
            maker.free(batch, *kept)
            maker.operator("aten.sum.default", kind="memory")
    return maker.trace(
        optimizer="AdamW",
        state_bytes=layers * weight * (1 + state_copies),
        modules={"": "Sequential", "blocks": "ModuleList", **dict.fromkeys(names, "Linear")},
    )


def _add_backward_and_update(
    maker: Maker, names: list[str], batch: int, kept: list[int], weight: int, row: int, state_copies: int
) -> None:
    maker.phase, gradients = "backward", []
    maker.operator("aten.ones_like.default", kind="memory")
    flowing = maker.storage((0, row), "temporaries")
    for number, name in reversed(list(enumerate(names))):
        maker.operator(module=name, reads=(flowing, number))
        gradients.append(maker.storage(weight, "gradients", module=name))
        following = maker.storage((0, row), "temporaries", module=name)
        maker.free(flowing, kept[number])
        flowing = following
    maker.free(flowing, batch)
    maker.phase = "update"
    for name in names:
        maker.operator("aten.addcdiv_.default", module=name, kind="memory", moved=5 * weight)
        if maker.step == 1:
            for _ in range(state_copies):
                maker.storage(weight, "optimizer", module=name)
    maker.free(*gradients)
    maker.operator("aten.detach.default", kind="view")
