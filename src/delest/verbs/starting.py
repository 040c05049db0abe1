"""What a plan needs before a process starts: a command of delest's own starts anew with it, somebody's script is started with it."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from delest import errors, methods, storage, supervision
from delest.records.form import read_json
from delest.records.plan import Plan

VARIABLE = "DELEST_PLAN"  # names the file with the plan that a command had made when it started anew
EXEC = "delest exec plan.json -- python train.py"
_begun_anew = False


def start_with(plan: Plan, planning_seconds: float) -> None:
    """Go on in a process that was started as the plan needs: this one, or, where it is a command of delest's own, itself started anew.

    Raises `BadInput` where neither is, and where what the plan needs is not on this system.
    """
    waiting = methods.waiting(plan)
    if not waiting:
        return
    variables = methods.environment(plan)
    if not supervision.restartable or _begun_anew:
        raise errors.BadInput(
            f"the plan's {' and '.join(waiting)} must act before the process starts, and does not in this one: follow the plan by "
            f"`delest train JOB --plan plan.json`, or start your script by `{EXEC}`."
        )
    file, path = tempfile.mkstemp(prefix="delest-", suffix=".json")
    os.close(file)
    storage.write_json(Path(path), replace(plan, seconds={**plan.seconds, "planning": planning_seconds}))
    _become([sys.executable, *sys.orig_argv[1:]], {**variables, VARIABLE: path})


def plan_of_before() -> Plan | None:
    """The plan that this command had made before it started anew; it is there once."""
    global _begun_anew
    path = os.environ.pop(VARIABLE, None)
    if path is None:
        return None
    _begun_anew = True
    try:
        return read_json(Plan, Path(path))
    finally:
        Path(path).unlink(missing_ok=True)


def environment_for(plan: Plan | str | Path) -> dict[str, str]:
    """The variables with which a process must be started to follow a plan: its malloc and its threads.

    Raises `BadInput` for a plan that cannot be read, and for what this system does not have.
    """
    found = plan if isinstance(plan, Plan) else read_json(Plan, Path(plan))
    threads = {name: str(found.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")} if found.threads else {}
    own = methods.environment(found)
    return {**own, **{name: count for name, count in threads.items() if name not in own}}


def execute(command: Sequence[str], variables: dict[str, str]) -> NoReturn:
    """Become the command, with these variables over the environment: its output, signals and exit status are its own.

    Raises `BadInput` for a command that cannot be run.
    """
    if not command:
        raise errors.BadInput(f"there is no command to run: write it after --, as in {EXEC}.")
    if shutil.which(command[0]) is None:
        raise errors.BadInput(
            f"{command[0]!r} cannot be run: no such command on PATH and no executable file of that name. "
            f"Write the script as you start it yourself, as in {EXEC}."
        )
    _become(command, variables)


def _become(command: Sequence[str], variables: dict[str, str]) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execvpe(command[0], list(command), {**os.environ, **variables})
    except OSError as error:
        raise errors.BadInput(f"{command[0]!r} cannot be run ({error.strerror}).") from None
