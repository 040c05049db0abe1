"""Training on a small sample first: what it reaches, and what the full run will take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delest import errors, units
from delest.verbs.workplace import Workplace, backend, build_trainer, guarded_bytes

if TYPE_CHECKING:
    from delest.records.plan import Plan
    from delest.training.progress import Progress


def train_preview(place: Workplace, plan: Plan, share: float, say: Progress) -> dict[str, Any]:
    """Train on a stratified share of the training rows and say what the full run will take."""
    from delest.data import sample
    from delest.hardware import machine

    rows = sample(place.source, place.splits["train"], share, place.job.seed)
    full = len(place.splits["train"])
    if len(rows) < 2:
        raise errors.BadInput(f"a preview of {share:.2%} is {len(rows)} of {full} training rows: give a larger share.")
    epochs = place.job.recipe.epochs_for(full, place.job.batch_size)
    job = replace(place.job, recipe=replace(place.job.recipe, epochs=epochs), batch_size=min(place.job.batch_size, len(rows)))
    small = replace(place, job=job)
    say.stage(f"preview: {len(rows):,} of {full:,} training rows, {epochs} epochs")
    session = backend(job, place.source.schema).session(job, plan, place.source.schema)
    trainer = build_trainer(small, session, Path(), say, rows=rows, saving=False)
    trainer.limits = replace(trainer.limits, memory_bytes=guarded_bytes(plan))
    machine.reset_peak()
    trainer.train()
    p = trainer.position
    found: dict[str, Any] = {
        "share": share,
        "rows": len(rows),
        "epochs": epochs,
        "validation": p.validation or {},
        "seconds": p.training_seconds + p.evaluating_seconds,
        "full_seconds": p.training_seconds * full / len(rows) + p.evaluating_seconds,
        "peak_bytes": machine.peak_resident_bytes(),
    }
    shown = ", ".join(f"{name} {value:.4f}" for name, value in found["validation"].items())
    say.note(
        f"preview reached validation {shown}; the full run will take about {units.format_seconds(found['full_seconds'])} "
        f"and {units.format_bytes(found['peak_bytes'])}."
    )
    return found
