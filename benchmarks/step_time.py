"""How long a training step takes, as predicted before it runs, against the step itself: the zoo on one thread.

    python benchmarks/step_time.py [--only CASE] [--minutes N]

Each case is measured in a process of its own (`step_time_child.py`), in processor time. Two questions:

- From the roofline alone: the case is traced on fake tensors and held to this machine's rates, which are measured anew when the
  benchmark begins. `error` is predicted over measured, less one; `prediction` has its seconds by phase and what binds it.
- From one probe: the case's own measured step predicts another one, `probe_error`: every second case with twice the
  batch, the others with the other optimizer (SGD for AdamW, AdamW for SGD, in the same implementation).

Held-out cases were never used to set a rule; they have their own bounds.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: kernels are probed as they are measured
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import results_file
import torch
import zoo

from delest.backends.torch.loops import ModuleLoop, Program
from delest.backends.torch.trace import trace_loop
from delest.footprint.scratch import scratch
from delest.footprint.time import StepTime, scale, step_time
from delest.hardware.roofline import measure_roofline
from delest.records.hardware import Roofline
from delest.records.trace import Trace

CHILD = Path(__file__).with_name("step_time_child.py")
ROOFLINE_BOUND, PROBE_BOUND = 0.25, 0.12  # of the median error
CHILD_SECONDS = 600.0


def run_case(case: zoo.Case, pair: str, roofline: Roofline) -> dict[str, Any]:
    """The row of one case: its own step predicted from the roofline, and the pair's from its own."""
    other = other_case(case, pair)
    trace = trace_case(case)
    predicted = step_time(trace, roofline, rows=case.batch_size)
    measured = measure(case)
    other_trace = trace if pair == "double batch" else trace_case(other)
    other_predicted = step_time(other_trace, roofline, rows=other.batch_size)
    other_measured = measure(other)
    from_probe = scale(by_phase(measured, predicted), predicted, other_predicted)
    return {
        "row": case.name,
        "held_out": case.held_out,
        "measured_seconds": measured["step_seconds"],
        "predicted_seconds": predicted.seconds,
        "error": predicted.seconds / measured["step_seconds"] - 1,
        "prediction": {**predicted.phases, "bound_by": predicted.bound_by, "flops": predicted.flops},
        "pair": pair,
        "pair_measured_seconds": other_measured["step_seconds"],
        "pair_predicted_seconds": from_probe,
        "probe_error": from_probe / other_measured["step_seconds"] - 1,
        "rates": {"reused_bytes": roofline.reused_bytes, "fresh_bytes": roofline.fresh_bytes, **roofline.flops},
    }


def choose_pair(position: int, case: zoo.Case) -> str:
    """Networks with sparse gradients have no other optimizer: AdamW takes dense ones only."""
    return "double batch" if position % 2 == 0 or case.kind == "recommender" else "other optimizer"


def other_case(case: zoo.Case, pair: str) -> zoo.Case:
    if pair == "double batch":
        return dataclasses.replace(case, batch_size=2 * case.batch_size)
    return dataclasses.replace(case, optimizer_name="sgd" if case.optimizer_name == "adamw" else "adamw")


def trace_case(case: zoo.Case) -> Trace:
    inputs, targets = case.inputs(case.batch_size)
    program = Program(model=case.model, inputs=inputs, targets=targets, loss=case.loss, optimizer=case.optimizer)
    return trace_loop(lambda mode: ModuleLoop(program, mode), case.batch_size, scratch=scratch)


def measure(case: zoo.Case) -> dict[str, Any]:
    """What `step_time_child.py` says. Raises CalledProcessError where it fails."""
    command = [sys.executable, str(CHILD), case.name, str(case.batch_size), case.optimizer_name]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=CHILD_SECONDS)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def by_phase(measured: dict[str, Any], predicted: StepTime) -> dict[str, float]:
    """Measured seconds of the phases; forward and backward, which were measured together, in the proportion predicted."""
    rest, both = (
        measured["step_seconds"] - measured["update_seconds"],
        predicted.phases["forward"] + predicted.phases["backward"],
    )
    shares = {phase: rest * predicted.phases[phase] / both for phase in ("forward", "backward")}
    return {**shares, "update": measured["update_seconds"]}


def measure_anew() -> Roofline:
    """This machine's rates now, whatever is in the user's cache."""
    kept = os.environ.get("DELEST_CACHE")
    with tempfile.TemporaryDirectory(prefix="delest-") as folder:
        os.environ["DELEST_CACHE"] = folder
        try:
            return measure_roofline(1)
        finally:
            os.environ.pop("DELEST_CACHE")
            if kept is not None:
                os.environ["DELEST_CACHE"] = kept


def bounds_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over all cases and over the held-out ones."""
    found = []
    for group, chosen in (("all cases", rows), ("held out", [row for row in rows if row["held_out"]])):
        for what, column, bound in (("roofline alone", "error", ROOFLINE_BOUND), ("one probe", "probe_error", PROBE_BOUND)):
            median = statistics.median(abs(row[column]) for row in chosen)
            found.append(results_file.bound_at_most(f"{what}, {group}: median error", median, bound))
    return found


def main() -> None:
    cases = zoo.load_cases()
    options = results_file.read_options(__doc__.splitlines()[0], [case.name for case in cases])
    torch.set_num_threads(1)
    rows = {row["row"]: row for row in results_file.kept_rows("step_time")}
    began, roofline = time.monotonic(), measure_anew()
    print(f"{'case':28}{'measured':>10}{'roofline':>10}{'error':>8}   {'pair':18}{'measured':>10}{'probe':>10}{'error':>8}")
    for position, case in enumerate(cases):
        if case.name not in options.only or time.monotonic() - began > 60 * options.minutes:
            continue
        rows[case.name] = run_case(case, choose_pair(position, case), roofline)
        show(rows[case.name])
        complete = all(one.name in rows for one in cases)
        ordered = [rows[one.name] for one in cases if one.name in rows]
        results_file.write_results("step_time", ordered, bounds_of(ordered) if complete else [])
        if complete:
            for bound in bounds_of(ordered):
                kept = "kept" if bound["ok"] else "NOT KEPT"
                print(f"{bound['name']}: {bound['value']:.1%}, at most {bound['bound']:.0%}: {kept}")
    print(f"written to {results_file.RESULTS / 'step_time.json'}")


def show(row: dict[str, Any]) -> None:
    own = f"{row['measured_seconds']:>8.3f} s{row['predicted_seconds']:>8.3f} s{row['error']:>+8.0%}"
    pair = f"{row['pair']:18}{row['pair_measured_seconds']:>8.3f} s{row['pair_predicted_seconds']:>8.3f} s{row['probe_error']:>+8.0%}"
    print(f"{row['row'] + (' (held out)' if row['held_out'] else ''):28}{own}   {pair}", flush=True)


if __name__ == "__main__":
    main()
