"""Records as real runs leave them: digits with three forms, and a table whose target is a number with little else known."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from delest.job import Job, Recipe, override
from delest.records.footprint import Footprint, ModuleShare, Timeline
from delest.records.hardware import Hardware
from delest.records.plan import Choice, Option, Plan, Rejection
from delest.records.run import Best, Run, Summary
from delest.records.shrunk import Bound, Candidate, Shrunk

KIB, MIB = 2**10, 2**20
HARDWARE = Hardware(
    processor="AMD EPYC 7B13",
    cores=2,
    instruction_sets=("avx2", "fma"),
    memory_bytes=16 * 2**30,
    memory_limit_bytes=8 * 2**30,
    available_bytes=6 * 2**30,
)


def footprint(peak: int, *, spread: int = 0, seconds: float = 0.031, basis: Any = "estimate", how: Any = "probe") -> Footprint:
    phases = {"start": peak - 190 * MIB, "first_step": peak - 24 * MIB, "steady_step": peak, "evaluation": peak - 88 * MIB}
    return Footprint(
        peak_bytes=peak,
        runtime_bytes=296 * MIB,
        low_bytes=peak - spread,
        high_bytes=peak + 2 * spread,
        phases=phases,
        step_seconds=seconds,
        batch_size=128,
        micro_batch=32,
        basis=basis,
        how=how,
    )


def digits_plan() -> Plan:
    return Plan(
        choices=(
            Choice(
                method="micro_batch",
                config={"micro_batch": 32},
                keeps="rounding",
                why="the step is made of 4 parts of 32 rows, which fits the budget",
                saved_bytes=231 * MIB,
                cost_seconds=0.004,
            ),
            Choice(method="fused_optimizer", config={}, keeps="rounding", why="one pass over the weights", cost_seconds=-0.002),
        ),
        batch_size=128,
        micro_batch=32,
        memory_bytes=640 * MIB,
        predicted=footprint(518 * MIB, spread=14 * MIB),
        plain=footprint(749 * MIB, spread=20 * MIB, seconds=0.027),
        rejected=(Rejection(method="bf16", why="1.9 times slower than fp32 on this processor"),),
        frontier=tuple(
            Option(
                methods=("activation_checkpointing",) if blocks else (),
                blocks=blocks,
                micro_batch=rows,
                peak_bytes=peak * MIB,
                step_seconds=seconds,
                fits=peak <= 640,
                keeps="rounding",
            )
            for blocks, rows, peak, seconds in (
                (4, 16, 431, 0.041),
                (0, 16, 470, 0.036),
                (0, 32, 518, 0.031),
                (0, 128, 749, 0.027),
            )
        ),
        threads=2,
        code="for inputs, targets in batches:\n    loss(model(inputs), targets).backward()\n    optimizer.step()\n",
    )


def digits_summary(classes: tuple[str, ...] = tuple("0123456789")) -> Summary:
    counts = (987, 1123, 991, 1032, 980, 863, 1014, 1070, 944, 996)
    return Summary(
        source="data/digits.npz",
        fingerprint="9f2c1e4b7a6d5f30c1",
        rows=10_000,
        kind="images",
        columns=(
            {
                "name": "image",
                "kind": "image",
                "shape": [28, 28, 1],
                "dtype": "uint8",
                "missing": 0,
                "mean": 33.42,
                "std": 78.67,
                "low": 0,
                "high": 255,
            },
        ),
        target="label",
        classes=dict(zip(classes, counts, strict=True)),
        splits={"train": 7_000, "validation": 1_000, "selection": 1_000, "test": 1_000},
        row_bytes=28 * 28 * 4,
        notes=("36 rows occur twice, always in the same split.", "Classes are balanced: the rarest has 8.6 % of the rows."),
        baseline={"accuracy": 0.1123},
    )


def digits_run(path: Path, **changes: Any) -> Run:
    job = Job(
        data="data/digits.npz",
        origin="/home/ada/digits/digits.py",
        seed=3,
        recipe=Recipe(lr=0.002, augment=("crop",)),
        name="digits",
    )
    job = override(job, {"recipe.epochs": 12, "batch_size": 128})
    fields: dict[str, Any] = {
        "path": path,
        "name": "digits",
        "status": "done",
        "job": {**job.describe(), "model": "DigitNet", "metric": "accuracy"},
        "metric": "accuracy",
        "parameters": 1_199_882,
        "steps": 550,
        "epochs": 10.0,
        "stopped_by": "plateau",
        "plan": digits_plan(),
        "measured": footprint(530 * MIB, basis="measurement", how="run"),
        "best": Best(step=495, epoch=9.0, score=0.979),
        "validation": {"accuracy": 0.979, "loss": 0.0712},
        "test": {"accuracy": 0.982, "loss": 0.0634},
        "data": digits_summary(),
        "seconds": {"inspecting": 0.6, "planning": 3.1, "training": 41.2, "evaluating": 1.8},
        "decisions": (
            {"kind": "decay", "at": 440, "reason": "plateau", "why": "no better accuracy in 3 evaluations", "total_steps": 550},
        ),
        "weights_sha256": "1b9e0c47d2aa8f6630e1",
        "versions": {"python": "3.11.4", "delest": "0.1.0", "torch": "2.13.0", "numpy": "2.4.6", "onnxruntime": "1.32.0"},
    }
    return Run(**{**fields, **changes})


def digits_metrics(metric: str = "accuracy") -> list[dict[str, Any]]:
    """550 steps in 10 epochs: warm-up, hold, decay from epoch 8."""
    rows: list[dict[str, Any]] = []
    for step in range(5, 551, 5):
        epoch = step / 55
        rate = min(1.0, step / 28) if epoch <= 8 else max(0.0, (10 - epoch) / 2)
        loss = 0.05 + 2.2 * math.exp(-epoch * 1.5) + 0.03 * math.sin(step * 1.7) * math.exp(-epoch / 6)
        rows.append(
            {
                "kind": "train", "step": step, "epoch": epoch, "loss": loss, "rate": rate,
                "seconds": step * 0.075, "samples_per_second": 1_690.0, "resident_bytes": 512 * MIB,
            }
        )  # fmt: skip
        if step % 55 == 0:
            score = round(0.977 - 0.11 * math.exp(-epoch * 0.9) + (0.002 if epoch == 9.0 else 0), 4)
            row = {"kind": "validation", "step": step, "epoch": epoch, "loss": 0.07 + 0.5 * math.exp(-epoch), "score": score}
            rows.append({**row, metric: score, "best": epoch == 9.0, "seconds": 0.3})
    return rows


def digits_shrunk(path: Path, shipped: str = "int8") -> Shrunk:
    kept = shipped == "int8"
    return Shrunk(
        path=path / "shrunk",
        shipped=shipped,
        metric="accuracy",
        max_drop=0.005,
        candidates=(
            Candidate(
                name="torch",
                runtime="PyTorch eager",
                file_bytes=None,
                weights_bytes=4_799_528,
                latency_seconds={1: 0.00061, 32: 0.0092},
                latency_spread={1: (0.00058, 0.00071), 32: (0.0089, 0.0101)},
                selection={"accuracy": 0.978, "loss": 0.0731},
                why="the trained model",
            ),
            Candidate(
                name="fp32",
                runtime="ONNX Runtime",
                file_bytes=4_803_311,
                weights_bytes=4_799_528,
                latency_seconds={1: 0.00052, 32: 0.0081},
                latency_spread={1: (0.0005, 0.00055), 32: (0.0079, 0.0086)},
                selection={"accuracy": 0.978, "loss": 0.0731},
                bound=Bound(drop=0.0, upper=0.0, rows=1_000, disagreeing=0.0),
                parity=2.1e-6,
                why="the same outputs, quicker",
            ),
            Candidate(
                name="int8",
                runtime="ONNX Runtime",
                file_bytes=1_231_870,
                weights_bytes=1_203_000,
                latency_seconds={1: 0.00047, 32: 0.0064},
                latency_spread={1: (0.00045, 0.0005), 32: (0.0061, 0.007)},
                selection={"accuracy": 0.977, "loss": 0.0749},
                bound=Bound(drop=0.001, upper=0.0033, rows=1_000, disagreeing=0.002),
                parity=0.031,
                kept=kept,
                why="3.9 times smaller" if kept else "its bound of 0.7 points is above the 0.5 that were promised",
            ),
        ),
        test={"accuracy": 0.981, "loss": 0.0651},
        seconds={"exporting": 9.1, "quantising": 3.2, "measuring": 6.0},
        threads=2,
    )


def houses_run(path: Path) -> Run:
    """A table with a number to predict, no test rows, no plan and no measurement."""
    summary = Summary(
        source="houses.csv",
        fingerprint="77aa",
        rows=4_000,
        kind="table",
        columns=(
            {
                "name": "area",
                "kind": "number",
                "shape": [],
                "dtype": "float64",
                "missing": 12,
                "mean": 96.1,
                "std": 31.0,
                "low": 18.0,
                "high": 410.0,
            },
            {"name": "district", "kind": "category", "shape": [], "dtype": "string", "missing": 0},
        ),
        target="price",
        classes=None,
        splits={"train": 3_200, "validation": 800},
        row_bytes=20,
        left_out=("row 17: price is missing",),
    )
    return Run(
        path=path,
        name="houses",
        status="interrupted",
        job={**Job(data="houses.csv").describe(), "metric": "rmse"},
        metric="rmse",
        higher_is_better=False,
        parameters=4_353,
        steps=120,
        epochs=4.8,
        best=Best(step=100, epoch=4.0, score=31_250.4),
        validation={"rmse": 31_250.4, "loss": 0.2031},
        data=summary,
        seconds={"training": 2.5},
    )


def houses_metrics() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in range(5, 121, 5):
        epoch = step / 25
        rows.append({"kind": "train", "step": step, "epoch": epoch, "loss": 0.2 + 1 / step, "rate": 1.0})
        if step % 25 == 0:
            rows.append(
                {
                    "kind": "validation",
                    "step": step,
                    "epoch": epoch,
                    "loss": 0.2 + 0.2 / epoch,
                    "rmse": 30_000 + 5_000 / epoch,
                    "score": 30_000 + 5_000 / epoch,
                }
            )
    return rows


# (name, class, parameter bytes, activation bytes) of the modules of a small residual network that hold no others
LEAVES = (
    ("conv1", "Conv2d", 37 * KIB, 24 * MIB),
    ("bn1", "BatchNorm2d", 1 * KIB, 24 * MIB),
    *(
        (f"layer{stage}.{block}.{name}{k}", kind, (148 * KIB if kind == "Conv2d" else 2 * KIB) * 4 ** (stage - 1), size)
        for stage, size in ((1, 12 * MIB), (2, 6 * MIB), (3, 3 * MIB))
        for block in (0, 1)
        for k in (1, 2)
        for name, kind in (("conv", "Conv2d"), ("bn", "BatchNorm2d"))
    ),
    ("head.linear", "Linear", 1 * MIB, 128 * KIB),
)


def resnet(basis: Any = "estimate", scale: float = 1.0, **changes: Any) -> Footprint:
    """A footprint with all that an estimate or measurement can know, made from `LEAVES`."""
    parameters = sum(leaf[2] for leaf in LEAVES)
    line = resnet_timeline(scale)
    live = {name: sizes[line.peak] for name, sizes in line.categories.items()}
    breakdown = {**live, "runtime": 296 * MIB}
    peak = sum(breakdown.values())
    estimated = basis == "estimate"
    fields: dict[str, Any] = {
        "peak_bytes": peak,
        "runtime_bytes": 296 * MIB,
        "low_bytes": peak - 12 * MIB if estimated else peak,
        "high_bytes": peak + 25 * MIB if estimated else peak,
        "phases": {
            "saving": 310 * MIB,
            "start": 296 * MIB + 2 * parameters,
            "first_step": peak - 2 * parameters,
            "steady_step": peak,
            "evaluation": 412 * MIB,
        },
        "breakdown": breakdown,
        "modules": resnet_modules(scale),
        "timeline": line,
        "allocated_bytes": peak - 296 * MIB,
        "step_seconds": 0.31,
        "waiting_seconds": None if estimated else 0.004,
        "step_seconds_spread": None if estimated else 0.02,
        "bound_by": "compute",
        "flops": 31.4e9,
        "utilisation": None if estimated else 0.41,
        "batch_size": 128,
        "micro_batch": 32,
        "allocator": "mmap",
        "basis": basis,
        "how": "replay" if estimated else "run",
        "notes": ("The scratch of convolutions was probed on this machine.",) if estimated else (),
    }
    return Footprint(**{**fields, **changes})


def resnet_modules(scale: float = 1.0) -> tuple[ModuleShare, ...]:
    """Every module with what is inside it: "head" wraps one layer, a block's sums have a little of its own."""
    kinds = {"": "ResNet", "head": "Sequential"}
    for name, *_ in LEAVES:
        parts = name.split(".")
        for depth in range(1, len(parts)):
            kinds.setdefault(".".join(parts[:depth]), "Sequential" if depth == 1 else "Block")
    kinds |= {name: kind for name, kind, *_ in LEAVES}
    shares = []
    for name, kind in kinds.items():
        inside = [leaf for leaf in LEAVES if name in ("", leaf[0]) or leaf[0].startswith(name + ".")]
        blocks = [
            block
            for block, block_kind in kinds.items()
            if block_kind == "Block" and (block + ".").startswith(name and name + ".")
        ]
        parameters = sum(leaf[2] for leaf in inside)
        activations = round(scale * (sum(leaf[3] for leaf in inside) + len(blocks) * MIB))
        shares.append(
            ModuleShare(
                name=name,
                kind=kind,
                parameter_bytes=parameters,
                state_bytes=3 * parameters,
                activation_bytes=activations,
                peak_bytes=4 * parameters + activations,
                seconds=activations / MIB * 0.001,
                flops=1e8 * len(inside),
            )
        )
    return tuple(shares)


def resnet_timeline(scale: float = 1.0) -> Timeline:
    """Two steps through `LEAVES`: activations grow and shrink, gradients come and go, optimizer state comes with the first update."""
    parameters = sum(leaf[2] for leaf in LEAVES)
    names = ("parameters", "buffers", "gradients", "optimizer", "activations", "temporaries", "data")
    sizes: dict[str, list[int]] = {name: [] for name in names}
    phases: list[str] = []
    where: list[str] = []

    def point(phase: str, module: str, **live: float) -> None:
        phases.append(phase)
        where.append(module)
        for name in names:
            sizes[name].append(round({"parameters": parameters, "buffers": 40 * KIB, "data": 2 * MIB, **live}.get(name, 0)))

    for step in (1, 2):
        state, kept, gradients = (2.0 * parameters if step == 2 else 0.0), 0.0, 0.0
        for name, _, _, size in LEAVES:
            kept += scale * size
            point(f"{step} forward", name, optimizer=state, activations=kept, temporaries=scale * size * 0.4)
        for name, _, own, size in reversed(LEAVES):
            gradients += own
            live = {"optimizer": state, "activations": kept, "temporaries": scale * size * 1.1, "gradients": gradients}
            point(f"{step} backward", name, **live)
            kept -= scale * size
        for k in range(6):
            state = max(state, 2.0 * parameters * (k + 1) / 6)
            point(f"{step} update", "", optimizer=state, gradients=parameters, temporaries=parameters / 12)
    totals = [sum(column) for column in zip(*sizes.values(), strict=True)]
    return Timeline(
        position=[k / (len(totals) - 1) for k in range(len(totals))],
        phase=phases,
        categories=sizes,
        peak=totals.index(max(totals)),
        module=where,
    )
