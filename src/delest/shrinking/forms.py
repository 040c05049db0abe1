"""The forms in which a network could ship: fp32, int8 and its kin, each as a bundle that can be judged."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from delest import errors
from delest.bundle.model import Model, load
from delest.bundle.write import write_bundle
from delest.data import Feed
from delest.shrinking.networks import Network
from delest.shrinking.parity import LIMIT, largest_difference
from delest.shrinking.quantize import best_static, products_dominate, quantize_dynamic
from delest.shrinking.weights import quantize_weights
from delest.training.evaluate import evaluate

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from delest.backends import Backend
    from delest.data import Preprocessing
    from delest.metrics import Metric

_CALIBRATION_ROWS = 512
_CALIBRATION_BATCH = 64
_SCORING_ROWS = 2000  # of those that judge, to choose how int8 is calibrated


@dataclass(kw_only=True)
class Work:
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
        """The rows that candidates are judged by."""
        return self.feeds[self.judged_on]

    @property
    def judged_on(self) -> str:
        """The role of these rows: selection, or validation where there are none."""
        return next(role for role in ("selection", "validation", "train") if role in self.feeds and len(self.feeds[role]))

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


@dataclass(frozen=True, kw_only=True)
class Form:
    """A network as it could ship."""

    network: Network
    model: Model | None = None
    layers: tuple[str, ...] = ()  # in int8, or stored so
    fault: str = ""  # why there is no model


def export(work: Work, backend: Backend, network: Network, weights: Mapping[str, NDArray] | None) -> Form:
    """The fp32 bundle, checked against the network on real rows."""
    name = network.form("fp32")
    with work.stage("exporting", f"exporting the {network.name} network to ONNX"):
        inputs = next(iter(work.judging.ordered())).inputs
        backend.export(network.session, take(inputs, 2), work.network(name))
        model = work.bundle(name, name, weights)
    with work.stage("checking", "checking that the exported model answers like the network"):
        difference = largest_difference(network.session, model, work.judging)
    if not difference <= LIMIT:
        raise errors.CheckFailed(
            f"the exported model does not answer like the trained one: they differ by up to {difference:.3g}, {LIMIT:g} is allowed. "
            "No bundle was written; the trained model is kept. A model that draws random numbers in evaluation, or keeps state "
            "between calls, is the usual cause."
        )
    return Form(network=network, model=model)


def quantize(work: Work, network: Network) -> dict[str, Form]:
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
                    forms[name] = Form(network=network, model=work.bundle(name, name), layers=tuple(layers))
                elif kind == "int8":
                    why = "it has no convolution or matrix product whose weights could be int8"
                    forms[name] = Form(network=network, fault=why)
            except errors.DelestError:
                raise
            except Exception as error:  # of the quantiser, of any kind: the fp32 form is there and ships
                words = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                forms[name] = Form(network=network, fault=f"ONNX Runtime cannot quantise this network ({words})")
    return forms


def _score(work: Work, network: Path) -> float:
    """What a bare network scores on rows that judge, higher is better."""
    shutil.copy(network, work.network("trial"))
    rows = Feed(work.judging.source, work.judging.index[:_SCORING_ROWS], work.preprocessing, batch_size=work.judging.batch_size)
    score = evaluate(work.bundle("trial", "trial"), rows, work.metric).score
    return score if work.metric.higher_is_better else -score


def take(inputs: Any, rows: int) -> Any:
    """The first rows of a batch's inputs, repeated where there are fewer."""
    if isinstance(inputs, Mapping):
        return {name: take(array, rows) for name, array in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(take(array, rows) for array in inputs)
    return inputs[np.arange(rows) % len(inputs)]


def _by_name(inputs: Any) -> dict[str, NDArray]:
    """A batch's inputs by the names that the export gives them."""
    if isinstance(inputs, Mapping):
        return dict(inputs)
    return {f"x{place}": array for place, array in enumerate(inputs)} if isinstance(inputs, tuple) else {"x": inputs}
