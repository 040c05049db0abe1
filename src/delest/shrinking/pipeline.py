"""From a trained session to the artefact that ships: export, check, quantise, measure, accept or reject."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import numpy_helper

from delest import __version__, errors, storage
from delest.bundle.model import Model
from delest.bundle.timing import time_alternating
from delest.bundle.write import replace_folder, write_bundle
from delest.data import Feed
from delest.records.shrunk import FRAMEWORKS, RESTLESS, Candidate, Shrunk, Stage
from delest.shrinking.acceptance import Wish, best_of, judge
from delest.shrinking.confidence import bound_drop
from delest.shrinking.forms import Form, Work, export, quantize, take
from delest.shrinking.journal import Journal
from delest.shrinking.networks import TRAINED, Network
from delest.shrinking.parity import largest_difference
from delest.training.evaluate import evaluate

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from delest.backends import Backend
    from delest.data import Preprocessing
    from delest.metrics import Metric
    from delest.shrinking.ladder import Ladder
    from delest.training.evaluate import Evaluation


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
    ladder: Callable[[Journal, Network, Feed, float], Ladder] | None = None,
    wish: Wish | None = None,
    processor: str = "",
) -> Shrunk:
    """Write `bundle/` (fp32, with `weights`) and `shrunk/` (what ships, with `architecture.json` and `shrink.json`) in a run folder.

    `feeds` by role: train calibrates int8, selection decides, test is read once for what ships. A form ships where the
    one-sided 95 % bound on its drop of `metric` is at most `max_drop` (in the metric's unit; a share of the score for errors) and it is smaller or faster as measured
    here. `ladder`, given the journal, the trained network, the rows that judge and the drop that is allowed, makes narrower networks, of which each also
    has these forms. Both folders appear when everything is done; a crash leaves those that were there. The session is left as it was.
    `threads` are ONNX Runtime's; the session computes with as many as it was set to. What a clock decides is in the folder's
    `shrinking/decisions.jsonl` and is followed by who begins again, on this `processor`, before the folders are there.

    Raises `CheckFailed` where the exported model does not answer like the trained one, `BadInput` where it cannot be
    exported, `DiskFull`, `AccuracyNotMet` where nothing within the bound meets the wish: what comes nearest ships then.
    """
    temporary = folder / f".shrink.{os.getpid()}.tmp"
    for leftover in folder.glob(".shrink.*.tmp"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    journal = Journal(folder / "shrinking" / "decisions.jsonl", repeated=(folder / "shrunk" / "shrink.json").exists())
    work = Work(
        folder=temporary,
        session=session,
        feeds=feeds,
        preprocessing=preprocessing,
        metric=metric,
        name=name,
        max_drop=max_drop,
        threads=threads,
        reduce_range=reduce_range,
        say=say,
    )
    try:
        trained = Network(name=TRAINED, session=session, parameters=session.parameters())
        with work.stage("evaluating", f"judging on {len(work.judging):,} rows"):
            reference = evaluate(session, work.judging, metric)
        if not metric.higher_is_better:
            work.allowed = max_drop * abs(reference.score)
        forms = {"fp32": export(work, backend, trained, weights)}
        forms |= quantize(work, trained)
        climbed = ladder(journal, trained, work.judging, work.allowed) if ladder is not None else None
        for network in climbed.climb() if climbed is not None else ():
            try:
                forms[network.form("fp32")] = export(work, backend, network, None)
            except (errors.BadInput, errors.CheckFailed) as error:  # the other networks are there
                forms[network.form("fp32")] = Form(network=network, fault=str(error))
                continue
            forms |= quantize(work, network)
        here: dict[str, Any] = {"threads": threads, "processor": processor, "delest": __version__}
        candidates = _measure(work, backend, forms, reference, batch_sizes, partial(journal.follow, "timed", **here))
        shrunk, missed = _ship(
            work, forms, candidates, wish or Wish(), folder / "shrunk", tuple(climbed.stages) if climbed is not None else ()
        )
        replace_folder(temporary / "fp32", folder / "bundle")
        replace_folder(temporary / "shrunk", folder / "shrunk")
        journal.note("shipped", shrunk.shipped)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if climbed is not None and climbed.interrupted is not None:
        raise climbed.interrupted
    if missed is not None:
        raise errors.AccuracyNotMet(missed)
    return shrunk


def _measure(
    work: Work,
    backend: Backend,
    forms: Mapping[str, Form],
    reference: Evaluation,
    batch_sizes: Sequence[int],
    follow: Callable[..., dict[str, Any]],
) -> dict[str, Candidate]:
    """Each form with its accuracy, size and latency, and the verdict against the trained network's fp32 form. `follow` gives the times that
    were measured before, or measures."""
    models = {name: form.model for name, form in forms.items() if form.model is not None}
    with work.stage("evaluating", f"judging on {len(work.judging):,} rows"):
        evaluations = {name: evaluate(model, work.judging, work.metric) for name, model in models.items()}
    with work.stage("timing", "measuring the time of an answer"):
        names = [backend.name, *models]
        timings = {
            size: follow(f"batch {size}", lambda size=size: {"seconds": _time(work, backend.name, models, size)}, forms=names)[
                "seconds"
            ]
            for size in batch_sizes
        }

    def latencies(name: str) -> dict[str, Any]:
        return {
            "latency_seconds": {size: timing[name][0] for size, timing in timings.items()},
            "latency_spread": {size: tuple(timing[name][1:]) for size, timing in timings.items()},
        }

    candidates = {
        backend.name: Candidate(
            name=backend.name,
            runtime=backend.runtime,
            file_bytes=None,
            weights_bytes=sum(array.nbytes for array in work.session.weights().values()),
            selection=_finite(reference.metrics(work.metric)),
            why="the trained model",
            **latencies(backend.name),
        )
    }
    for name, form in forms.items():
        if form.model is None:
            candidates[name] = _missing(name, form.fault)
            continue
        measured = Candidate(
            name=name,
            runtime="ONNX Runtime",
            file_bytes=(form.model.folder / "model.onnx").stat().st_size,
            weights_bytes=_weights_bytes(work.network(name)),
            selection=_finite(evaluations[name].metrics(work.metric)),
            bound=None if work.judging is work.feeds["train"] else bound_drop(work.metric, reference, evaluations[name]),
            parity=largest_difference(form.network.session, form.model, work.judging),
            why=f"answers like the trained model, without {backend.runtime.split()[0]}",
            parameters=form.network.parameters,
            **latencies(name),
        )
        if name != "fp32":
            kept, why = judge(measured, candidates["fp32"], work.allowed)
            measured = replace(measured, kept=kept, why=why)
        candidates[name] = measured
    return candidates


def _ship(
    work: Work,
    forms: Mapping[str, Form],
    candidates: Mapping[str, Candidate],
    wish: Wish,
    place: Path,
    stages: tuple[Stage, ...],
) -> tuple[Shrunk, str | None]:
    """Build what will be moved to `place`, and judge it on the test rows, which decided nothing; what of the wish is not met."""
    plain = candidates["fp32"]
    ships, fast, small, missed = best_of(
        [one for name, one in candidates.items() if one.kept and name not in FRAMEWORKS], plain, wish
    )
    for candidate in candidates.values():
        if candidate.name not in (*FRAMEWORKS, "fp32"):
            verdict = "ships" if candidate is ships else "may ship" if candidate.kept else "is rejected"
            work.say(f"{candidate.name} {verdict}: {candidate.why}")
    form = forms[ships.name]
    weights = None if form.network.architecture is None else form.network.session.weights()
    model = work.bundle("shrunk", ships.name, weights)
    with work.stage("evaluating", f"judging what ships ({ships.name}) on the test rows"):
        test = work.feeds.get("test")
        metrics = evaluate(model, test, work.metric).metrics(work.metric) if test is not None and len(test) else {}
    shrunk = Shrunk(
        path=place,
        shipped=ships.name,
        judged_on=work.judged_on,
        metric=work.metric.name,
        max_drop=work.allowed,
        candidates=tuple(candidates.values()),
        test=_finite(metrics),
        seconds=work.seconds,
        threads=work.threads,
        fast=fast.name,
        small=small.name,
        stages=stages,
    )
    if shrunk.spread > RESTLESS:
        work.say(
            f"the time of an answer varies by {shrunk.spread:.0%}: something else computes on this machine. Forms that are not further apart count as "
            "equally fast; the same command measures again."
        )
    _describe(model.folder, ships.name, form)
    storage.write_json(model.folder / "shrink.json", shrunk)
    for name in {fast.name, small.name} - {ships.name}:  # which are other points of the same frontier
        _point(work, name, forms[name], model.folder / name)
    return shrunk, missed


def _point(work: Work, name: str, form: Form, folder: Path) -> None:
    """A form in a folder of its own, with the weights of a narrower network."""
    weights = None if form.network.architecture is None else form.network.session.weights()
    write_bundle(folder, work.network(name), work.preprocessing, name=work.name, metric=work.metric.name, weights=weights)
    _describe(folder, name, form)


def _describe(folder: Path, name: str, form: Form) -> None:
    """What changed: which layers compute in int8, or whose weights are only stored so, and where the network is narrower."""
    stored = name.endswith("weights")
    layers = {"int8_layers": [] if stored else list(form.layers), "int8_weights": list(form.layers) if stored else []}
    changed = {"form": name, **layers, **(form.network.architecture or {})}
    storage.write_json(folder / "architecture.json", changed)


def _time(work: Work, framework: str, models: Mapping[str, Model], size: int) -> dict[str, tuple[float, float, float]]:
    """Median and quartiles of one call on `size` rows, all forms taking turns.

    The trained model gets its rows preprocessed, the others raw, and nothing but its answer is timed: what is left of the
    comparison leans to its side.
    """
    prepared = take(next(iter(work.judging.ordered())).inputs, size)
    raw = take(next(iter(work.judging.raw())).inputs, size)
    calls: dict[str, Callable[[], object]] = {name: partial(model.predict, raw) for name, model in models.items()}
    with work.session.answering() as answer:
        return time_alternating({framework: partial(answer, prepared), **calls})


def _weights_bytes(network: Path) -> int:
    return sum(numpy_helper.to_array(weight).nbytes for weight in onnx.load(network).graph.initializer)


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics that were computed: a bundle knows nothing of a job's own loss."""
    return {name: value for name, value in metrics.items() if np.isfinite(value)}


def _missing(name: str, why: str) -> Candidate:
    """A form that could not be made."""
    return Candidate(
        name=name,
        runtime="ONNX Runtime",
        file_bytes=None,
        weights_bytes=0,
        latency_seconds={},
        latency_spread={},
        selection={},
        kept=False,
        why=why,
    )
