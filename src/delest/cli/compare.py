"""`delest compare`."""

from __future__ import annotations

from typing import Any

from delest import errors
from delest.cli import Answer, options

EXAMPLE = "delest compare examples/keras_digits.py --backends tensorflow,jax,torch"
HOW: options.Group = {
    "backends": options.option(str, "--backends", "tensorflow, jax, torch, separated by commas [those that are installed]"),
    "priority": options.option(str, "--priority", "time or memory, by which one is recommended [time]"),
    "memory": options.option(str, "--memory", "recommend only what took no more, as 2GiB", "SIZE"),
}


@options.with_options(changes=options.JOB, how=HOW)
def compare(
    job: options.JobArgument = None, *, quiet: options.QuietOption = False, changes: dict[str, Any], how: dict[str, Any]
) -> Answer:
    """Train a Keras job on TensorFlow, JAX and torch, and say which to take.

    From the same weights, on the same batches, for three epochs or --epochs. Time, compiling, memory and score of each; where first
    losses differ, the layer that gives something else is named. Ends with status 3 where none stays within --memory.
    """
    from delest import verbs
    from delest.reporting import frameworks

    epochs = changes.pop("recipe.epochs", None)  # that are compared: the job keeps its own
    found = options.read_job(job, changes)
    compared = verbs.compare(found, epochs=epochs, say=verbs.progress(quiet=quiet), **how)
    if not any(one.ok for one in compared.results):
        status = errors.CheckFailed.exit_status
    else:
        status = 0 if compared.recommended is not None else errors.NothingFits.exit_status
    return Answer(compared, lambda: frameworks.frameworks_text(compared), status)
