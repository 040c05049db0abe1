"""A run with a budget of memory is a child of the command: where memory kills or crashes it, it goes on in smaller parts.

Code of libraries may end a process on a failed allocation, which no handler catches, and so may the system.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from delest import errors, runs, storage, units

VARIABLE = "DELEST_SUPERVISED"  # names the file in which a command and the process of its run tell each other what they must
CRASHES = (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)
TRIES = 6  # processes a run may take
NEAR_BYTES = 8 << 20  # below its budget a run cannot come by allocations that the guard lets through
_KEPT = ("--time", "--checkpoint-every")  # may be given anew; all else a run knows from its folder
_DIE_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG, https://man7.org/linux/man-pages/man2/PR_SET_PDEATHSIG.2const.html
restartable = False  # this process is delest's own command line, which may be started anew as it was


def crash() -> str | None:
    """How the process before this one was ended, in words; None where this is the first, or nobody supervises."""
    return None if (path := _told()) is None else _read(path).get("crash")


def tell(folder: Path, budget_bytes: int | None) -> None:
    """Tell the command that supervises this process, if one does, which run can be gone on with and whether it has a budget."""
    if (path := _told()) is not None:
        _write(path, {**_read(path), "folder": str(folder), "budget": budget_bytes})


def supervise(given: list[str]) -> int | None:
    """Do a command line in a child where its run has a budget; its exit status, or None where it is to be done here.

    Raises `NothingFits` where the run was ended again and again, `ProbeFailed` where it was ended before it began.
    """
    if threading.current_thread() is not threading.main_thread() or _told():
        return None
    if not given or given[0] not in ("train", "run") or "--help" in given or not _has_budget(given):
        return None
    with tempfile.TemporaryDirectory(prefix="delest-") as folder:
        path = Path(folder, "told.json")
        _write(path, {})
        arguments = given
        for _ in range(TRIES):
            kills = oom_kills()
            code, peak = _run_child(arguments, path)
            if code >= 0 or -code not in CRASHES:
                return code if code >= 0 else 128 - code
            told, how = _read(path), f"signal {-code}, {signal.strsignal(-code)}"
            if "folder" not in told:
                raise errors.ProbeFailed(f"the run was ended ({how}) before it began: memory may have run out.", code)
            if told["budget"] is None:
                return 128 - code
            memory = was_memory(-code, peak, told["budget"], oom_kills() > kills)
            _write(path, {**told, "crash": how if memory else None})
            arguments = _go_on(given, told["folder"])
            why = (
                "in smaller parts" if memory else f"as it was, since memory was not short (at most {units.format_bytes(peak)})"
            )
            print(
                f"the process of the run was ended ({how}): going on from its last checkpoint {why}",
                file=sys.stderr,
                flush=True,
            )
    if not memory:
        raise errors.ProbeFailed(
            f"the run was ended {TRIES} times ({how}), though memory was not short: go on with {shlex.join(['delest', *arguments])}.",
            code,
        )
    raise errors.NothingFits(
        f"the run was ended {TRIES} times ({how}), each time in smaller parts. What is saved is in {told['folder']}: "
        "start a new run with a larger --memory, or a smaller model."
    )


def was_memory(number: int, peak_bytes: int, budget_bytes: int, killed_for_memory: bool) -> bool:
    """Whether memory is why a signal ended a run. Code of libraries that got none ends in any of them but SIGKILL, which comes from the
    system, and then it counts that, or from somebody else."""
    return number != signal.SIGKILL or killed_for_memory or peak_bytes > budget_bytes - NEAR_BYTES


def oom_kills(root: Path = Path("/")) -> int:
    """Processes that the system has killed for memory since it started, in any control group; 0 where it does not tell
    (https://docs.kernel.org/filesystems/proc.html, vmstat)."""
    try:
        counted = (line.split() for line in (root / "proc/vmstat").read_text().splitlines())
        return next((int(words[1]) for words in counted if words[0] == "oom_kill"), 0)
    except OSError:
        return 0


def _told() -> Path | None:
    return Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _write(path: Path, told: dict[str, Any]) -> None:
    storage.write_atomic(path, json.dumps(told))


def _has_budget(given: list[str]) -> bool:
    """Whether the run of a command line has a budget, as far as that can be seen from outside; faults are left to the run."""
    try:
        if (memory := _value(given, "--memory")) is not None:
            return units.read_size(memory, 1 << 40) > 0
        if (plan := _value(given, "--plan")) is not None:
            return _names_budget(Path(plan))
        if "--resume" in given:
            out = _value(given, "--out")
            folders = [Path(out)] if out is not None else [path.parent for path in runs.ROOT.glob("*/plan.json")]
            return any(_names_budget(folder / "plan.json") for folder in folders)
    except (errors.BadInput, OSError, ValueError, AttributeError):
        return False  # the run itself tells what is wrong
    return False


def _names_budget(plan: Path) -> bool:
    return json.loads(plan.read_text()).get("memory_bytes") is not None


def _value(given: list[str], option: str) -> str | None:
    """What an option was given, last one first."""
    for place in range(len(given) - 1, -1, -1):
        if given[place].startswith(f"{option}="):
            return given[place].partition("=")[2]
        if given[place] == option and place + 1 < len(given):
            return given[place + 1]
    return None


def _go_on(given: list[str], folder: str) -> list[str]:
    kept = [word for option in _KEPT if (value := _value(given, option)) is not None for word in (option, value)]
    return [given[0], "--resume", "--out", folder, *kept, *(flag for flag in ("--json", "--quiet") if flag in given)]


def _run_child(arguments: list[str], told: Path) -> tuple[int, int]:
    """Its exit status, negative for the signal that ended it, and the most that it held, bytes. It writes to this process's own output."""
    prctl = ctypes.CDLL(None).prctl
    with _handed_on() as (children, waiting):
        process = subprocess.Popen(
            [sys.executable, "-m", "delest", *arguments],
            env={**os.environ, VARIABLE: str(told)},
            process_group=0,  # Ctrl-C reaches this process alone, which hands it on once: a second one ends a run at once
            preexec_fn=lambda: prctl(_DIE_WITH_PARENT, signal.SIGKILL),
        )
        children.append(process)
        for number in waiting:
            process.send_signal(number)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        return process.returncode, used.ru_maxrss << 10


@contextlib.contextmanager
def _handed_on() -> Iterator[tuple[list[subprocess.Popen[bytes]], list[int]]]:
    """SIGINT and SIGTERM go on to the children in the first list; the second has those that came before there was one."""
    children: list[subprocess.Popen[bytes]] = []
    waiting: list[int] = []

    def hand_on(number: int, frame: object) -> None:
        for child in children:
            child.send_signal(number)
        if not children:
            waiting.append(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield children, waiting
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
