"""A plan's methods against the plain step: the same batches, seed and rates, a session each.

Rounding is amplified from step to step, so how far two ways may come apart depends on what a method states. One that is
bitwise must not differ at all. One that only rounds otherwise is compared in fp64, where twenty steps stay far below the
bound; where a model or its loss insists on fp32, over the first ten steps. What changes the mathematics
cannot be judged by its difference, which is reported.

`compare` is called through `delest.processes`; it takes and gives plain JSON.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from delest import errors
from delest.backends.torch import trail as trails
from delest.backends.torch.check import check
from delest.backends.torch.model import where
from delest.backends.torch.trail import Precision, Trail
from delest.data import Feed, Preprocessing, open_job, split
from delest.job import Job
from delest.records.batch import Batch
from delest.records.form import from_json, to_plain
from delest.records.plan import KEEPS, Choice, Keeps, Plan
from delest.records.source import Schema
from delest.records.verification import MethodCheck

TOLERANCES: dict[Precision, float] = {"fp64": 1e-9, "fp32": 1e-4}
FP32_STEPS = 10
WEIGHT_ROOM = 1e3  # times the tolerance, for weights
FACTOR = 2.0  # within which the mean loss of a method that changes the mathematics must stay
SPREAD = 10.0  # times as far as the plain step comes apart from itself, where it does
TOGETHER = "all together"


def compare(
    job: Job, *, preprocessing: dict[str, Any], plan: dict[str, Any], rates: list[float], rows: int, least_rows: int
) -> dict[str, Any]:
    """Compare each method of the plan, and all of them together where there are several, over a step for each rate.

    Batches have at most `rows` rows; fewer, down to `least_rows`, where memory runs out. Returns `rows` and `checks`
    (`MethodCheck`s). Raises `OutOfMemory`, and what building the job raises.
    """
    source, prepared = open_job(job), from_json(Preprocessing, preprocessing)
    train = split(source, job.split, job.seed)["train"]
    feed = Feed(source, train, prepared, batch_size=job.batch_size, seed=job.seed, augment=job.recipe.augment)
    first = next(feed.epoch(0))
    if faults := check(job, source.schema, _first_rows(first, 2), _first_rows(first, 32)):
        raise errors.BadInput(faults)
    while True:
        comparison = Comparison(job, from_json(Plan, plan), source.schema, feed, rates, rows)
        try:
            return {"rows": rows, "checks": [to_plain(item) for item in comparison.checks()]}
        except errors.OutOfMemory:
            if rows <= least_rows:
                raise
            rows = max(least_rows, rows // 2)


@dataclass
class Comparison:
    """One plan's methods on the first rows of each batch of a feed. The plain steps are made once for each way."""

    job: Job
    plan: Plan
    schema: Schema
    feed: Feed
    rates: Sequence[float]
    rows: int
    _made: dict[tuple[Precision, bool], Trail] = field(default_factory=dict)

    def checks(self) -> Iterator[MethodCheck]:
        choices = self.plan.choices
        for choice in choices:
            yield self.compare(choice.method, choice.keeps, (choice,))
        if len(choices) > 1:
            yield self.compare(TOGETHER, max((choice.keeps for choice in choices), key=KEEPS.index), choices)

    def compare(self, name: str, keeps: Keeps, choices: tuple[Choice, ...]) -> MethodCheck:
        """How the steps with these choices stand beside the plain ones. Raises `OutOfMemory` and what plain steps raise."""
        precision: Precision = "fp64" if keeps == "rounding" and self._in_double else "fp32"
        plain = self._plain(precision)
        blank = MethodCheck(name=name, keeps=keeps, ok=False, why="", precision=precision)
        if (step := _first_not_finite(plain.losses)) is not None:
            return replace(blank, why=f"the plain step's own loss is not finite at step {step}: nothing can be compared.")
        try:
            made = self._follow(choices, precision)
            if (step := _first_not_finite(made.losses)) is not None:
                return replace(blank, why=f"its loss is not finite at step {step}, the plain step's is.")
            if keeps in ("bitwise", "rounding"):
                return self._judge(blank, choices, plain, made)
            return self._report(blank, plain, made, f"{keeps}: the difference is not judged")
        except errors.OutOfMemory:
            raise
        except Exception as error:  # whatever a method does wrong, the others are still compared
            return replace(blank, why=f"steps with it fail: {where(error)}.")

    def _judge(self, blank: MethodCheck, choices: tuple[Choice, ...], plain: Trail, made: Trail) -> MethodCheck:
        """By the tolerance; where that is not met, once more without what may differ for another reason."""
        tolerances = _tolerances(blank)
        check = _judged(blank, plain, made, tolerances, "")
        if check.ok:
            return check
        if blank.keeps == "rounding" and plain.drew:
            return self._judge_still(blank, choices)
        again = _compared(blank, plain, self._follow((), blank.precision), check.steps)
        spread = {name: _judging(again)[name] for name in tolerances}
        if not 0 < max(spread.values()) < math.inf:
            return check
        if max(spread.values()) > TOLERANCES["fp32"]:
            words = f"the plain step does not repeat itself here (differs by {max(spread.values()):.1g}): nothing can be judged"
            return self._report(blank, plain, made, words)
        words = f"; the plain step differs from itself here, and {SPREAD:g} times as much is allowed"
        wider = {name: max(bound, SPREAD * spread[name]) for name, bound in tolerances.items()}
        return _judged(blank, plain, made, wider, words)

    def _judge_still(self, blank: MethodCheck, choices: tuple[Choice, ...]) -> MethodCheck:
        """Without dropout: a mask is drawn for what is in memory at once, in its order there, so that two ways which are the
        same but for that draw others."""
        plain = self._plain(blank.precision, dropping=False)
        made = self._follow(choices, blank.precision, dropping=False)
        if plain.drew:  # by functions that no layer stands for
            words = (
                "the step draws random numbers outside dropout layers, which cannot be held still: not judged by its difference"
            )
            return self._report(blank, plain, made, words)
        return _judged(blank, plain, made, _tolerances(blank), ", dropout off: with it on, other masks are drawn")

    def _report(self, blank: MethodCheck, plain: Trail, made: Trail, words: str) -> MethodCheck:
        """Differences as they are; losses must stay within `FACTOR` of the plain ones in the mean."""
        steps = len(plain.losses)
        check = _compared(blank, plain, made, steps)
        before, after = statistics.fmean(plain.losses), statistics.fmean(made.losses)
        near = before <= 0 or before / FACTOR <= after <= before * FACTOR
        told = f"mean loss {after:.4g} against {before:.4g}, {'within' if near else 'not within'} a factor of {FACTOR:g}"
        if math.inf in _named_differences(check).values():
            return _finite(replace(check, why=f"{words}; gradients or weights are not finite, or of another shape."))
        return replace(check, ok=near, why=f"{words}; {told} over {steps} steps.")

    @cached_property
    def _in_double(self) -> bool:
        few = _first_rows(next(self._batches()), 8)
        return trails.stays_double(self.job, self._with(()), self.schema, few)

    def _plain(self, precision: Precision, dropping: bool = True) -> Trail:
        if (precision, dropping) not in self._made:
            self._made[precision, dropping] = self._follow((), precision, dropping)
        return self._made[precision, dropping]

    def _follow(self, choices: tuple[Choice, ...], precision: Precision, dropping: bool = True) -> Trail:
        plan, batches = self._with(choices), self._batches()
        return trails.follow(self.job, plan, self.schema, batches, self.rates, precision=precision, dropping=dropping)

    def _with(self, choices: tuple[Choice, ...]) -> Plan:
        split = any(choice.method == "micro_batch" for choice in choices)
        rows = self.plan.micro_batch if split else self.plan.batch_size
        return replace(self.plan, choices=choices, micro_batch=rows, memory_bytes=None)

    def _batches(self) -> Iterator[Batch]:
        """As training gets them, without end; read anew each time, since many may not fit in memory."""
        for epoch in itertools.count():
            for batch in self.feed.epoch(epoch):
                yield _first_rows(batch, self.rows)


def _tolerances(check: MethodCheck) -> dict[str, float]:
    """Of each difference that is judged. An optimizer like Adam divides by the gradient's size, so that gradients which are
    rounding errors alone (a bias before a normalisation) move weights by much more: in fp64 those get more room, in fp32
    they are not judged."""
    if check.keeps == "bitwise":
        return {"losses": 0.0, "gradients": 0.0, "weights": 0.0}
    tolerance = TOLERANCES[check.precision]
    both = {"losses": tolerance, "gradients": tolerance}
    return both if check.precision == "fp32" else {**both, "weights": WEIGHT_ROOM * tolerance}


def _judged(blank: MethodCheck, plain: Trail, made: Trail, tolerances: dict[str, float], words: str) -> MethodCheck:
    """A check with its verdict."""
    rounded = _is_rounded(blank)
    steps = min(FP32_STEPS, len(plain.losses)) if rounded else len(plain.losses)
    check = _compared(blank, plain, made, steps)
    check = replace(check, tolerance=tolerances["losses"], weight_tolerance=tolerances.get("weights"))
    found = _judging(check)
    beyond = {name: bound for name, bound in tolerances.items() if not found[name] <= bound}
    over = f"{'the first ' if rounded else ''}{steps} steps in {blank.precision}"
    insists = " (the model or its loss does not stay in fp64)" if rounded else ""
    if beyond:
        said = " and ".join(f"{name} differ by more than {bound:.1g}" for name, bound in beyond.items())
    else:
        said = _within(check)
    return _finite(replace(check, ok=not beyond, why=f"{said} over {over}{insists}{words}."))


def _within(check: MethodCheck) -> str:
    if not check.tolerance:
        return "the same to the last bit"
    weights = "not judged" if check.weight_tolerance is None else f"within {check.weight_tolerance:.1g}"
    return f"within {check.tolerance:.1g}, weights {weights},"


def _compared(blank: MethodCheck, plain: Trail, made: Trail, steps: int) -> MethodCheck:
    """A check with its differences; infinite ones where values are not finite or shapes differ."""
    return replace(
        blank,
        steps=steps,
        loss_difference=trails.loss_difference(plain.losses[:steps], made.losses[:steps]),
        gradient_difference=trails.tensor_difference(plain.gradients, made.gradients),
        weight_difference=trails.weight_difference(plain, made),
    )


def _is_rounded(check: MethodCheck) -> bool:
    return check.keeps == "rounding" and check.precision == "fp32"


def _judging(check: MethodCheck) -> dict[str, float]:
    found = {"losses": check.loss_difference, "gradients": check.gradient_difference, "weights": check.weight_difference}
    return {name: math.inf if value is None else value for name, value in found.items()}


def _named_differences(check: MethodCheck) -> dict[str, float | None]:
    return {name: getattr(check, name) for name in ("loss_difference", "gradient_difference", "weight_difference")}


def _finite(check: MethodCheck) -> MethodCheck:
    """None in place of differences that are infinite."""
    known = {name: None if value is None or math.isinf(value) else value for name, value in _named_differences(check).items()}
    return replace(check, **known)  # type: ignore[arg-type]


def _first_not_finite(losses: Sequence[float]) -> int | None:
    """The first step, counted from 1, whose loss is NaN or infinite."""
    return next((step for step, loss in enumerate(losses, 1) if not math.isfinite(loss)), None)


def _first_rows(batch: Batch, rows: int) -> Batch:
    if rows >= batch.count:
        return batch

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: cut(item) for name, item in value.items()}
        if isinstance(value, tuple):
            return tuple(cut(item) for item in value)
        return value[:rows] if isinstance(value, np.ndarray) else value

    return Batch(cut(batch.inputs), cut(batch.targets), batch.index[:rows], batch.epoch, rows)
