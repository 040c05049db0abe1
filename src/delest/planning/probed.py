"""The plan for one job on one machine from a probe's figures alone: the largest micro-batch that fits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from delest import errors, methods
from delest.planning.request import EXACT, MARGIN, MARGIN_BYTES, SLACK_BYTES, Request, make_choice, notes
from delest.records.footprint import Footprint
from delest.records.form import to_json
from delest.records.plan import Choice, Plan, Rejection
from delest.units import format_bytes, format_seconds

FARTHER = (
    0.3  # of what the line adds beyond the largest probed rows: what malloc and frameworks keep grows in steps (docs/log.md)
)
LEAST_GAIN = 0.05  # a method that gains less than this share of the step's time is not worth a change


@dataclass(frozen=True)
class Costs:
    """A probe's figures as functions of the rows that are in memory at once. Bytes are of the whole process."""

    idle_bytes: int
    probe: Mapping[str, Any]

    def phases(self, rows: int, batch_size: int) -> dict[str, int]:
        """Expected bytes by phase."""
        added = self.probe["weights_bytes"] if rows < batch_size else 0  # gradients of earlier parts stay meanwhile
        start = self.idle_bytes + self.probe["base_bytes"]
        return {
            "start": start,
            "first_step": self.idle_bytes + self._line("first", rows) + added,
            "steady_step": self.idle_bytes + self._line("steady", rows) + added,
            "evaluation": self.idle_bytes + self._line("evaluation", rows),
            "saving": start + self.probe["largest_bytes"],  # arrays are written, and read, one by one
            "resuming": start + self.probe["largest_bytes"],
        }

    def _line(self, name: str, rows: int) -> int:
        """The straight line through the probed sizes (and the built session at 0 rows), never falling."""
        points = [(sample["rows"], sample[name]) for sample in self.probe["samples"]]
        (low_rows, low), (high_rows, high) = (
            (points[0], points[-1]) if len(points) > 1 else ((0, self.probe["base_bytes"]), points[0])
        )
        slope = max(0.0, (high - low) / (high_rows - low_rows))
        return int(max(high if rows >= high_rows else 0, high + slope * (rows - high_rows), self.probe["base_bytes"]))

    def seconds(self, batch_size: int) -> float:
        """Of one step on the whole batch, from the largest probed size."""
        largest = self.probe["samples"][-1]
        return largest["seconds"] * batch_size / largest["rows"]

    def footprint(self, rows: int, batch_size: int, seconds: float, device: str, isolated: bool) -> Footprint:
        phases = self.phases(rows, batch_size)
        peak = max(phases.values())
        probed = max(self.phases(min(rows, self.probe["samples"][-1]["rows"]), batch_size).values())
        margin = int(MARGIN * (peak - self.idle_bytes) + FARTHER * (peak - probed)) + MARGIN_BYTES
        return Footprint(
            peak_bytes=peak,
            runtime_bytes=self.idle_bytes,
            low_bytes=max(self.idle_bytes, peak - margin),
            high_bytes=peak + margin,
            phases=phases,
            step_seconds=seconds,
            batch_size=batch_size,
            micro_batch=rows,
            device=device,
            basis="estimate",
            how="probe",
            isolated=isolated,
        )


def plain_footprint(request: Request, faster: Sequence[Choice]) -> Footprint:
    """The plain step on the whole batch."""
    return _predict(request, faster, request.job.batch_size)


def _predict(request: Request, faster: Sequence[Choice], rows: int) -> Footprint:
    costs, batch = Costs(request.idle_bytes, request.probe), request.job.batch_size
    return costs.footprint(rows, batch, predicted_seconds(request, faster), request.probe["device"], request.isolated)


def predicted_seconds(request: Request, faster: Sequence[Choice]) -> float:
    """Of one step on the whole batch with these choices, each as much faster as it was in the probe."""
    chosen = [request.probe["variants"].get(choice.method) for choice in faster]
    whole = Costs(request.idle_bytes, request.probe).seconds(request.job.batch_size)
    return whole * math.prod(times["with"] / times["plain"] for times in chosen if times)


def choose(request: Request, faster: Sequence[Choice], rejected: Sequence[Rejection]) -> Plan:
    """The plan with the largest micro-batch whose peak, margin included, keeps within the budget; `faster` are choices made for speed.

    Raises `NothingFits` with the smallest budget that works.
    """
    job, probe, budget_bytes, idle_bytes = request.job, request.probe, request.budget_bytes, request.idle_bytes
    batch, choices, rejected = job.batch_size, [*faster], [*rejected]

    def predict(rows: int) -> Footprint:
        return _predict(request, faster, rows)

    plain = predict(batch)
    least = min((request.least_rows, batch), key=lambda rows: predict(rows).high_bytes)  # parts keep gradients besides
    if predict(least).high_bytes > budget_bytes:
        smallest = predict(least).high_bytes + SLACK_BYTES
        at_least = choose(replace(request, budget_bytes=smallest), faster, rejected)
        raise errors.NothingFits(
            f"nothing fits {format_bytes(budget_bytes)}: with {least} row{'s' * (least > 1)} at a time training still needs up to "
            f"{format_bytes(smallest)}, of which the libraries alone take {format_bytes(idle_bytes)}. "
            f"The smallest budget that works is --memory {math.ceil(smallest / 2**20)}MiB.",
            smallest,
            to_json(at_least),
        )
    rows = batch if plain.high_bytes <= budget_bytes else _largest(predict, least, batch, budget_bytes)
    if rows < batch:
        parts = math.ceil(batch / rows)
        saved = plain.peak_bytes - predict(rows).peak_bytes
        why = f"the whole batch of {batch} would need up to {format_bytes(plain.high_bytes)}; {parts} parts of {rows} need up to {format_bytes(predict(rows).high_bytes)}"
        choices.append(make_choice("micro_batch", {"rows": rows}, probe, why, saved_bytes=saved))
    else:
        rejected.append(
            Rejection(method="micro_batch", why=f"the whole batch of {batch} fits, up to {format_bytes(plain.high_bytes)}")
        )
    return Plan(
        choices=tuple(choices),
        batch_size=batch,
        micro_batch=rows,
        memory_bytes=budget_bytes if request.asked else None,
        predicted=predict(rows),
        plain=replace(plain, step_seconds=predicted_seconds(request, ())),
        rejected=tuple(rejected),
        threads=request.threads,
        device=probe["device"],
        code="\n".join(methods.named(choice.method).code(choice.config) for choice in choices),
        notes=notes(request, rows),
    )


def _largest(predict: Any, least: int, batch: int, budget_bytes: int) -> int:
    """The fewest equal parts that fit: rows are halved by parts, so that no part is much smaller than the others."""
    for parts in range(2, batch + 1):
        rows = math.ceil(batch / parts)
        if rows <= least:
            break
        if predict(rows).high_bytes <= budget_bytes:
            return rows
    return least


def faster(request: Request) -> tuple[list[Choice], list[Rejection]]:
    """Methods that the recipe asks for, and those that the probe saw gain."""
    job, probe = request.job, request.probe
    choices: list[Choice] = []
    rejected: list[Rejection] = []
    if job.recipe.memory_format == "channels_last":
        choices.append(make_choice("memory_format", {"format": "channels_last"}, probe, "the recipe asks for it"))
    if job.recipe.precision == "bf16":
        choices.append(make_choice("precision", {"dtype": "bf16"}, probe, "the recipe asks for it"))
    configs: dict[str, dict[str, Any]] = {
        "memory_format": {"format": "channels_last"},
        "precision": {"dtype": "bf16"},
        "threads": {"count": 1},
    }
    for method, times in probe["variants"].items():
        gain = 1 - times["with"] / times["plain"]
        measured = f"{format_seconds(times['with'])} a probe step against {format_seconds(times['plain'])}"
        keeps = methods.named(method).keeps(configs[method], batch_statistics=probe["batch_statistics"])
        if request.exact and keeps not in EXACT:
            rejected.append(Rejection(method=method, why=f"it changes the results ({keeps}), and exact ones are asked for"))
        elif gain >= LEAST_GAIN:
            cost = predicted_seconds(request, choices) * -gain
            choices.append(make_choice(method, configs[method], probe, f"faster here: {measured}", cost_seconds=cost))
        else:
            rejected.append(Rejection(method=method, why=f"no gain here: {measured}"))
    if job.recipe.precision == "auto" and "precision" not in probe["variants"]:
        slower = "bf16 products are slower than fp32 on this processor"
        rejected.append(Rejection(method="precision", why=probe.get("unsuited", {}).get("precision", slower)))
    return choices, rejected
