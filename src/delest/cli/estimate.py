"""`delest estimate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from delest import errors
from delest.cli import Answer, options

EXAMPLE = "delest estimate examples/digits.py --budget 2GiB"
SWEEPS = ("batch",)
FORESEEN: options.Group = {
    "device": options.option(str, "--device", "cpu, or a device of the catalogue that need not be here, as a100-80 or t4"),
    "allocator": options.option(str, "--allocator", "glibc, mmap (a fixed threshold), exact (live tensors alone), cuda"),
    "micro_batch": options.option(int, "--micro-batch", "rows in memory at once [the whole batch]"),
    "sequence_length": options.option(int, "--sequence-length", "places on the second axis of the inputs"),
    "threads": options.TRAINING["threads"],
}
ENDING: options.Group = {
    "budget": options.option(str, "--budget", "end with status 3 where training may need more, as 8GiB or 80%", "SIZE"),
    "sweep": options.option(str, "--sweep", "batch: batch sizes from a quarter to eight times the job's"),
    "out": options.option(Path, "--out", "write an interactive page of where memory goes", "FILE.html"),
}


@options.with_options(changes=options.JOB, foreseen=FORESEEN, ending=ENDING)
def estimate(
    job: options.JobArgument = None,
    *,
    quiet: options.QuietOption = False,
    changes: dict[str, Any],
    foreseen: dict[str, Any],
    ending: dict[str, Any],
) -> Answer:
    """Say what training will take, before anything runs.

    Nothing is allocated and no step is made; of a Keras job a few are, on parts of a batch. With --budget the exit status is 3
    where it may not fit.
    """
    from delest import verbs
    from delest.reporting import footprint as texts

    found = options.read_job(job, changes)
    budget = verbs.read_budget(ending.get("budget"), foreseen.get("device"))
    sweep = ending.get("sweep")
    if sweep is not None and sweep not in SWEEPS:
        raise errors.BadInput(f"--sweep {sweep}: only {', '.join(SWEEPS)} can be swept.")
    out = ending.get("out")
    if sweep and out is not None:
        raise errors.BadInput("--out is of one estimate: leave it out with --sweep, or use --json.")
    check_page(out)
    say = verbs.progress(quiet=quiet)
    if sweep:
        assert found is not None
        sizes = sorted({max(1, found.batch_size * factor // 4) for factor in (1, 2, 4, 8, 16, 32)})
        footprints = verbs.sweep(found, batch_sizes=sizes, say=say, **foreseen)
        status = 0 if budget is None or any(texts.fits(one, budget) for one in footprints) else errors.NothingFits.exit_status
        return Answer({"footprints": footprints}, lambda: texts.sweep_text(footprints, budget_bytes=budget), status)
    footprint = verbs.estimate(found, say=say, **foreseen)
    write_page(out, footprint, budget, job)
    status = 0 if budget is None or texts.fits(footprint, budget) else errors.NothingFits.exit_status
    return Answer(footprint, lambda: texts.footprint_text(footprint, budget_bytes=budget), status)


def check_page(path: Path | None) -> None:
    """Raise `BadInput` for a page that could not be written, before anything is done for it."""
    if path is not None and path.suffix != ".html":
        raise errors.BadInput(f"--out {path}: the page is HTML: call it {path.with_suffix('.html')}.")
    if path is not None and not path.parent.is_dir():
        raise errors.BadInput(f"--out {path}: the folder {path.parent} does not exist.")


def write_page(path: Path | None, footprint: Any, budget: int | None, name: str | None) -> None:
    """Write a footprint's page where one was asked for, and say so on standard error."""
    if path is None:
        return
    from delest.reporting.memory_page import write_footprint_page

    write_footprint_page(path, footprint, budget_bytes=budget, name=name or "")
    typer.echo(f"page: {path}", err=True)
