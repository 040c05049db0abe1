"""What a callback of any loop may be given, read and checked, without a framework."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from delest import errors, methods, units
from delest.hardware import machine
from delest.records.form import read_json
from delest.records.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """A budget of resident bytes, a plan, the run folder, and when to stop early; None what was not asked for."""

    budget_bytes: int | None
    plan: Plan | None
    out: str | Path | None
    monitor: str | None
    mode: str | None
    patience: int | None

    @property
    def acts(self) -> bool:
        """Whether the loop's steps are changed at all, or only written down."""
        return self.budget_bytes is not None or self.plan is not None

    @property
    def followed(self) -> Plan:
        """The plan with the budget that is held; an empty one where none was given."""
        return replace(self.plan or Plan(batch_size=1, micro_batch=1), memory_bytes=self.budget_bytes)


def read(
    memory: str | int | None,
    plan: Plan | str | Path | None,
    *,
    out: str | Path | None,
    monitor: str | None,
    mode: str | None,
    patience: int | None,
) -> Wishes:
    """`memory` is "2GiB", bytes or "80%" of this machine's, None that of the plan. Raises `BadInput` with all faults."""
    faults = []
    if not isinstance(plan, (Plan, str, Path, type(None))):
        faults.append(f"a plan is a Plan or the path of a plan.json, not a {type(plan).__name__}.")
    if mode not in (None, "min", "max"):
        faults.append(f"mode is {mode!r}: it is 'min' or 'max', or left out.")
    if patience is not None and (not isinstance(patience, int) or isinstance(patience, bool) or patience < 1):
        faults.append(f"patience is {patience!r}: it is a number of evaluations, 1 or more.")
    here = machine.describe()
    most = here.memory_limit_bytes or here.memory_bytes
    budget: int | None = None
    found: Plan | None = None
    try:
        budget = None if memory is None else units.read_size(memory, most)
        if budget is not None and budget > most:
            faults.append(f"memory is {units.format_bytes(budget)}, and this machine has {units.format_bytes(most)}.")
        found = read_json(Plan, Path(plan)) if isinstance(plan, (str, Path)) else plan
        methods.configs(found or Plan(batch_size=1, micro_batch=1))  # names are known
    except errors.BadInput as error:
        faults += error.faults
    if faults:
        raise errors.BadInput(faults)
    if budget is None and found is not None and found.device == "cpu":
        budget = found.memory_bytes
    return Wishes(budget_bytes=budget, plan=found, out=out, monitor=monitor, mode=mode, patience=patience)
