"""What tests of `delest.processes` run in child processes: functions of a job that answer, fail or never come back."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from delest import errors
from delest.job import Job

ERRORS: dict[str, errors.DelestError] = {
    "BadInput": errors.BadInput(["lr is -1.", "unknown metric 'acuracy'."]),
    "OutOfMemory": errors.OutOfMemory("optimizer", "12 MiB were asked for"),
    "Interrupted": errors.Interrupted(15, "delest train job.py --resume"),
}


def describe(job: Job, **arguments: Any) -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "job": job.describe(),
        "arguments": arguments,
        "told": os.environ.get("TOLD"),
        "nan": float("nan"),
    }


def add(left: int, right: int) -> dict[str, int]:
    return {"pid": os.getpid(), "sum": left + right}


def chatter(job: Job) -> str:
    """Prints a lot, also past Python, and something that looks like an answer."""
    print('{"value": "wrong"}')
    print("noise " * 100_000, file=sys.stderr)
    os.write(1, b'{"value": "wrong"}\n' * 1000)
    warnings.warn("more noise")
    return "right"


def fail(job: Job, *, kind: str) -> None:
    raise ERRORS[kind]


def raise_error(job: Job) -> None:
    print("the last words on standard output")
    raise ZeroDivisionError("a fault of the function")


def give_what_is_no_json(job: Job) -> object:
    return {1, 2}


def end(job: Job, *, status: int) -> None:
    os.write(2, b"the last words\n")
    os._exit(status)


def kill(job: Job, *, number: int) -> None:
    os.kill(os.getpid(), number)


def segfault(job: Job) -> None:
    ctypes.string_at(0)


def sleep(job: Job, *, pids: str) -> None:
    """Never comes back, nor does the process that it started; their numbers are in the file `pids`, one a line."""
    grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print("waiting", flush=True)
    temporary = Path(pids + ".tmp")
    temporary.write_text(f"{os.getpid()}\n{grandchild.pid}\n")
    temporary.rename(pids)
    time.sleep(600)


def leave_one_behind(job: Job, *, pids: str, answer: bool) -> str:
    """Comes back, or is killed, while a process that it started goes on and holds its standard streams."""
    grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(pids).write_text(f"{grandchild.pid}\n")
    if not answer:
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"
