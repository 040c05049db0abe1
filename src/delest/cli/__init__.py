"""The command line: one file a command; `main` turns what a command gives, or raises, into output and an exit status."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from delest import __version__, errors, storage, supervision
from delest.records.form import to_json

COMMANDS = (
    "run",
    "inspect",
    "estimate",
    "measure",
    "plan",
    "compare",
    "verify",
    "exec",
    "train",
    "shrink",
    "report",
    "predict",
    "doctor",
)
_WHEN_TERMINATED = ("Interrupted", "terminated; what was finished before is kept", 128 + signal.SIGTERM)
_INTERRUPTED = 130  # 128 + SIGINT
# Newer versions of typer carry click inside, older ones import it; its base classes have no public name in either.
_CommandLineError: type[Exception] = typer.BadParameter.__mro__[2]


@dataclass(frozen=True)
class Answer:
    """What a command gives: a record (or mapping) for `--json`, None for none; text for people; the exit status."""

    record: Any
    text: Callable[[], str]
    status: int = 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (`sys.argv` by default) and return its exit status, which `DelestError.exit_status` names."""
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    os.environ.setdefault(
        "TF_CPP_MIN_LOG_LEVEL", "2"
    )  # a Keras job that loads TensorFlow: a dozen lines that nobody can act on
    as_json = "--json" in given[: given.index("--") if "--" in given else None]
    stdout, supervision.restartable = sys.stdout, arguments is None
    before, _Terminated.received = signal.getsignal(signal.SIGTERM), False
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminated)  # outside training, which watches for itself
    try:
        # A user's own code may print: with --json standard output is one object, so that goes to standard error.
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext(), _plain_warnings():
            status, text = _run(given, as_json)
        with storage.room_reported(Path("standard output")):
            print(text, end="", file=stdout, flush=True)
        return status
    except BrokenPipeError:
        _abandon(stdout)
        return 1
    except errors.DiskFull as error:
        _abandon(stdout)
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


class _Terminated(BaseException):
    """SIGTERM, so that what was begun is cleared away; like KeyboardInterrupt no ordinary handler catches it."""

    received = False  # a library that was importing may turn the exception into one of its own


def _terminated(number: int, frame: object) -> None:
    _Terminated.received = True
    raise _Terminated


def _run(given: list[str], as_json: bool) -> tuple[int, str]:
    """Exit status and standard output of a command line; errors have been told on standard error."""
    more: dict[str, Any] = {}
    try:
        if (status := supervision.supervise(given)) is not None:  # which has written all there is to say
            return status, ""
        with storage.room_reported(Path("standard output")):  # of --help and --version; all else is written by name
            answer = _command().main(given, prog_name="delest", standalone_mode=False)
        if isinstance(answer, Answer):
            shown = as_json and answer.record is not None
            text = json.dumps(to_json(answer.record), indent=2) if shown else answer.text()
            return answer.status, text.rstrip("\n") + "\n" if text else ""
        if answer == _INTERRUPTED:  # typer's own answer to Ctrl-C
            raise KeyboardInterrupt
        return 0, ""
    except errors.DelestError as error:
        kind, words, status = type(error).__name__, str(error), error.exit_status
        if isinstance(error, errors.NothingFits):
            more = {"smallest_bytes": error.smallest_bytes, "plan": error.plan}
        if _Terminated.received:
            kind, words, status = _WHEN_TERMINATED
    except _Terminated:
        kind, words, status = _WHEN_TERMINATED
    except (KeyboardInterrupt, typer.Abort):
        kind, words, status = "Interrupted", "interrupted", _INTERRUPTED
    except _CommandLineError as error:
        kind, words, status = "BadInput", _usage_words(error), errors.BadInput.exit_status
    except BrokenPipeError:
        raise
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # typer's own answer to a reader that has gone
            return 1, ""
        words = f"the code that was given to run called sys.exit({error.code!r}); a job's file must only define its job."
        kind, status = "BadInput", errors.BadInput.exit_status
    except Exception as error:
        traceback.print_exc()
        words = f"{error}\nThis is a fault of delest, or of code that it was given to run: the lines above say where."
        kind, status = type(error).__name__, errors.DelestError.exit_status
    print(f"error: {words}", file=sys.stderr)
    told = {"error": {"kind": kind, "message": words, "exit_status": status, **more}}
    return status, json.dumps(told, indent=2) + "\n" if as_json else ""


def _command() -> Any:
    """All commands, each the function that its file is named after."""
    app = typer.Typer(
        rich_markup_mode=None,
        add_completion=False,
        pretty_exceptions_enable=False,
        epilog=_epilog("delest run examples/digits.py"),
    )
    app.callback()(_delest)
    for name in COMMANDS:
        module = importlib.import_module(f"delest.cli.{name}")
        app.command(name, epilog=_epilog(module.EXAMPLE))(getattr(module, name))
    return typer.main.get_command(app)


def _epilog(example: str) -> str:
    return f"\b\nExample:\n  {example}"


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"delest {__version__}")
        raise typer.Exit()


def _delest(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Train deep-learning models in less memory and less time, make them smaller, and prove each saving."""


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show delest's own warnings as one line; those of other libraries as they are."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def showwarning(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, errors.DelestWarning):
                print(f"warning: {message}", file=sys.stderr)
            else:
                show(message, category, *where, **more)

        warnings.showwarning = showwarning
        yield


def _abandon(stdout: TextIO) -> None:
    """Let what is still unwritten go nowhere: the interpreter would fail on it once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())


def _usage_words(error: Any) -> str:
    """What was wrong with the command line, and how to see what is right."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "delest"
    return f"{error.format_message()}\nSee: {command} --help"
