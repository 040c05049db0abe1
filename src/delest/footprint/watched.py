"""Real steps watched on one and two rows, for models that read values of tensors and so cannot be traced without them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from delest import errors
from delest.backends.torch import randomness
from delest.backends.torch.loops import JobLoop, Loop, with_length
from delest.backends.torch.model import where
from delest.backends.torch.trace import trace_loop
from delest.data import Feed, Preprocessing, open_job
from delest.footprint.scratch import scratch
from delest.job import Job
from delest.records.form import from_json, to_json
from delest.records.plan import Plan
from delest.records.trace import Trace


def watch_loop(build: Callable[[], Loop]) -> Trace:
    """The trace of real steps on 1 and 2 rows, or on 2 and 3 where one row alone cannot be trained on (batch statistics).

    Random states are as before afterwards. Raises `BadInput` where the steps fail.
    """
    states, failed = randomness.capture(), None
    try:
        for rows in (1, 2):
            try:
                return trace_loop(lambda _: build(), rows, scratch=scratch, real=True)
            except errors.DelestError:
                raise
            except Exception as error:
                failed = error
    finally:
        randomness.restore(states)
    assert failed is not None
    raise errors.BadInput(f"a training step failed on two rows: {where(failed)}") from failed


def trace_job(job: Job, *, preprocessing: dict[str, Any], index: list[int], threads: int, length: int | None) -> dict[str, Any]:
    """`watch_loop` of a job, in a process of its own: the trace as JSON."""
    torch.set_num_threads(threads)
    source = open_job(job)
    feed = Feed(source, np.array(index), from_json(Preprocessing, preprocessing), batch_size=len(index))
    batch = next(iter(feed.ordered()))
    if length is not None:
        batch = replace(batch, inputs=with_length(batch.inputs, length))
    plan = Plan(batch_size=job.batch_size, micro_batch=job.batch_size, threads=threads)
    return to_json(watch_loop(lambda: JobLoop(job, plan, source.schema, batch)))
