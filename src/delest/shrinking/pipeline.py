"""From a trained session to the artefact that ships: export, check, quantise, measure, accept or reject."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
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
from delest.records.shrunk import Candidate, Shrunk, Stage
from delest.shrinking.acceptance import Wish, best_of, judge
from delest.shrinking.confidence import bound_drop
from delest.shrinking.networks import TRAINED, Network
from delest.shrinking.parity import LIMIT, largest_difference
from delest.shrinking.quantize import best_static, products_dominate, quantize_dynamic
from delest.shrinking.weights import quantize_weights
from delest.training.evaluate import evaluate

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from delest.backends import Backend
    from delest.data import Preprocessing
    from delest.metrics import Metric
    from delest.shrinking.ladder import Ladder
    from delest.training.evaluate import Evaluation

_CALIBRATION_ROWS = 512
_CALIBRATION_BATCH = 64
_SCORING_ROWS = 2000  # of those that judge, to choose how int8 is calibrated


@dataclass(kw_only=True)
class _Work:
    """What all stages need."""

    folder: Path  # temporary, inside the run's
    session: Any
    feeds: Mapping[str, Feed]
    preprocessing: Preprocessing
    metric: Metric
    name: str
    max_drop: float
    threads: int
    reduce_range: bool
    say: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)
    allowed: float = 0.0  # `max_drop` in the metric's unit: of an error it is a share

    def __post_init__(self) -> None:
        self.allowed = self.max_drop

    @property
    def judging(self) -> Feed:
        """The rows that candidates are judged by: selection, or validation where there is none."""
        roles = (role for role in ("selection", "validation", "train") if role in self.feeds and len(self.feeds[role]))
        return self.feeds[next(roles)]

    def network(self, name: str) -> Path:
        """Where the bare network of a candidate is."""
        return self.folder / f"{name}.onnx"

    def bundle(self, name: str, network: str, weights: Mapping[str, NDArray] | None = None) -> Model:
        """Write a bundle around the network of a candidate and open it."""
        folder = self.folder / name
        write_bundle(
            folder, self.network(network), self.preprocessing, name=self.name, metric=self.metric.name, weights=weights
        )
        return load(folder, threads=self.threads)

    @contextmanager
    def stage(self, name: str, words: str) -> Iterator[None]:
        """Announce a stage and add up its time."""
        self.say(words)
        begin = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


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
    ladder: Callable[[Network, Feed, float], Ladder] | None = None,
    wish: Wish | None = None,
) -> Shrunk:
    """Write `bundle/` (fp32, with `weights`) and `shrunk/` (what ships, with `architecture.json` and `shrink.json`) in a run folder.

    `feeds` by role: train calibrates int8, selection decides, test is read once for what ships. A form ships where the
    one-sided 95 % bound on its drop of `metric` is at most `max_drop` (in the metric's unit; a share of the score for errors) and it is smaller or faster as measured
    here. `ladder`, given the trained network, the rows that judge and the drop that is allowed, makes narrower networks, of which each also
    has both forms. Both folders appear when everything is done; a crash leaves those that were there. The session is left as it was.
    `threads` are ONNX Runtime's; the session computes with as many as it was set to.

    Raises `CheckFailed` where the exported model does not answer like the trained one, `BadInput` where it cannot be
    exported, `DiskFull`, `AccuracyNotMet` where nothing within the bound meets the wish: what comes nearest ships then.
    """
    temporary = folder / f".shrink.{os.getpid()}.tmp"
    for leftover in folder.glob(".shrink.*.tmp"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    work = _Work(
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
        forms = {"fp32": _export(work, backend, trained, weights)}
        forms |= _quantize(work, trained)
        climbed = ladder(trained, work.judging, work.allowed) if ladder is not None else None
        for network in climbed.climb() if climbed is not None else ():
            try:
                forms[network.form("fp32")] = _export(work, backend, network, None)
            except (errors.BadInput, errors.CheckFailed) as error:  # the other networks are there
                forms[network.form("fp32")] = _Form(network=network, fault=str(error))
                continue
            forms |= _quantize(work, network)
        candidates = _measure(work, forms, reference, batch_sizes)
        shrunk, missed = _ship(
            work, forms, candidates, wish or Wish(), folder / "shrunk", tuple(climbed.stages) if climbed is not None else ()
        )
        replace_folder(temporary / "fp32", folder / "bundle")
        replace_folder(temporary / "shrunk", folder / "shrunk")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if climbed is not None and climbed.interrupted is not None:
        raise climbed.interrupted
    if missed is not None:
        raise errors.AccuracyNotMet(missed)
    return shrunk


@dataclass(frozen=True, kw_only=True)
class _Form:
    """A network as it could ship."""

    network: Network
    model: Model | None = None
    layers: tuple[str, ...] = ()  # in int8, or stored so
    fault: str = ""  # why there is no model


def _export(work: _Work, backend: Backend, network: Network, weights: Mapping[str, NDArray] | None) -> _Form:
    """The fp32 bundle, checked against the network on real rows."""
    name = network.form("fp32")
    with work.stage("exporting", f"exporting the {network.name} network to ONNX"):
        inputs = next(iter(work.judging.ordered())).inputs
        backend.export(network.session, _take(inputs, 2), work.network(name))
        model = work.bundle(name, name, weights)
    with work.stage("checking", "checking that the exported model answers like the network"):
        difference = largest_difference(network.session, model, work.judging)
    if not difference <= LIMIT:
        raise errors.CheckFailed(
            f"the exported model does not answer like the trained one: they differ by up to {difference:.3g}, {LIMIT:g} is allowed. "
            "No bundle was written; the trained model is kept. A model that draws random numbers in evaluation, or keeps state "
            "between calls, is the usual cause."
        )
    return _Form(network=network, model=model)


def _quantize(work: _Work, network: Network) -> dict[str, _Form]:
    """The 8-bit forms by name: "int8", calibrated; "dynamic", where matrix products dominate; "weights", in the file alone. Or why there is none."""
    train = work.feeds["train"]
    chosen = train.index[np.linspace(0, len(train) - 1, min(_CALIBRATION_ROWS, len(train))).astype(np.int64)]
    float_network = work.network(network.form("fp32"))

    def batches() -> Iterator[dict[str, NDArray]]:
        return (
            _by_name(batch.inputs)
            for batch in Feed(train.source, chosen, work.preprocessing, batch_size=_CALIBRATION_BATCH).ordered()
        )

    def static(out: Path) -> list[str]:
        return best_static(
            float_network, batches, out, reduce_range=work.reduce_range, judge=partial(_score, work), allowed=work.allowed
        ).int8

    makers: dict[str, Callable[[Path], list[str]]] = {"int8": static}
    if products_dominate(float_network):
        makers["dynamic"] = partial(quantize_dynamic, float_network, reduce_range=work.reduce_range)
    makers["weights"] = partial(quantize_weights, float_network)
    forms = {}
    with work.stage("quantising", f"quantising {network.name} to int8, calibrated on {len(chosen):,} training rows"):
        for kind, make in makers.items():
            name = network.form(kind)
            try:
                layers = make(work.network(name))
                if layers:
                    forms[name] = _Form(network=network, model=work.bundle(name, name), layers=tuple(layers))
                elif kind == "int8":
                    why = "it has no convolution or matrix product whose weights could be int8"
                    forms[name] = _Form(network=network, fault=why)
            except errors.DelestError:
                raise
            except Exception as error:  # of the quantiser, of any kind: the fp32 form is there and ships
                words = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                forms[name] = _Form(network=network, fault=f"ONNX Runtime cannot quantise this network ({words})")
    return forms


def _score(work: _Work, network: Path) -> float:
    """What a bare network scores on rows that judge, higher is better."""
    shutil.copy(network, work.network("trial"))
    rows = Feed(work.judging.source, work.judging.index[:_SCORING_ROWS], work.preprocessing, batch_size=work.judging.batch_size)
    score = evaluate(work.bundle("trial", "trial"), rows, work.metric).score
    return score if work.metric.higher_is_better else -score


def _measure(
    work: _Work, forms: Mapping[str, _Form], reference: Evaluation, batch_sizes: Sequence[int]
) -> dict[str, Candidate]:
    """Each form with its accuracy, size and latency, and the verdict against the trained network's fp32 form."""
    models = {name: form.model for name, form in forms.items() if form.model is not None}
    with work.stage("evaluating", f"judging on {len(work.judging):,} rows"):
        evaluations = {name: evaluate(model, work.judging, work.metric) for name, model in models.items()}
    with work.stage("timing", "measuring the time of an answer"):
        timings = {size: _time(work, models, size) for size in batch_sizes}

    def latencies(name: str) -> dict[str, Any]:
        return {
            "latency_seconds": {size: timing[name][0] for size, timing in timings.items()},
            "latency_spread": {size: timing[name][1:] for size, timing in timings.items()},
        }

    candidates = {
        "torch": Candidate(
            name="torch",
            runtime="PyTorch eager",
            file_bytes=None,
            weights_bytes=sum(array.nbytes for array in work.session.weights().values()),
            selection=_finite(reference.metrics(work.metric)),
            why="the trained model",
            **latencies("torch"),
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
            why="answers like the trained model, without PyTorch",
            parameters=form.network.parameters,
            **latencies(name),
        )
        if name != "fp32":
            kept, why = judge(measured, candidates["fp32"], work.allowed)
            measured = replace(measured, kept=kept, why=why)
        candidates[name] = measured
    return candidates


def _ship(
    work: _Work,
    forms: Mapping[str, _Form],
    candidates: Mapping[str, Candidate],
    wish: Wish,
    place: Path,
    stages: tuple[Stage, ...],
) -> tuple[Shrunk, str | None]:
    """Build what will be moved to `place`, and judge it on the test rows, which decided nothing; what of the wish is not met."""
    plain = candidates["fp32"]
    ships, fast, small, missed = best_of([one for name, one in candidates.items() if one.kept and name != "torch"], plain, wish)
    for candidate in candidates.values():
        if candidate.name not in ("torch", "fp32"):
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
    _describe(model.folder, ships.name, form)
    storage.write_json(model.folder / "shrink.json", shrunk)
    for name in {fast.name, small.name} - {ships.name}:  # which are other points of the same frontier
        _point(work, name, forms[name], model.folder / name)
    return shrunk, missed


def _point(work: _Work, name: str, form: _Form, folder: Path) -> None:
    """A form in a folder of its own, with the weights of a narrower network."""
    weights = None if form.network.architecture is None else form.network.session.weights()
    write_bundle(folder, work.network(name), work.preprocessing, name=work.name, metric=work.metric.name, weights=weights)
    _describe(folder, name, form)


def _describe(folder: Path, name: str, form: _Form) -> None:
    """What changed: which layers compute in int8, or whose weights are only stored so, and where the network is narrower."""
    stored = name.endswith("weights")
    layers = {"int8_layers": [] if stored else list(form.layers), "int8_weights": list(form.layers) if stored else []}
    changed = {"form": name, **layers, **(form.network.architecture or {})}
    storage.write_json(folder / "architecture.json", changed)


def _time(work: _Work, models: Mapping[str, Model], size: int) -> dict[str, tuple[float, float, float]]:
    """Median and quartiles of one call on `size` rows, all forms taking turns.

    The trained model gets its rows preprocessed, the others raw, and nothing but its answer is timed: what is left of the
    comparison leans to its side.
    """
    prepared = _take(next(iter(work.judging.ordered())).inputs, size)
    raw = _take(next(iter(work.judging.raw())).inputs, size)
    calls: dict[str, Callable[[], object]] = {name: partial(model.predict, raw) for name, model in models.items()}
    with work.session.answering() as answer:
        return time_alternating({"torch": partial(answer, prepared), **calls})


def _take(inputs: Any, rows: int) -> Any:
    """The first rows of a batch's inputs, repeated where there are fewer."""
    if isinstance(inputs, Mapping):
        return {name: _take(array, rows) for name, array in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(_take(array, rows) for array in inputs)
    return inputs[np.arange(rows) % len(inputs)]


def _by_name(inputs: Any) -> dict[str, NDArray]:
    """A batch's inputs by the names that the export gives them."""
    if isinstance(inputs, Mapping):
        return dict(inputs)
    return {f"x{place}": array for place, array in enumerate(inputs)} if isinstance(inputs, tuple) else {"x": inputs}


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
