"""Which changes to a script would save most, by what was seen of it. Every saving is an estimate, and says so.

A rule is a function of the measurement and the raw report of `watch/`; it gives a remedy where it applies. The shares below are
assumptions on the careful side, not measurements of this script.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from typing import Any

from delest.records.script import Remedy, ScriptMeasurement
from delest.units import format_bytes, format_seconds

MOST = 3
SMALLEST_SHARE = 0.01  # of the peak or of the step: less is inside what repeats differ by
FUSED_SAVES = 0.6  # of a for-loop optimizer's time on a CPU
CHECKPOINT_SAVES = 0.5  # of activations, at about a third more time
EIGHT_BIT_SAVES = 0.74  # of fp32 optimizer state: a byte for four, and a scale for each block
OPERATOR_SECONDS = 60e-6  # of launching one small module's forward and backward from Python
Rule = Callable[[ScriptMeasurement, dict[str, Any]], Remedy | None]


def find_remedies(measured: ScriptMeasurement, report: dict[str, Any]) -> tuple[Remedy, ...]:
    """At most three remedies, that with the largest share of the peak and of the step's time first."""
    found = [remedy for rule in RULES if (remedy := rule(measured, report)) is not None]
    worth = [(_share(remedy, measured), remedy) for remedy in found]
    kept = [(share, remedy) for share, remedy in worth if share is None or share >= SMALLEST_SHARE]
    kept.sort(key=lambda pair: pair[0] or 0.0, reverse=True)
    return tuple(remedy for _, remedy in kept[:MOST])


def _share(remedy: Remedy, measured: ScriptMeasurement) -> float | None:
    """The saving in shares of the peak and of the step's time; None where it cannot be told."""
    shares = []
    if remedy.saved_bytes is not None:
        shares.append(remedy.saved_bytes / max(1, measured.steady_peak_bytes or measured.peak_bytes))
    if remedy.saved_seconds is not None and measured.step_seconds:
        shares.append(remedy.saved_seconds / measured.step_seconds)
    return sum(shares) if shares else None


def load_in_advance(measured: ScriptMeasurement, report: dict[str, Any]) -> Remedy | None:
    """Time waiting for data: workers, or batches cut from tensors at once."""
    waiting, step = measured.waiting_seconds, measured.step_seconds
    if not waiting or not step or not report["training"]:
        return None
    loader = max(report["training"], key=lambda seen: seen["batches"])
    waits = f"{format_seconds(waiting)} of a step of {format_seconds(step)} are spent waiting for data"
    cores = len(os.sched_getaffinity(0))
    if loader["dataset"] == "TensorDataset" and not report["frameworks"]:
        return Remedy(
            what=f"{waits}: the tensors are in memory already, so cut whole batches from them instead of collating rows",
            saved_seconds=0.9 * waiting,
            code=f"for rows in torch.randperm(len(x)).split({measured.micro_batch}):\n    inputs, targets = x[rows], y[rows]",
        )
    if loader["workers"] == 0 and cores > 1:
        workers = min(4, cores - 1)
        saved = waiting - max(0.0, waiting / workers - (step - waiting))
        return Remedy(
            what=f"{waits}: let {workers} worker{'s' * (workers > 1)} prepare the next batches meanwhile",
            saved_seconds=min(waiting, saved),
            code=_worker_code(report, workers),
        )
    return Remedy(
        what=f"{waits}: prepare the data once and keep them decoded, in memory or in one mapped file",
        saved_seconds=waiting / 2,
        code='x = numpy.load("prepared.npy", mmap_mode="r")',
    )


def _worker_code(report: dict[str, Any], workers: int) -> str:
    if _has_trainer(report):
        return f"TrainingArguments(..., dataloader_num_workers={workers}, dataloader_persistent_workers=True)"
    return f"DataLoader(..., num_workers={workers}, persistent_workers=True)"


def fuse_the_optimizer(measured: ScriptMeasurement, report: dict[str, Any]) -> Remedy | None:
    """A for-loop over parameters where torch has one kernel for all."""
    loops = [
        use
        for use in measured.optimizers
        if use.implementation == "loop" and use.seconds and use.name in ("Adam", "AdamW", "SGD", "Adagrad")
    ]
    if not loops:
        return None
    slowest = max(loops, key=lambda use: use.seconds or 0.0)
    trainer = _has_trainer(report) and slowest.name == "AdamW"
    return Remedy(
        what=f"{slowest.name} updates one parameter after another ({format_seconds(slowest.seconds or 0.0)} a step); its fused "
        "form computes the same update in one pass",
        saved_seconds=FUSED_SAVES * sum(use.seconds or 0.0 for use in loops),
        code='TrainingArguments(..., optim="adamw_torch_fused")' if trainer else f"torch.optim.{slowest.name}(..., fused=True)",
    )


def split_the_batch(measured: ScriptMeasurement, report: dict[str, Any]) -> Remedy | None:
    """Activations grow with the rows that are in memory at once."""
    activations, rows = measured.breakdown.get("activations", 0), measured.micro_batch or 0
    if rows < 2 or activations < 0.2 * _above_runtime(measured):
        return None
    half = rows // 2
    caution = "; batch normalisation then sees half the rows" if _any_root(report, "batch_statistics") else ""
    if _has_trainer(report):
        code = f"TrainingArguments(..., per_device_train_batch_size={half}, gradient_accumulation_steps=2)"
    elif _has_lightning(report):
        code = f"DataLoader(..., batch_size={half}); Trainer(..., accumulate_grad_batches=2)"
    else:
        code = (
            "for part, wanted in zip(inputs.chunk(2), targets.chunk(2)):\n"
            "    (loss_function(model(part), wanted) * len(part) / len(inputs)).backward()"
        )
    return Remedy(
        what=f"activations take {format_bytes(activations)}: pass half the rows at a time and add up gradients before the step "
        f"(the same gradient{caution})",
        saved_bytes=activations // 2,
        code=code,
    )


def recompute_activations(measured: ScriptMeasurement, report: dict[str, Any]) -> Remedy | None:
    """Checkpoint blocks, where the model offers it or nothing else divides its activations."""
    activations = measured.breakdown.get("activations", 0)
    offers = _any_root(report, "can_checkpoint") and not _any_root(report, "checkpoints")
    alone = measured.micro_batch == 1
    if not (offers or alone) or activations < 0.2 * _above_runtime(measured):
        return None
    if offers:
        trainer = _has_trainer(report)
        code = "TrainingArguments(..., gradient_checkpointing=True)" if trainer else "model.gradient_checkpointing_enable()"
    else:
        code = "hidden = torch.utils.checkpoint.checkpoint(block, hidden, use_reentrant=False)"
    return Remedy(
        what=f"activations take {format_bytes(activations)}: keep only each block's input and compute the rest again in the "
        "backward pass (about a third more time)",
        saved_bytes=int(CHECKPOINT_SAVES * activations),
        code=code,
    )


def shrink_optimizer_state(measured: ScriptMeasurement, report: dict[str, Any]) -> Remedy | None:
    """Two numbers a parameter where fewer would do."""
    state = measured.breakdown.get("optimizer", 0)
    names = {use.name for use in measured.optimizers if use.state_bytes >= 1.5 * use.parameter_bytes > 0}
    if not names or state < 0.1 * _above_runtime(measured):
        return None
    what = f"the state of {', '.join(sorted(names))} takes {format_bytes(state)}: "
    if measured.device == "cuda":
        return Remedy(
            what=what + "keep it in 8 bits (the updates change slightly)",
            saved_bytes=int(EIGHT_BIT_SAVES * state),
            code="torchao.optim.AdamW8bit(model.parameters(), ...)",
        )
    return Remedy(
        what=what + "keep it as row and column sums (the updates change: try the learning rate anew), or use SGD",
        saved_bytes=int(0.95 * state),
        code='TrainingArguments(..., optim="adafactor")'
        if _has_trainer(report)
        else "torch.optim.Adafactor(model.parameters(), ...)",
    )


def return_freed_memory(measured: ScriptMeasurement, report: dict[str, Any]) -> Remedy | None:
    """The C library keeps freed blocks; the resident peak is then far above what is live."""
    steady = measured.steady_peak_bytes
    if measured.device != "cpu" or steady is None or not report["samples"]:
        return None
    full = report["samples"][-1]["full"]
    coming = 0 if full["gradient_bytes"] else measured.breakdown.get("gradients", 0)
    kept = min(full["free"], steady - (full["resident"] - full["free"]) - coming)
    if kept < 0.2 * _above_runtime(measured):
        return None
    return Remedy(
        what=f"the C library keeps {format_bytes(kept)} of freed memory while a step runs: let it return large blocks at once "
        "(page faults then cost up to 45 % of the step's time; tcmalloc costs less and saves less)",
        saved_bytes=kept,
        code=f"MALLOC_MMAP_THRESHOLD_=65536 {shlex.join(measured.command)}",
    )


def free_gradients(measured: ScriptMeasurement, report: dict[str, Any]) -> Remedy | None:
    """Gradients that live through the next forward pass."""
    if not report["gradients_kept"]:
        return None
    # Where activations are smaller, the peak lies where gradients must live.
    saved = min(measured.breakdown.get("gradients", 0), measured.breakdown.get("activations", 0))
    return Remedy(
        what="gradients stay in memory, as zeros or the last step's, while the next forward pass runs: let them go",
        saved_bytes=saved,
        code="optimizer.zero_grad(set_to_none=True)",
    )


def evaluate_without_gradients(measured: ScriptMeasurement, report: dict[str, Any]) -> Remedy | None:
    """Evaluation that keeps activations for a backward pass which never comes."""
    if not report["evaluates_with_gradients"]:
        return None
    rows = max((seen["rows"] for seen in report["evaluation"]), default=0)
    kept = measured.breakdown.get("activations", 0) * rows // max(1, measured.micro_batch or 1)
    above = measured.peak_bytes - (measured.steady_peak_bytes or measured.peak_bytes)
    return Remedy(
        what="evaluation keeps activations for a backward pass that never comes",
        saved_bytes=min(kept, above) if kept and above > 0 else None,
        code="with torch.inference_mode():\n    outputs = model(inputs)",
    )


def use_single_precision(measured: ScriptMeasurement, report: dict[str, Any]) -> Remedy | None:
    """NumPy's default of 64 bits, carried into torch."""
    if any("float64" in seen["dtypes"] for seen in report["optimizers"]):
        everything = sum(size for name, size in measured.breakdown.items() if name not in ("runtime", "temporaries"))
        return Remedy(
            what="the model computes in float64: float32 halves memory and traffic",
            saved_bytes=everything // 2,
            saved_seconds=(measured.step_seconds or 0.0) / 2 or None,
            code="model.float(); inputs = inputs.float()",
        )
    if any("float64" in seen["dtypes"] for seen in report["training"]):
        return Remedy(
            what="batches come in float64 and are converted at every step: convert the data once",
            saved_bytes=measured.breakdown.get("data", 0) // 2,
            code='data = data.astype("float32")',
        )
    return None


def enlarge_the_batch(measured: ScriptMeasurement, report: dict[str, Any]) -> Remedy | None:
    """Steps so small that launching operators takes most of their time."""
    rows, step = measured.micro_batch, measured.step_seconds
    if not rows or not step:
        return None
    optimizer = sum(use.seconds or 0.0 for use in measured.optimizers)
    computing = step - (measured.waiting_seconds or 0.0) - optimizer
    overhead = OPERATOR_SECONDS * max((root["leaves"] for root in report["roots"]), default=0)
    if overhead < 0.5 * computing:
        return None
    saved = min(overhead, computing) / 2
    return Remedy(
        what=f"{rows} rows keep the processor busy for less time than launching their operators takes: twice the rows cost "
        "little more (saving for the same number of rows; try the learning rate anew)",
        saved_seconds=saved,
        code=f"TrainingArguments(..., per_device_train_batch_size={2 * rows})"
        if _has_trainer(report)
        else f"DataLoader(..., batch_size={2 * rows})",
    )


def _above_runtime(measured: ScriptMeasurement) -> int:
    """The part of the steady peak that the training itself takes."""
    return max(1, (measured.steady_peak_bytes or 0) - (measured.runtime_bytes or 0))


def _any_root(report: dict[str, Any], name: str) -> bool:
    return any(root[name] for root in report["roots"])


def _has_trainer(report: dict[str, Any]) -> bool:
    return "transformers.trainer" in report["frameworks"]


def _has_lightning(report: dict[str, Any]) -> bool:
    return bool({"lightning", "pytorch_lightning"} & set(report["frameworks"]))


RULES: tuple[Rule, ...] = (
    load_in_advance,
    fuse_the_optimizer,
    split_the_batch,
    recompute_activations,
    shrink_optimizer_state,
    return_freed_memory,
    free_gradients,
    evaluate_without_gradients,
    use_single_precision,
    enlarge_the_batch,
)
