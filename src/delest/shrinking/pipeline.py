"""From a trained session to the artefact that ships: export, check, quantise, measure, accept or reject."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import numpy_helper

from delest import errors, storage
from delest.bundle.model import Model, load
from delest.bundle.timing import time_alternating
from delest.bundle.write import replace_folder, write_bundle
from delest.data import Feed
from delest.records.shrunk import Candidate, Shrunk
from delest.shrinking.acceptance import judge
from delest.shrinking.confidence import bound_drop
from delest.shrinking.parity import LIMIT, largest_difference
from delest.training.evaluate import Evaluation, evaluate

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from delest.backends import Backend
    from delest.data import Preprocessing
    from delest.metrics import Metric

_CALIBRATION_ROWS = 512
_CALIBRATION_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What all stages need."""

    folder: Path  # temporary, inside the run's
    session: Any
    feeds: Mapping[str, Feed]
    preprocessing: Preprocessing
    metric: Metric
    name: str
    threads: int
    say: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def judging(self) -> Feed:
        """The rows that candidates are judged by: selection, or validation where there is none."""
        return next((self.feeds[role] for role in ("selection", "validation", "train") if role in self.feeds and len(self.feeds[role])))

    @contextmanager
    def stage(self, name: str, words: str) -> Iterator[None]:
        """Announce a stage and add up its time."""
        self.say(words)
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def bundle(self, name: str, network: Path, weights: Mapping[str, NDArray] | None = None) -> Model:
        """Write a bundle around a network and open it."""
        write_bundle(self.folder / name, network, self.preprocessing, name=self.name, metric=self.metric.name, weights=weights)
        return load(self.folder / name, threads=self.threads)


def shrink_run(
    *,
    folder: Path,
    session: Any,
    backend: Backend,
    feeds: Mapping[str, Feed],
    preprocessing: Preprocessing,
    metric: Metric,
    weights: Mapping[str, NDArray] | None,
    name: str,
    max_drop: float,
    threads: int,
    reduce_range: bool,
    say: Callable[[str], None] = lambda _: None,
    batch_sizes: Sequence[int] = (1, 32),
) -> Shrunk:
    """Write `bundle/` (fp32, with `weights`) and `shrunk/` (what ships, with `architecture.json` and `shrink.json`) in a run folder.

    `feeds` by role: train calibrates int8, selection decides, test is read once for what ships. int8 ships where the one-sided 95 %
    bound on its drop of `metric` is at most `max_drop` (in the metric's unit) and it is smaller or faster as measured here. Both folders appear
    when everything is done; a crash leaves those that were there. The session is left as it was. `threads` are ONNX Runtime's;
    the session computes with as many as it was set to.

    Raises `CheckFailed` where the exported model does not answer like the trained one, `BadInput` where it cannot be exported.
    """
    temporary = folder / f".shrink.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    work = _Work(
        folder=temporary,
        session=session,
        feeds=feeds,
        preprocessing=preprocessing,
        metric=metric,
        name=name,
        threads=threads,
        say=say,
    )
    try:
        shrunk, layers = _shrink(work, backend, weights, max_drop, reduce_range, batch_sizes)
        shrunk = replace(shrunk, path=folder / "shrunk")
        storage.write_json(temporary / "shrunk" / "architecture.json", {"form": shrunk.shipped, "int8_layers": layers})
        storage.write_json(temporary / "shrunk" / "shrink.json", shrunk)
        replace_folder(temporary / "fp32", folder / "bundle")
        replace_folder(temporary / "shrunk", folder / "shrunk")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return shrunk


def _shrink(
    work: _Work,
    backend: Backend,
    weights: Mapping[str, NDArray] | None,
    max_drop: float,
    reduce_range: bool,
    batch_sizes: Sequence[int],
) -> tuple[Shrunk, list[str]]:
    """All stages inside the temporary folder; the record (its path to be set) and the names of the layers in int8."""
    networks = {name: work.folder / f"{name}.onnx" for name in ("fp32", "int8")}
    batch = next(work.judging.ordered())
    with work.stage("exporting", "exporting the trained model to ONNX"):
        backend.export(work.session, _take(batch.inputs, 2), networks["fp32"])
        models = {"fp32": work.bundle("fp32", networks["fp32"], weights)}
    with work.stage("checking", "checking that the exported model answers like the trained one"):
        parity = _check_parity(work, models["fp32"])
    with work.stage("quantising", "quantising to int8"):
        layers, fault = _quantize(work, networks, reduce_range)
        if fault is None:
            models["int8"] = work.bundle("int8", networks["int8"])
    with work.stage("evaluating", f"judging on {len(work.judging):,} rows that took no part in training"):
        evaluations = {"torch": evaluate(work.session, work.judging, work.metric)}
        evaluations.update({name: evaluate(model, work.judging, work.metric) for name, model in models.items()})
    with work.stage("timing", "measuring the time of an answer"):
        timings = {size: _time(work, models, size) for size in batch_sizes}
    candidates = {"torch": _candidate(work, "torch", None, evaluations, timings)}
    for name, network in networks.items():
        if name in models:
            candidates[name] = _candidate(work, name, network, evaluations, timings)
    candidates["fp32"] = replace(candidates["fp32"], parity=parity, why="answers like the trained model, without PyTorch")
    if "int8" in candidates:
        kept, why = judge(candidates["int8"], candidates["fp32"], max_drop, decided_on_training=work.judging is work.feeds.get("train"))
        difference = largest_difference(work.session, models["int8"], work.judging)
        candidates["int8"] = replace(candidates["int8"], kept=kept, why=why, parity=difference)
    else:
        candidates["int8"] = _without_form("int8", fault or "")
    work.say(f"int8 {'ships' if candidates['int8'].kept else 'is rejected'}: {candidates['int8'].why}")
    shipped = "int8" if candidates["int8"].kept else "fp32"
    with work.stage("evaluating", f"judging what ships ({shipped}) on the test rows"):
        test = _test(work, work.bundle("shrunk", networks[shipped]))
    shrunk = Shrunk(
        path=work.folder,
        shipped=shipped,
        metric=work.metric.name,
        max_drop=max_drop,
        candidates=tuple(candidates.values()),
        test=test,
        seconds=work.seconds,
        threads=work.threads,
    )
    return shrunk, layers if shipped == "int8" else []
