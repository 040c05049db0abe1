"""The command line: one file a command; `main` turns what a command gives, or raises, into output and an exit status."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from delest import __version__, errors, storage
from delest.records.form import to_json

COMMANDS = ("run", "inspect", "train", "shrink", "report", "predict", "doctor")
_INTERRUPTED = 130  # 128 + SIGINT
# Newer versions of typer carry click inside, older ones import it; its base classes have no public name in either.
_CommandLineError: type[Exception] = typer.BadParameter.__mro__[2]


@dataclass(frozen=True)
class Answer:
    """What a command gives: a record (or mapping) for `--json`, text for people, the exit status."""

    record: Any
    text: Callable[[], str]
    status: int = 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (`sys.argv` by default) and return its exit status, which `DelestError.exit_status` names."""
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    as_json = "--json" in given[: given.index("--") if "--" in given else None]
    stdout = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext(), _plain_warnings():
            answer = _command().main(given, prog_name="delest", standalone_mode=False)
        if isinstance(answer, Answer):
            _write(stdout, json.dumps(to_json(answer.record), indent=2) if as_json else answer.text())
            return answer.status
        if answer == _INTERRUPTED:  # typer's own answer to Ctrl-C
            raise KeyboardInterrupt
        stdout.flush()  # of --help and --version
        return 0
    except errors.DelestError as error:
        return _fail(stdout, as_json, type(error).__name__, str(error), error.exit_status)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(stdout, as_json, "Interrupted", "interrupted", _INTERRUPTED)
    except _CommandLineError as error:
        return _fail(stdout, as_json, "BadInput", _usage_words(error), errors.BadInput.exit_status)
    except BrokenPipeError:
        _abandon(stdout)
        return 1
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):
            return 1
        words = f"the code that was given to run called sys.exit({error.code!r}); a job's file must only define its job."
        return _fail(stdout, as_json, "BadInput", words, errors.BadInput.exit_status)
    except Exception as error:
        traceback.print_exc()
        words = f"{type(error).__name__}: {error}\nThis is a fault of delest, or of code that it was given to run: the lines above say where."
        return _fail(stdout, as_json, type(error).__name__, words, errors.DelestError.exit_status)


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


def _write(stdout: TextIO, text: str) -> None:
    try:
        with storage.room_reported(Path("standard output")):
            print(text.rstrip("\n"), file=stdout, flush=True)
    except errors.DiskFull:
        _abandon(stdout)
        raise


def _abandon(stdout: TextIO) -> None:
    """Let what is still unwritten go nowhere: the interpreter would fail on it once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())


def _fail(stdout: TextIO, as_json: bool, kind: str, message: str, status: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    if as_json:
        _write(stdout, json.dumps({"error": {"kind": kind, "message": message, "exit_status": status}}, indent=2))
    return status


def _usage_words(error: Any) -> str:
    """What was wrong with the command line, and how to see what is right."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "delest"
    return f"{error.format_message()}\nSee: {command} --help"
