"""`delest measure`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from delest import errors, storage
from delest.cli import Answer, options
from delest.cli.estimate import check_page, write_page
from delest.records.latency import Latency

EXAMPLE = "delest measure examples/digits.py --steps 5"
HOW: options.Group = {
    "steps": options.option(int, "--steps", "real steps that are measured, after one to warm up [5]"),
    "device": options.TRAINING["device"],
    "threads": options.TRAINING["threads"],
    "allocator": options.option(str, "--allocator", "malloc of the process: glibc, mmap, tcmalloc, jemalloc [glibc]"),
}
ENDING: options.Group = {
    "timeline": options.option(bool, "--timeline", "of a script: record one step in detail", undo=False),
    "out": options.option(Path, "--out", "page of a job (FILE.html); object of a script (FILE.json)", "FILE"),
}
What = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="JOB | BUNDLE | -- COMMAND",
        help="a job, a folder with an exported model, or after -- a training script with its arguments",
        show_default=False,
    ),
]


@options.with_options(changes=options.JOB, how=HOW, ending=ENDING)
def measure(
    what: What = None,
    *,
    quiet: options.QuietOption = False,
    changes: dict[str, Any],
    how: dict[str, Any],
    ending: dict[str, Any],
) -> Answer:
    """Run real training steps, and say what they took.

    In a fresh process: memory by phase and category, time by module. `delest measure -- python train.py ARGS` does it for a script
    as it is: its output and exit status are its own, what was seen goes to standard error, and with --out (not --json) into a file.
    """
    from delest import verbs

    words = what or []
    if _is_command(words):
        return _measure_script(words, {**changes, **how}, ending)
    if "timeline" in ending:
        raise errors.BadInput("--timeline is for a script: a job's measurement always has one.")
    say = verbs.progress(quiet=quiet)
    is_bundle = bool(words) and _is_bundle(words[0])
    if is_bundle and (changes or how.keys() - {"threads"} or "out" in ending):
        raise errors.BadInput("an exported model takes no option but --threads: the others are for a job.")
    check_page(ending.get("out"))
    given: Any = words[0] if is_bundle else options.read_job(words[0] if words else None, changes)
    found = verbs.measure(given, say=say, **how)
    if isinstance(found, Latency):
        from delest.reporting.latency import latency_text

        return Answer(found, lambda: latency_text(found))
    from delest.reporting import footprint as texts

    write_page(ending.get("out"), found, None, words[0] if words else None)
    return Answer(found, lambda: texts.footprint_text(found))


def _is_command(words: list[str]) -> bool:
    """More than one word, or one that can be run and is no job."""
    if len(words) > 1:
        return True
    return bool(words) and not words[0].endswith(".py") and not Path(words[0]).is_dir() and shutil.which(words[0]) is not None


def _is_bundle(path: str) -> bool:
    return any(Path(path, *inner, "model.onnx").is_file() for inner in ((), ("bundle",)))


def _measure_script(command: list[str], unfit: dict[str, Any], ending: dict[str, Any]) -> Answer:
    from delest import verbs
    from delest.reporting.script import script_text

    if unfit:
        names = ", ".join("--" + name.split(".")[-1].replace("_", "-") for name in unfit)
        raise errors.BadInput(f"{names}: these are for a job; a script takes its options behind its name.")
    out = ending.get("out")
    if out is not None and not out.parent.is_dir():
        raise errors.BadInput(f"--out {out}: the folder {out.parent} does not exist.")
    found = verbs.measure_script(command, timeline=bool(ending.get("timeline")))
    if out is not None:
        storage.write_json(out, found)
    print(script_text(found), file=sys.stderr)
    return Answer(None, lambda: "", found.status)  # standard output is the script's
