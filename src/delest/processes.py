"""A named function, most often for a job, run in a fresh process: a probe that fails leaves nothing behind.

The child gets two lines of JSON on standard input, what to load and the arguments, and answers with one JSON object in a file; what it prints goes to
another, of which the end is shown where it gives no answer. The whole process tree ends when the time is up or the caller
goes on.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delest import errors, job as jobs


def call(
    function: str, job: jobs.Job | None, *, timeout: float = 600.0, environment: dict[str, str] | None = None, **arguments: Any
) -> Any:
    """Run `function` ("module:name") as `name(job, **arguments)` in a fresh process and return its JSON answer.

    Without a job it runs as `name(**arguments)`. A job without `origin` (a notebook's lambda) cannot be rebuilt elsewhere:
    the function then runs here.

    Raises what the function raised where that is a `DelestError`; `ProbeFailed` where the child crashed, was killed or
    ran out of time.
    """
    if job is not None and job.origin is None:
        return _function(function)(job, **arguments)
    with begin(function, job, environment=environment, **arguments) as call:
        return call.answer(timeout)


@contextlib.contextmanager
def begin(
    function: str, job: jobs.Job | None, *, environment: dict[str, str] | None = None, **arguments: Any
) -> Iterator[Running]:
    """`call` that goes on while the caller does something else; it is ended, answered or not, where the context is left."""
    with prepare(function, job, environment=environment) as running:
        running.give(arguments)
        yield running


@contextlib.contextmanager
def prepare(
    function: str, job: jobs.Job | None, *, imports: Sequence[str] = (), environment: dict[str, str] | None = None
) -> Iterator[Running]:
    """A process that loads `function`'s module and `imports`, rebuilds the job, and waits to be given the arguments."""
    with tempfile.TemporaryDirectory(prefix="delest-") as folder:
        answer, printed = Path(folder, "answer.json"), Path(folder, "printed.txt")
        asked = {
            "function": function,
            "imports": list(imports),
            "job": None if job is None else job.describe(),
            "answer": str(answer),
            "parent": os.getpid(),
        }
        # A file for what it prints, not a pipe: that stays open, and is waited for, while anything that the child started holds it.
        with open(printed, "w") as said:
            process = subprocess.Popen(
                [sys.executable, "-m", "delest.processes"],
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=said,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        running = Running(function, process, answer, printed)
        try:
            running.send(asked)
            yield running
        finally:
            end_tree(process)
            running.close()


@dataclass(frozen=True)
class Running:
    """A function at work in a fresh process, or about to be."""

    function: str
    process: subprocess.Popen[bytes]
    path: Path
    printed: Path

    def give(self, arguments: dict[str, Any]) -> None:
        """The arguments, once, for which it waits; a process that is gone by then says so in `answer`."""
        self.send(arguments)
        self.close()

    def close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def send(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def answer(self, timeout: float = 600.0) -> Any:
        """Wait for its JSON answer; raises as `call` does."""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise errors.ProbeFailed(f"{self.function} did not answer within {timeout:g} s.{_tail(self.printed)}") from None
        end_tree(self.process)
        if not self.path.exists():
            how = _how_it_ended(self.function, self.process.returncode)
            raise errors.ProbeFailed(how + _tail(self.printed), self.process.returncode)
        reply = json.loads(self.path.read_text())
        if "error" in reply:
            kind = getattr(errors, reply["error"], errors.DelestError)
            raise kind.rebuilt(reply["fields"])
        return reply["value"]


def end_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that leads its own session, and everything it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()


def _how_it_ended(function: str, code: int) -> str:
    how = f"was killed by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"ended with status {code}"
    if code == -signal.SIGKILL:
        how += " (most often: memory ran out)"
    return f"{function} {how} before it answered."


def _tail(printed: Path) -> str:
    """The last lines of what a child printed, on lines of their own."""
    return "".join(f"\n{line}" for line in printed.read_text(errors="replace").strip().splitlines()[-12:])


def _function(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _end_with_parent(parent: int) -> None:
    """End, with all that was started here, when the parent is gone: a killed command leaves nothing computing."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _main() -> None:
    request = json.loads(sys.stdin.readline())
    _end_with_parent(request["parent"])
    try:
        function = _function(request["function"])
        for module in request["imports"]:
            importlib.import_module(module)
        given = () if request["job"] is None else (jobs.rebuild(request["job"]),)
        reply = {"value": function(*given, **json.loads(sys.stdin.readline()))}
    except errors.DelestError as error:
        reply = {"error": type(error).__name__, "fields": error.fields()}
    temporary = Path(request["answer"] + ".tmp")
    temporary.write_text(json.dumps(reply))
    temporary.rename(request["answer"])
    sys.stdout.flush()
    os._exit(0)  # there is nothing left to do, and taking a large process apart can last a second


if __name__ == "__main__":
    from delest.processes import _main as main  # under its importable name, not as __main__

    main()
