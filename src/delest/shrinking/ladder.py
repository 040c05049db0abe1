"""Narrower networks, rung by rung: units are cut from the last network that kept the accuracy, what is left learns from the trained one, and is kept or
taken back; then the honest rival, a network of the last rung's widths that never was larger, gets as much time as all rungs took.

Everything lies in the run's folder `shrinking/`, one folder a rung, with a journal of decisions: who begins again goes on where a process was
killed.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delest import __version__, errors, storage
from delest.records.form import to_plain
from delest.records.shrunk import Bound, Stage
from delest.shrinking.acceptance import loses
from delest.shrinking.confidence import bound_drop
from delest.shrinking.layer_times import suitable_step, time_layers
from delest.shrinking.networks import Network
from delest.shrinking.prune import Costs, Wish, choose_units
from delest.tensors import Arrays, write
from delest.training.evaluate import Evaluation, evaluate
from delest.training.loop import Limits, Trainer

if TYPE_CHECKING:
    from delest.job import Job
    from delest.metrics import Metric
    from delest.records.plan import Plan
    from delest.training.progress import Progress

KEEP, GENTLER = 0.6, 0.8  # share of the parameters that a rung leaves, and after one that failed
SLOWER = 0.75  # a rung takes so many times its share of the parameters off the measured seconds of its layers
BATCHES = (1, 32)  # rows at which layers are timed
RUNGS = 8
LEAST_EPOCHS = 0.5  # of training, without which a rung is not begun
OF_TIME, OF_RUNG = 0.5, 0.4  # of the time for all rungs, and of what is left of that for one
SCORED_BATCHES = 24
DISTILLING = 1.35  # times an epoch of plain training, where the teacher answers as well
_PLAIN = ("precision", "memory_format", "micro_batch", "threads")  # methods that go with another loss and another network


@dataclass(kw_only=True)
class Ladder:
    """What all rungs need."""

    folder: Path  # of the run's `shrinking/`
    trained: Network
    backend: Any
    job: Job
    plan: Plan
    feeds: Mapping[str, Any]
    judging: Any
    metric: Metric
    allowed: float  # in the metric's unit
    seconds: float  # for everything here
    epoch_seconds: float  # of plain training of the trained network
    threads: int
    say: Progress
    weights_sha256: str | None = None  # of the trained network
    stages: list[Stage] = field(default_factory=list)
    interrupted: errors.Interrupted | None = None  # by which climbing ended

    def climb(self) -> list[Network]:
        """The networks that kept the accuracy, narrower and narrower, and the rival of the last where it kept it too.

        A signal ends it: `interrupted` then says so, what was kept so far is returned, and who climbs again goes on.
        """
        accepted = [self.trained]
        try:
            self._climb(accepted)
        except errors.Interrupted as stopped:
            self.interrupted = stopped
            self.say.note("interrupted: what was kept so far is measured and shipped; a second time ends it at once")
        return accepted[1:]

    def _climb(self, accepted: list[Network]) -> None:
        self._open_journal()
        self._reference = evaluate(self.trained.session, self.judging, self.metric)
        self._step = suitable_step(self.threads)
        keep, failed, spent = KEEP, 0, 0.0
        for number in range(1, RUNGS + 1):
            begun = self._begun(f"pruned-{number}")
            share = (self.seconds * OF_TIME - spent) * OF_RUNG
            least = LEAST_EPOCHS * self.epoch_seconds * DISTILLING
            if begun is None and share < least:
                if number == 1:
                    self.say.note(
                        f"the time is too short to teach a narrower network: give --time {least / OF_TIME / OF_RUNG + 1:.0f}s or more"
                    )
                break
            facts = begun or {"from": accepted[-1].name, "remove": 1 - keep, "seconds": share}
            network, stage = self._rung(f"pruned-{number}", accepted[-1], facts)
            spent += stage.seconds
            self.stages.append(stage)
            if network is None:
                break
            if stage.accepted:
                accepted.append(network)
                continue
            keep, failed = GENTLER, failed + 1
            if failed == 2:
                break
        if len(accepted) > 1:
            rival = self._rival(accepted[-1], spent)
            accepted += [rival] if rival is not None else []

    # One rung

    def _rung(self, name: str, source: Network, facts: dict[str, Any]) -> tuple[Network | None, Stage]:
        began, folder = time.monotonic(), self.folder / name
        self._note_begin(name, facts)
        if not (folder / "architecture.json").exists():
            self.say.stage(f"shrink: cutting {facts['remove']:.0%} of the parameters of {source.name}")
            fault = self._cut(folder, source, facts["remove"])
            if fault:
                return None, Stage(
                    name=name, accepted=False, why=fault, parameters=source.parameters, seconds=time.monotonic() - began
                )
        return self._trained_and_judged(name, facts["seconds"], began)

    def _cut(self, folder: Path, source: Network, remove: float) -> str:
        """Cut, and write the narrower network down; why that cannot be, "" where it was."""
        rows = next(iter(self.feeds["train"].ordered())).inputs
        pruner = self.backend.pruner(source.session, self.job, source.architecture, _first(rows, 2))
        if not pruner.widths:
            reasons = "; ".join(f"{layer}: {why}" for layer, why in list(pruner.found.whole.items())[:3])
            return f"nothing of this network can be made narrower ({reasons})"
        scores = pruner.score(self.feeds["train"], SCORED_BATCHES)
        seconds = self._layer_seconds(pruner.layers)
        costs = Costs(parameters={name: layer.parameters for name, layer in pruner.layers.items()}, seconds=seconds)
        wish = Wish(parameters=remove, seconds=SLOWER * remove)
        choice = choose_units(pruner.widths, scores, costs, wish, step=self._step)
        if choice.parameters < remove / 2:
            return f"no more than {choice.parameters:.0%} of the parameters can be cut: the widths are as narrow as they may be"
        pruner.cut(choice.cuts)
        folder.mkdir(exist_ok=True)
        with storage.written_atomically(folder / "cut.safetensors") as file:
            write(file, pruner.weights(), {})
        storage.write_json(folder / "architecture.json", pruner.architecture())
        return ""

    def _layer_seconds(self, layers: Any) -> dict[str, float]:
        """What layers take, as shares of all of them: the mean over batches, so that each counts as much."""
        found = dict.fromkeys(layers, 0.0)
        for batch in BATCHES:
            seconds = time_layers(layers, batch=batch, threads=self.threads)
            for name, one in seconds.items():
                found[name] += one / max(1e-12, sum(seconds.values())) / len(BATCHES)
        return found

    def _rival(self, last: Network, seconds: float) -> Network | None:
        """A fresh network of the last rung's widths."""
        began, name = time.monotonic(), "fresh"
        self._note_begin(name, {"from": last.name, "seconds": seconds})
        (self.folder / name).mkdir(exist_ok=True)
        storage.write_json(self.folder / name / "architecture.json", last.architecture)
        network, stage = self._trained_and_judged(name, self._begun(name)["seconds"], began)  # type: ignore[index]
        self.stages.append(stage)
        return network if stage.accepted else None

    def _trained_and_judged(self, name: str, seconds: float, began: float) -> tuple[Network, Stage]:
        folder = self.folder / name
        architecture = json.loads((folder / "architecture.json").read_text())
        job = self.backend.narrower(self.job, self.feeds["train"].preprocessing.schema, architecture)
        session = self._session(job)
        before = self._decided(name)
        if before is None:
            if (folder / "cut.safetensors").exists():
                session.load_weights(Arrays(folder / "cut.safetensors"))
            try:
                self._train(name, session, seconds)
            except errors.Diverged as error:
                return self._noted(name, session, began, architecture, False, str(error))
        if before is None or before["accepted"]:  # one that diverged may have no weights
            session.load_weights(Arrays(folder / "best.safetensors"))
        if before is not None:
            network = Network(name=name, session=session, parameters=session.parameters(), architecture=architecture)
            return network, Stage(**before)
        result = evaluate(session, self.judging, self.metric)
        bound = bound_drop(self.metric, self._reference, result)
        why = loses(bound, self.allowed)
        return self._noted(name, session, began, architecture, why is None, why or _kept(result, bound, self.metric))

    def _noted(
        self, name: str, session: Any, began: float, architecture: Mapping[str, Any], accepted: bool, why: str
    ) -> tuple[Network, Stage]:
        """Write down what became of a network, and say so."""
        network = Network(name=name, session=session, parameters=session.parameters(), architecture=architecture)
        stage = Stage(name=name, accepted=accepted, why=why, parameters=network.parameters, seconds=time.monotonic() - began)
        storage.append_line(self._journal, {"kind": "decided", **to_plain(stage)}, sync=True)
        done = "kept" if accepted else "taken back"
        self.say.note(f"{name}: {network.parameters:,} of {self.trained.parameters:,} parameters, {done}: {why}")
        return network, stage

    def _session(self, job: Job) -> Any:
        plan = replace(self.plan, choices=tuple(choice for choice in self.plan.choices if choice.method in _PLAIN))
        feed = self.feeds["train"]
        rows, keep = int(max(feed.index)) + 1, not self.job.recipe.augment
        return self.backend.student(job, plan, feed.preprocessing.schema, self.trained.session, rows=rows, keep=keep)

    def _train(self, name: str, session: Any, seconds: float) -> None:
        folder = self.folder / name
        epochs = max(1, int(seconds / (self.epoch_seconds * DISTILLING)))
        recipe = replace(self.job.recipe, epochs=epochs, patience=max(self.job.recipe.patience, epochs // 4))
        self.say.stage(
            f"shrink: {name} with {session.parameters():,} parameters learns from the trained network, {epochs} epochs or {seconds:.0f} s"
        )
        trainer = Trainer(
            session=session,
            train_feed=self.feeds["train"],
            validation_feed=self.feeds["validation"],
            recipe=recipe,
            metric=self.metric,
            folder=folder,
            limits=Limits(seconds=seconds),
            progress=self.say,
        )
        if any(folder.glob("checkpoints/step-*")):
            trainer.resume()
        trainer.train()

    # The journal

    def _open_journal(self) -> None:
        """Go on with the journal of these very settings, or begin anew."""
        settings: dict[str, Any] = {"kind": "settings", "name": "", "allowed": self.allowed, "seconds": self.seconds}
        settings |= {"weights": self.weights_sha256, "delest": __version__}
        if storage.read_lines(self._journal)[:1] != [settings]:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
            storage.append_line(self._journal, settings, sync=True)

    @property
    def _journal(self) -> Path:
        return self.folder / "decisions.jsonl"

    def _lines(self, kind: str, name: str) -> list[dict[str, Any]]:
        return [line for line in storage.read_lines(self._journal) if line["kind"] == kind and line["name"] == name]

    def _begun(self, name: str) -> dict[str, Any] | None:
        return next(iter(self._lines("begun", name)), None)

    def _decided(self, name: str) -> dict[str, Any] | None:
        found = next(iter(self._lines("decided", name)), None)
        return None if found is None else {key: value for key, value in found.items() if key != "kind"}

    def _note_begin(self, name: str, facts: Mapping[str, Any]) -> None:
        if self._begun(name) is None:
            storage.append_line(self._journal, {"kind": "begun", "name": name, **facts}, sync=True)


def _kept(result: Evaluation, bound: Bound | None, metric: Metric) -> str:
    assert bound is not None
    return f"{metric.name} {result.score:.4g}, {bound.drop:.4g} worse on average and at most {bound.upper:.4g} with 95 % confidence"


def _first(inputs: Any, rows: int) -> Any:
    if isinstance(inputs, Mapping):
        return {name: value[:rows] for name, value in inputs.items()}
    return tuple(value[:rows] for value in inputs) if isinstance(inputs, tuple) else inputs[:rows]
