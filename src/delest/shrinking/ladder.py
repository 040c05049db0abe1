"""Narrower networks, rung by rung: units are cut from the last network that kept the accuracy, what is left learns from the trained one, and is kept or
taken back; then the honest rival, a network of the last rung's widths that never was larger, gets as much time as the rungs took that were kept.

Everything lies in the run's folder `shrinking/`, one folder a rung, beside the journal of decisions: who begins again goes on where a process was
killed, and who has the journal alone comes to the same networks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
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
from delest.training.signals import Signals

if TYPE_CHECKING:
    from delest.job import Job
    from delest.metrics import Metric
    from delest.records.plan import Plan
    from delest.shrinking.journal import Journal
    from delest.training.progress import Progress

BOLD, FURTHER = 0.25, 0.4  # share of the parameters that the first rung leaves, and one after a rung that was kept
GENTLEST = 0.8  # no rung leaves more
RETREAT = (0.1, 0.65)  # powers of its share that the rung after a failed one leaves: by how far beyond the allowed drop it was
SLOWER = 0.75  # a rung takes so many times its share of the parameters off the measured seconds of its layers
BATCHES = (1, 32)  # rows at which layers are timed
NEAR = 3.0  # times the allowed drop: after one that was kept, a network that may lose no more learns on, once, with most of the time that is left
RUNGS = 8
LEAST_EPOCHS = 1.0  # of a narrower network, without which a rung is not begun
OF_TIME, OF_RUNG = 0.6, 0.4  # of the time for all rungs, and of what is left of that for one
OF_LEFT = 0.8  # of that for one that learns on
SCORED_BATCHES = 24
TRIED = 0.25  # of the first rung's time, for each of both ways to teach it
SURELY = 0.5  # of the allowed drop, by which targets alone must surely do better there to be taken
DISTILLING = 0.3  # times an epoch of plain training of the trained network, at the least; the clock ends what is slower
STUDENT = "student"  # the user's, by name
_PLAIN = ("precision", "memory_format", "micro_batch", "threads")  # methods that go with another loss and another network


@dataclass(kw_only=True)
class Ladder:
    """What all rungs need."""

    journal: Journal  # in the run's `shrinking/`
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
    teacher: Any = None  # a session that teaches in place of the trained network's
    student: Callable[..., Any] | None = None  # builds a network of the user's own, which learns first
    known_by: Mapping[str, str] = field(default_factory=dict)  # the journal's words for these two
    stages: list[Stage] = field(default_factory=list)
    interrupted: errors.Interrupted | None = None  # by which climbing ended
    signals: Signals = field(default_factory=Signals)

    def climb(self) -> list[Network]:
        """The networks that kept the accuracy: the user's student, narrower and narrower ones, and the rival of the last where it kept it too.

        A signal ends it: `interrupted` then says so, what was kept so far is returned, and who climbs again goes on.
        """
        students: list[Network] = []
        accepted = [self.trained]
        try:
            with self.signals.watched():
                self._climb(accepted, students)
        except errors.Interrupted as stopped:
            self.interrupted = stopped
            self.say.note("interrupted: what was kept so far is measured and shipped; a second time ends it at once")
        return [*students, *accepted[1:]]

    def _climb(self, accepted: list[Network], students: list[Network]) -> None:
        settings = {"allowed": self.allowed, "seconds": self.seconds, "threads": self.threads, **self.known_by}
        self.journal.open({**settings, "weights": self.weights_sha256, "delest": __version__})
        self._reference = evaluate(self.trained.session, self.judging, self.metric, stop=self._stop)
        self._step = self.journal.follow("step", "", lambda: {"channels": suitable_step(self.threads)})["channels"]
        keep, lineage, spent = BOLD, 0.0, 0.0  # seconds of the rungs that were kept, and of all
        near: Stage | None = None  # the network before, which nearly kept the accuracy
        if self.student is not None:
            network, stage = self._fresh(STUDENT, {STUDENT: self.known_by.get(STUDENT, "")}, self.seconds * OF_TIME * OF_RUNG)
            spent += stage.seconds
            students += [network] if network is not None else []
        for number in range(1, RUNGS + 1):
            source, name = accepted[-1], f"pruned-{number}"
            left = self.seconds * OF_TIME - spent
            share = left * (OF_RUNG if near is None else OF_LEFT)
            facts = self.journal.found("begun", name)
            if facts is None:
                if not self._is_enough(share, number):
                    break
                how = {"from": source.name, "remove": 1 - keep} if near is None else {"from": near.name, "remove": 0.0}
                facts = self.journal.note("begun", name, **how, seconds=share)
            network, stage = self._rung(name, source, facts)
            spent += stage.seconds
            self.stages.append(stage)
            if network is not None:
                accepted.append(network)
                keep, lineage = max(keep, FURTHER), lineage + stage.seconds + (near.seconds if near else 0.0)
                near = None
                continue
            if near is None and len(accepted) > 1 and stage.upper is not None and stage.upper <= NEAR * self.allowed:
                near = stage
                continue
            if keep == GENTLEST or stage.parameters == source.parameters:  # nothing was cut
                break
            keep, near = _gentler(keep, stage.upper, self.allowed), None
        if len(accepted) > 1:
            assert accepted[-1].architecture is not None
            rival, _ = self._fresh("fresh", accepted[-1].architecture, lineage)
            accepted += [rival] if rival is not None else []
        self._stop()

    def _is_enough(self, seconds: float, number: int) -> bool:
        """Whether a rung of so many seconds is worth beginning."""
        least = LEAST_EPOCHS * self.epoch_seconds * DISTILLING
        if seconds < least and number == 1:
            others = 1 - OF_RUNG if self.student is not None else 1.0  # which learns first
            enough = least / OF_TIME / OF_RUNG / others + 1
            self.say.note(f"the time is too short to teach a narrower network: give --time {enough:.0f}s or more")
        return seconds >= least

    def _stop(self) -> None:
        """Between two pieces of work: end here where a signal came."""
        if self.signals.received is not None:
            raise errors.Interrupted(self.signals.received, "")

    # One rung

    def _rung(self, name: str, source: Network, facts: Mapping[str, Any]) -> tuple[Network | None, Stage]:
        before = self._decided(name)
        if before is not None and not before.accepted:
            return None, before
        return self._learn(name, source, facts)

    def _learn(self, name: str, source: Network, facts: Mapping[str, Any]) -> tuple[Network | None, Stage]:
        """Cut a network, or take one up that was judged, and teach it."""
        began = time.monotonic()
        if not (self.folder / name / "architecture.json").exists():
            if not facts["remove"]:
                self._take_up(name, facts["from"], source)
            else:
                self.say.stage(f"shrink: cutting {facts['remove']:.0%} of the parameters of {source.name}")
                fault = self._cut(name, source, facts["remove"])
                if fault:
                    return None, self._noted(name, source.parameters, began, fault)
        return self._taught(name, facts["seconds"], began)

    def _cut(self, name: str, source: Network, remove: float) -> str:
        """Cut, and write the narrower network down; why that cannot be, "" where it was."""
        folder, rows = self.folder / name, next(iter(self.feeds["train"].ordered())).inputs
        pruner = self.backend.pruner(source.session, self.job, source.architecture, _first(rows, 2))
        if not pruner.widths:
            reasons = "; ".join(f"{layer}: {why}" for layer, why in list(pruner.found.whole.items())[:3])
            return f"nothing of this network can be made narrower ({reasons})"
        self._stop()
        scores = pruner.score(self.feeds["train"], SCORED_BATCHES)
        self._stop()
        timed = self.journal.follow("layers", name, lambda: {"seconds": self._layer_seconds(pruner.layers)})
        parameters = {layer: one.parameters for layer, one in pruner.layers.items()}
        costs = Costs(parameters=parameters, seconds=timed["seconds"])
        wish = Wish(parameters=remove, seconds=SLOWER * remove)
        choice = choose_units(pruner.widths, scores, costs, wish, step=self._step)
        if choice.parameters < remove / 2:
            return f"no more than {choice.parameters:.0%} of the parameters can be cut: the widths are as narrow as they may be"
        pruner.cut(choice.cuts)
        folder.mkdir(exist_ok=True)
        with storage.written_atomically(folder / "cut.safetensors") as file:
            write(file, pruner.weights(), {})
        storage.write_json(folder / "architecture.json", pruner.architecture())  # last: now the cut is whole
        return ""

    def _take_up(self, name: str, before: str, source: Network) -> None:
        """A network that was judged learns on under another name, from the weights that were judged."""
        folder, old = self.folder / name, self.folder / before
        if not (old / "best.safetensors").exists():  # the journal alone is there
            facts = self.journal.found("begun", before)
            assert facts is not None
            self._learn(before, source, facts)
        folder.mkdir(exist_ok=True)
        for file, kept in (("best.safetensors", "cut.safetensors"), ("architecture.json", "architecture.json")):
            storage.write_atomic(folder / kept, (old / file).read_bytes())

    def _layer_seconds(self, layers: Any) -> dict[str, float]:
        """What layers take, as shares of all of them: the mean over batches, so that each counts as much."""
        found = dict.fromkeys(layers, 0.0)
        for batch in BATCHES:
            seconds = time_layers(layers, batch=batch, threads=self.threads)
            for name, one in seconds.items():
                found[name] += one / max(1e-12, sum(seconds.values())) / len(BATCHES)
        return found

    def _fresh(self, name: str, architecture: Mapping[str, Any], seconds: float) -> tuple[Network | None, Stage]:
        """A network that begins with random weights."""
        began = time.monotonic()
        facts = self.journal.follow("begun", name, lambda: {"seconds": seconds})
        stage, network = self._decided(name), None
        if stage is None or stage.accepted:
            (self.folder / name).mkdir(exist_ok=True)
            storage.write_json(self.folder / name / "architecture.json", architecture)
            network, stage = self._taught(name, facts["seconds"], began)
        self.stages.append(stage)
        return network, stage

    def _taught(self, name: str, seconds: float, began: float) -> tuple[Network | None, Stage]:
        """The network that was cut, once it has learnt, where its accuracy is kept, and what became of it."""
        folder, before = self.folder / name, self.journal.found("decided", name)
        architecture, best = json.loads((folder / "architecture.json").read_text()), folder / "best.safetensors"
        known = before is not None and best.exists() and storage.checksum(best) == before["weights"]
        teacher = None
        if not known and name == STUDENT:
            teacher = self._teacher
        elif not known:
            teacher, choosing = self._choose_teacher(name, architecture, seconds)
            seconds -= choosing
        session = self._session(architecture, teacher)
        network = Network(name=name, session=session, parameters=session.parameters(), architecture=architecture)
        if not known:
            if (folder / "cut.safetensors").exists():
                session.load_weights(Arrays(folder / "cut.safetensors"))
            try:
                # What was decided had all the time it needed: its own decisions say where it ended, not the clock.
                began -= self._train(name, session, seconds, ended=before is not None)
            except errors.Diverged as error:
                return None, self._noted(name, network.parameters, began, str(error))
        session.load_weights(Arrays(best))
        if before is not None and storage.checksum(best) == before["weights"]:
            return network, Stage(**_of_stage(before))
        result = evaluate(session, self.judging, self.metric, stop=self._stop)
        bound = bound_drop(self.metric, self._reference, result)
        why = loses(bound, self.allowed)
        kept, upper = _kept(result, bound, self.metric), None if bound is None else bound.upper
        stage = self._noted(name, network.parameters, began, why, kept, upper=upper, weights=storage.checksum(best))
        return network if stage.accepted else None, stage

    def _noted(
        self,
        name: str,
        parameters: int,
        began: float,
        fault: str | None,
        kept: str = "",
        *,
        upper: float | None = None,
        weights: str | None = None,
    ) -> Stage:
        """Write down what became of a network, and say so."""
        seconds = time.monotonic() - began
        stage = Stage(name=name, accepted=fault is None, why=fault or kept, parameters=parameters, seconds=seconds, upper=upper)
        facts = {key: value for key, value in to_plain(stage).items() if key != "name"}
        self.journal.note("decided", name, **facts, weights=weights)
        done = "kept" if stage.accepted else "taken back"
        self.say.note(f"{name}: {parameters:,} of {self.trained.parameters:,} parameters, {done}: {stage.why}")
        return stage

    def _decided(self, name: str) -> Stage | None:
        """What became of a network before this process began."""
        found = self.journal.found("decided", name)
        return None if found is None else Stage(**_of_stage(found))

    @property
    def folder(self) -> Path:
        return self.journal.path.parent

    @cached_property
    def _teacher(self) -> Any:
        return self.backend.teacher(self.teacher or self.trained.session, self.feeds["train"], keep=not self.job.recipe.augment)

    def _session(self, architecture: Mapping[str, Any], teacher: Any = None) -> Any:
        """Of a narrower network; without a teacher it learns from targets alone."""
        schema = self.feeds["train"].preprocessing.schema
        own = STUDENT in architecture
        job = replace(self.job, model=self.student) if own else self.backend.narrower(self.job, schema, architecture)
        plan = replace(self.plan, choices=tuple(choice for choice in self.plan.choices if choice.method in _PLAIN))
        if teacher is None:
            return self.backend.session(job, plan, schema)
        return self.backend.student(job, plan, schema, teacher)

    def _choose_teacher(self, name: str, architecture: Mapping[str, Any], seconds: float) -> tuple[Any, float]:
        """Who teaches, None for targets alone: both are tried on the first network that was cut, for a part of its time; the seconds that this took of
        this network's."""
        each, cut = TRIED * seconds, self.folder / name / "cut.safetensors"

        def decide() -> dict[str, Any]:
            enough = each >= LEAST_EPOCHS * self.epoch_seconds * DISTILLING and len(self.feeds["validation"]) and cut.exists()
            return {"on": name, "seconds": 2 * each, "teacher": self._try_both(architecture, cut, each)} if enough else usual

        usual = {"on": name, "seconds": 0.0, "teacher": True}
        line = self.journal.follow("teaching", "", decide)
        return self._teacher if line["teacher"] else None, line["seconds"] if line["on"] == name else 0.0

    def _try_both(self, architecture: Mapping[str, Any], cut: Path, seconds: float) -> bool:
        """Whether the trained network teaches as well as targets alone do: False where it is surely worse on the validation rows, by more than a part of
        what may be lost. Mixtures take longer to learn from, and bring more in the end."""
        found = {}
        for word, teacher in (("a teacher", self._teacher), ("targets alone", None)):
            self._stop()
            self.say.stage(f"shrink: trying what a narrower network learns from {word} in {seconds:.1f} s")
            session = self._session(architecture, teacher)
            session.load_weights(Arrays(cut))
            try:
                self._trainer(session, cut.parent, seconds, seconds, saving=False).train()
                found[word] = evaluate(session, self.feeds["validation"], self.metric, stop=self._stop)
            except errors.Diverged:
                return teacher is None
        bound = bound_drop(self.metric, *found.values())
        scores = ", ".join(f"{word} {one.score:.4g}" for word, one in found.items())
        taught = bound is None or bound.upper >= -SURELY * self.allowed
        self.say.note(f"{'the teacher is taken' if taught else 'targets alone teach better'}: {self.metric.name} by {scores}")
        return taught

    def _train(self, name: str, session: Any, seconds: float, *, ended: bool) -> float:
        """Teach a network, or go on; the seconds that processes before this one taught it. One that has `ended` before does so where it did then."""
        folder = self.folder / name
        trainer = self._trainer(session, folder, seconds, None if ended else seconds)
        self.say.stage(
            f"shrink: {name} with {session.parameters():,} parameters learns, {trainer.recipe.epochs} epochs or {seconds:.0f} s"
        )
        if any(folder.glob("checkpoints/step-*")):
            trainer.resume()
        before = trainer.position.training_seconds + trainer.position.evaluating_seconds
        self._stop()
        trainer.train()
        return before

    def _trainer(self, session: Any, folder: Path, seconds: float, limit: float | None, *, saving: bool = True) -> Trainer:
        """For as many epochs as `seconds` may allow, ended by a clock at the `limit`."""
        epochs = max(1, int(seconds / (self.epoch_seconds * DISTILLING)))
        return Trainer(
            session=session,
            train_feed=self.feeds["train"],
            validation_feed=self.feeds["validation"],
            recipe=replace(self.job.recipe, epochs=epochs, patience=max(self.job.recipe.patience, epochs // 4)),
            metric=self.metric,
            folder=folder,
            limits=Limits(seconds=limit),
            progress=self.say,
            saving=saving,
        )


def _gentler(keep: float, upper: float | None, allowed: float) -> float:
    """The share that the next rung leaves after one that failed: what a network loses grows about as the logarithm of its share."""
    least, most = RETREAT
    if upper is None:  # it learnt nothing that could be judged
        power = least
    else:
        power = max(least, min(most, allowed / upper)) if upper > 0 else most  # no row differs, and too few say so
    return min(GENTLEST, keep**power)


def _of_stage(line: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in ("kind", "weights")}


def _kept(result: Evaluation, bound: Bound | None, metric: Metric) -> str:
    if bound is None:
        return ""
    return f"{metric.name} {result.score:.4g}, {bound.drop:.4g} worse on average and at most {bound.upper:.4g} with 95 % confidence"


def _first(inputs: Any, rows: int) -> Any:
    if isinstance(inputs, Mapping):
        return {name: value[:rows] for name, value in inputs.items()}
    return tuple(value[:rows] for value in inputs) if isinstance(inputs, tuple) else inputs[:rows]
