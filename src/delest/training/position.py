"""Where a run stands: all that the loop knows besides the session, as JSON in every checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Position:
    """Mutable, one for each run. Steps and rows are counted from 0; `row` is the feed's position in the epoch."""

    step: int = 0
    epoch: int = 0
    row: int = 0
    total_steps: int = 0
    decay_from: int | None = None
    stopped_by: str | None = None  # what began the decay early
    rate_scale: float = 1.0  # halved by every setback
    setbacks: int = 0
    parts: int = 0  # micro-batches a step is made of; 0: as planned
    best_score: float | None = None
    best_loss: float | None = None
    best_step: int = 0
    best_epoch: float = 0.0
    waited: int = 0  # evaluations since the best
    validation: dict[str, float] | None = None  # at the best
    evaluated_step: int = -1
    decisions: int = 0  # how many lines of decisions.jsonl led here
    training_seconds: float = 0.0
    evaluating_seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
