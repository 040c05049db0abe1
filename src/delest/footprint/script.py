"""A training script run as it is and watched through hooks (`watch/`): what it took, and what would help most.

The script may belong to another environment: its Python finds `watch/sitecustomize.py` through PYTHONPATH and leaves a report
in a folder, which is read here once it has ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from delest import errors
from delest.footprint.remedies import find_remedies
from delest.records.footprint import Timeline
from delest.records.script import OptimizerUse, ScriptMeasurement
from delest.units import format_bytes

WATCH = Path(__file__).parent / "watch"
# What a process manager or a terminal sends to the command that it knows of.
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
HAS_FUSED_ON_CPU = {"Adam", "AdamW", "SGD", "Adagrad"}
HAS_FOREACH = HAS_FUSED_ON_CPU | {"Adadelta", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop"}


def measure_script(command: Sequence[str], *, timeline: bool = False) -> ScriptMeasurement:
    """Run `command` (`python train.py ARGS`, `torchrun ...`, any executable) and tell what its training took.

    Its standard input, output and errors are those of this process, and signals sent to this process are passed on. With
    `timeline` the memory of one step is recorded operator by operator. Raises `BadInput` where there is no such command.
    """
    if not command:
        raise errors.BadInput("there is no command to measure: write it after --, as in delest measure -- python train.py.")
    with tempfile.TemporaryDirectory(prefix="delest-") as folder:
        began = time.perf_counter()
        status, largest_bytes = _run(command, _environment(folder, timeline))
        seconds = time.perf_counter() - began
        reports = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    ended = ScriptMeasurement(command=tuple(command), status=status, seconds=seconds, peak_bytes=largest_bytes)
    notes = tuple(note for report in reports for note in report["notes"])
    steps = [report for report in reports if report["steps"]]
    if not steps:
        return replace(ended, notes=(*notes, _why_nothing(reports)))
    chief = max(steps, key=lambda report: (report["steps"], -report["rank"]))
    if len(steps) > 1:
        peaks = ", ".join(format_bytes(report["peak_bytes"]) for report in steps)
        notes += (f"{len(steps)} processes took steps; shown is that of rank {chief['rank']}. Their peaks: {peaks}.",)
    measured = read_report(replace(ended, notes=notes), chief)
    return replace(measured, remedies=find_remedies(measured, chief))


def _environment(folder: str, timeline: bool) -> dict[str, str]:
    paths = [str(WATCH), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "DELEST_WATCH_REPORTS": folder,
        "DELEST_WATCH_TIMELINE": "1" if timeline else "0",
    }


def _run(command: Sequence[str], environment: dict[str, str]) -> tuple[int, int]:
    """The command's exit status as a shell counts it, and the largest resident set of it and of what it waited for."""
    try:
        process = subprocess.Popen(list(command), env=environment)
    except OSError as error:
        found = shutil.which(command[0])
        reason = f"{error.strerror}: {found}" if found else "no such command on PATH and no such file"
        raise errors.BadInput(f"{command[0]!r} cannot be run ({reason}). Write the script as you start it yourself.") from None
    with _signals_passed_on(process.pid):
        _, ended, usage = os.wait4(process.pid, 0)
    code = process.returncode = os.waitstatus_to_exitcode(ended)
    return (code if code >= 0 else 128 - code), usage.ru_maxrss * 1024


@contextlib.contextmanager
def _signals_passed_on(child: int) -> Iterator[None]:
    """While the child runs, what is sent to this process goes to it; Ctrl-C reaches it from the terminal already."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def pass_on(number: int, _: object) -> None:
        if not (number == signal.SIGINT and _is_in_foreground()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)

    before = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_in_foreground() -> bool:
    """Whether a terminal's Ctrl-C goes to the group of processes that this one and its child are in."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


def _why_nothing(reports: list[dict[str, Any]]) -> str:
    largest = "The peak is that of the largest process."
    if not reports:
        return (
            "no Python process imported torch where it could be seen (python -I, -E and -S cannot be watched, nor can one "
            f"whose PYTHONPATH the command sets anew). {largest}"
        )
    return (
        "no optimizer of torch took a step in the script's own process; one that is itself compiled, or that works in a "
        f"process which multiprocessing started, is not seen. {largest}"
    )


def read_report(ended: ScriptMeasurement, report: dict[str, Any]) -> ScriptMeasurement:
    """What the watched process wrote, in the terms of the record; `ended` says how the command ended."""
    cuda = report["cuda_reserved_bytes"] is not None
    training = report["training"]
    largest = max(training, key=lambda seen: seen["bytes"]) if training else None
    steady = report["cuda_reserved_bytes"] if cuda else report["steady_peak_bytes"]
    optimizers = tuple(_optimizer(seen, cuda) for seen in report["optimizers"])
    breakdown, retained = _break_down(report, steady, cuda)
    notes = [*ended.notes, *_notes(report, cuda, steady)]
    measured = replace(
        ended,
        peak_bytes=report["cuda_reserved_bytes"] if cuda else report["peak_bytes"],
        steady_peak_bytes=steady,
        runtime_bytes=breakdown.get("runtime"),
        breakdown=breakdown,
        device="cuda" if cuda else "cpu",
        resident_peak_bytes=report["peak_bytes"] if cuda else None,
        allocated_bytes=report["cuda_allocated_bytes"],
        retained_bytes=retained,
        steps=report["steps"],
        optimizers=optimizers,
        parameters=_parameters(report),
        micro_batch=(largest["rows"] or None) if largest else None,
        timeline=_timeline(report),
        notes=tuple(notes),
    )
    return _with_times(measured, report, cuda)


def _with_times(measured: ScriptMeasurement, report: dict[str, Any], cuda: bool) -> ScriptMeasurement:
    intervals = [interval for interval in report["intervals"] if not interval[5]] or report["intervals"]
    if not intervals:
        return measured
    seconds, waited, backward, rows, _, _ = zip(*intervals, strict=True)
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    return replace(
        measured,
        step_seconds=statistics.median(seconds),
        step_seconds_spread=quartiles[2] - quartiles[0],
        waiting_seconds=statistics.mean(waited) if report["training"] else None,
        backward_seconds=None if cuda or not any(backward) else statistics.median(backward),
        batch_rows=round(statistics.median(rows)) or None,
    )


def _notes(report: dict[str, Any], cuda: bool, steady: int | None) -> Iterator[str]:
    if report["steps"] <= report["warm_up"]:
        yield f"{report['steps']} steps are too few to tell times and a steady peak: run at least {report['warm_up'] + 3}."
    elif steady is None:
        yield "the system does not let the peak be reset, so that of steady steps is not known apart."
    if cuda:
        yield (
            "the peak is what torch reserved on the device since the script last reset it; the driver's context is not "
            "in it, and warm-up is."
        )
    if len(report["optimizers"]) > 1:
        yield f"a step is one of {report['optimizers'][0]['name']}, the first of {len(report['optimizers'])} optimizers."


def _optimizer(seen: dict[str, Any], cuda: bool) -> OptimizerUse:
    return OptimizerUse(
        name=seen["name"],
        steps=seen["steps"],
        parameter_bytes=seen["parameter_bytes"],
        state_bytes=seen["state_bytes"],
        implementation=_implementation(seen),
        seconds=None if cuda else seen["seconds"],
    )


def _implementation(seen: dict[str, Any]) -> str | None:
    """Which of torch's loops the optimizer takes; foreach is the default where every parameter is on a GPU
    (https://docs.pytorch.org/docs/stable/optim.html#algorithms)."""
    if seen["name"] not in HAS_FOREACH:
        return None
    if seen["settings"].get("fused"):
        return "fused"
    default = bool(seen["devices"]) and set(seen["devices"]) <= {"cuda", "xpu"}
    return "foreach" if seen["settings"].get("foreach", default) else "loop"


def _parameters(report: dict[str, Any]) -> int | None:
    counts = [root["parameters"] for root in report["roots"]]
    return max([sum(seen["parameters"] for seen in report["optimizers"]), *counts], default=None)


def _known_bytes(report: dict[str, Any]) -> dict[str, int]:
    """What can be told from the tensors themselves."""
    optimizers = report["optimizers"]
    return {
        "parameters": report["parameter_bytes"],
        "buffers": sum(root["buffer_bytes"] for root in report["roots"]),
        "gradients": sum(seen["gradient_bytes"] for seen in optimizers),
        "optimizer": sum(seen["state_bytes"] for seen in optimizers),
        "data": max((seen["bytes"] for seen in report["training"]), default=0),
    }


def _break_down(report: dict[str, Any], steady: int | None, cuda: bool) -> tuple[dict[str, int], int | None]:
    """Bytes by category, which sum to the steady peak, and what the allocator kept free when a backward pass began.

    Activations are what came to be in use between two steps' end and the backward pass that follows. Temporaries are the
    remainder: what the backward pass and the update make, and what the allocator keeps.
    """
    known = _known_bytes(report)
    if steady is None or not report["samples"]:
        return {}, None
    rest = report["samples"][-1]["rest"]
    grown = [
        (sample["full"]["used"] - sample["full"]["gradient_bytes"])
        - (sample["rest"]["used"] - sample["rest"]["gradient_bytes"])
        for sample in report["samples"]
    ]
    if cuda:
        runtime = 0
    else:
        standing = known["parameters"] + known["buffers"] + known["optimizer"] + known["data"] + rest["gradient_bytes"]
        runtime = max(0, rest["resident"] - rest["free"] - standing)
    sizes = {**known, "activations": max(0, *grown), "runtime": runtime}
    if (timed := report["timeline"]) and timed["activations"]:
        sizes["activations"] = max(timed["activations"])
    excess = sum(sizes.values()) - steady
    # Parameters mapped from a file need not be resident, and live sizes are rounded: the least certain figures give way.
    for name in ("runtime", "activations", "gradients", "data", "optimizer", "buffers", "parameters"):
        given = min(max(excess, 0), sizes[name])
        sizes[name] -= given
        excess -= given
    order = ("parameters", "buffers", "gradients", "optimizer", "activations")
    breakdown = {name: sizes[name] for name in order}
    breakdown["temporaries"] = steady - sum(sizes.values())
    return {**breakdown, "data": sizes["data"], "runtime": sizes["runtime"]}, report["samples"][-1]["full"]["free"]


def _timeline(report: dict[str, Any]) -> Timeline | None:
    """The recorded step on top of what stands throughout it."""
    timed = report["timeline"]
    if not timed or not timed["position"]:
        return None
    known, count = _known_bytes(report), len(timed["position"])
    standing = {name: [known[name]] * count for name in ("parameters", "buffers", "optimizer", "data")}
    moving = {name: timed[name] for name in ("gradients", "activations", "temporaries")}
    if report["gradients_kept"]:
        moving["gradients"] = [known["gradients"]] * count
    categories = {**standing, **moving}
    live = [sum(values) for values in zip(*categories.values(), strict=True)]
    return Timeline(position=timed["position"], phase=timed["phase"], categories=categories, peak=live.index(max(live)))
