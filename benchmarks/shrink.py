"""Smaller and faster at equal accuracy, against others that begin with the same trained network.

    python benchmarks/shrink.py --cifar10 FOLDER --text FILE [--only TASK]

A row is a task: a start that more training does not improve; what `delest shrink` makes of it; torch-pruning with recovery for as long; NNCF's post-training
quantisation; and three seeds of delest's narrower network trained from random weights for the whole time, start and shrinking together. The float networks
of the others are taken with ONNX Runtime's static int8 beside them, and of both what keeps the bound and has the smallest product of size and latency. All are
judged on the same selection rows by the same paired bound, timed by turns at 1 and 32 rows, and get the better of one and two threads.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import results_file
import shrink_rivals as rivals
from shrink_jobs import TASKS, Task

import delest
from delest.bundle.model import load as open_bundle
from delest.bundle.timing import time_alternating
from delest.bundle.write import write_bundle
from delest.job import load
from delest.shrinking.acceptance import loses
from delest.shrinking.confidence import bound_drop
from delest.training.evaluate import Evaluation, evaluate
from delest.training.progress import PlainProgress, Progress
from delest.verbs.training import Trained, restore

HERE = Path(__file__).parent
BATCHES, THREADS = (1, 32), (1, 2)
CONVERGED = 0.003  # of the metric; of a loss its share
NEEDED = ("model.onnx", "labels.json", "bundle.json")  # by `delest predict`


@dataclass
class Contest:
    """One task: forms of all rivals by name, with what was measured of each."""

    task: Task
    start: Trained
    folder: Path
    reference: Evaluation  # of the trained network on selection rows
    allowed: float
    models: dict[str, Path] = field(default_factory=dict)
    forms: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, name: str, bundle: Path, **facts: Any) -> None:
        model, metric = open_bundle(bundle), self.start.place.metric
        selection, test = (evaluate(model, self.start.place.feed(role), metric) for role in ("selection", "test"))
        bound = bound_drop(metric, self.reference, selection)
        self.models[name] = bundle
        self.forms[name] = {
            "bytes": sum((bundle / file).stat().st_size for file in NEEDED),
            "selection": selection.score,
            "test": test.score,
            "bound": None if bound is None else bound.upper,
            "within": loses(bound, self.allowed) is None,
            **facts,
        }

    def add_network(self, name: str, make: Callable[[], Path], **facts: Any) -> None:
        """A bare network of a rival, in a bundle as delest's own are; or why there is none."""
        try:
            network, bundle = make(), self.folder / name.replace(" ", "-").replace("/", "-")
            place = self.start.place
            write_bundle(bundle, network, place.preprocessing, name=name, metric=place.metric.name)
            self.add(name, bundle, **facts)
        except Exception as error:
            self.forms[name] = {"fault": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}", "within": False}

    def accepts(self, trained: Trained) -> bool:
        place = self.start.place
        bound = bound_drop(place.metric, self.reference, evaluate(trained.session, place.feed("selection"), place.metric))
        return loses(bound, self.allowed) is None

    def time(self) -> None:
        """Latency of all forms by batch and threads, by turns."""
        for batch in BATCHES:
            for threads in THREADS:
                found = time_alternating(self._calls(batch, threads), seconds=6.0)
                for name, (median, low, high) in found.items():
                    place = self.forms.setdefault(name, {}).setdefault("latency_seconds", {}).setdefault(str(batch), {})
                    place[str(threads)] = {"median": median, "quartiles": [low, high]}

    def _calls(self, batch: int, threads: int) -> dict[str, Callable[[], object]]:
        raw = _rows(next(iter(self.start.place.feed("selection").raw())).inputs, batch)
        return {name: partial(open_bundle(path, threads=threads).predict, raw) for name, path in self.models.items()}


def _rows(inputs: Mapping[str, Any], count: int) -> dict[str, Any]:
    return {name: array[np.arange(count) % len(array)] for name, array in inputs.items()}


def measure(name: str, options: Any) -> dict[str, Any]:
    task = TASKS[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        return _contest(name, task, folder, _data(task, folder, options))


def _data(task: Task, folder: Path, options: Any) -> dict[str, Any]:
    """The job's data where they are not its own."""
    if task.prepare is not None:
        (folder / "data").mkdir()
        given = getattr(options, task.source) if task.source else None
        return {"data": task.prepare(folder / "data", given)}
    return {"data": getattr(options, task.source)} if task.source else {}


def _contest(name: str, task: Task, folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    say = PlainProgress()
    job = replace(load(f"{HERE / 'shrink_jobs.py'}:{name}"), **changes)
    say.stage(f"{name}: training the start")
    start = _train(job, folder / "start")
    longer = _train(
        replace(job, recipe=replace(job.recipe, epochs=round(1.5 * (job.recipe.epochs or start.run.epochs)))), folder / "longer"
    )
    place, metric = start.place, start.place.metric
    reference = evaluate(start.session, place.feed("selection"), metric)
    allowed = task.max_drop * (1.0 if metric.higher_is_better else abs(reference.score))
    contest = Contest(task, start, folder, reference, allowed)

    say.stage(f"{name}: delest shrink")
    began = time.monotonic()
    shrunk = delest.shrink(folder / "start", max_drop=task.max_drop, time=task.seconds, say=say)
    shrinking = time.monotonic() - began
    _add_ours(contest, shrunk)

    say.stage(f"{name}: torch-pruning")
    rows = rivals.calibration(start)
    found, told = rivals.by_torch_pruning(start, folder, task, contest.accepts)
    contest.forms |= {other: facts for other, facts in told.items() if "fault" in facts}
    for other, trained in found.items():
        _add_both(contest, other, trained, rows, **told[other])

    say.stage(f"{name}: NNCF")
    network = rivals.export(start, folder / "start.onnx")
    contest.add_network("start int8", lambda: rivals.by_onnx_runtime(network, rows))
    contest.add_network("nncf", lambda: rivals.by_nncf(network, rows))

    say.stage(f"{name}: from scratch")
    architecture = _narrowest(folder / "start", shrunk)
    total = start.run.seconds["training"] + shrinking
    if architecture is not None:
        for seed, trained in zip(rivals.SEEDS, rivals.from_scratch(start, architecture, total, folder), strict=True):
            _add_both(contest, f"scratch {seed}", trained, rows, parameters=trained.session.parameters())
    contest.time()
    return _row(name, contest, longer, shrunk, {"shrinking": shrinking, "training": start.run.seconds["training"]})


def _train(job: Any, folder: Path) -> Trained:
    delest.train(job, out=folder, say=Progress())
    return restore(folder, Progress(), job)


def _add_ours(contest: Contest, shrunk: Any) -> None:
    parameters = {one.name: one.parameters for one in shrunk.candidates}
    contest.add("start", shrunk.path.parent / "bundle", parameters=contest.start.session.parameters())
    for name in dict.fromkeys((shrunk.shipped, shrunk.fast, shrunk.small)):
        bundle = shrunk.path if name == shrunk.shipped else shrunk.path / name
        contest.add(f"delest {name}", bundle, parameters=parameters[name])


def _add_both(contest: Contest, name: str, trained: Trained, rows: Any, **facts: Any) -> None:
    """A trained network of a rival as it is, and in ONNX Runtime's int8."""
    network = contest.folder / f"{name.replace(' ', '-')}.onnx"
    contest.add_network(name, lambda: rivals.export(trained, network), **facts)
    if network.exists():
        contest.add_network(f"{name} int8", lambda: rivals.by_onnx_runtime(network, rows), **facts)


def _narrowest(run: Path, shrunk: Any) -> dict[str, Any] | None:
    """The widths of what ships; where the trained ones are kept, of the last narrower network that was accepted."""
    accepted = [stage.name for stage in shrunk.stages if stage.accepted]
    shipped = next((name for name in accepted if shrunk.shipped == name or shrunk.shipped.startswith(f"{name}-")), None)
    name = shipped or (accepted[-1] if accepted else None)
    return None if name is None else json.loads((run / "shrinking" / name / "architecture.json").read_text())


def _row(name: str, contest: Contest, longer: Trained, shrunk: Any, seconds: dict[str, float]) -> dict[str, Any]:
    metric = contest.start.place.metric
    sign = 1.0 if metric.higher_is_better else -1.0
    gained = sign * (longer.run.test[metric.name] - contest.start.run.test[metric.name])
    scratch = [
        form["selection"] for other, form in contest.forms.items() if other.startswith("scratch") and "int8" not in other
    ]
    accepted = [stage.parameters for stage in shrunk.stages if stage.accepted and stage.name.startswith("pruned")]
    return {
        "row": name,
        "metric": metric.name,
        "higher_is_better": metric.higher_is_better,
        "allowed": contest.allowed,
        "selection_rows": len(contest.reference.index),
        "seconds": seconds,
        "more_training_gains": gained if metric.higher_is_better else gained / abs(contest.start.run.test[metric.name]),
        "scratch_drop": sign * (contest.reference.score - statistics.mean(scratch)) if scratch else None,
        "pruned_alone": 1 - min(accepted) / contest.start.session.parameters() if accepted else 0.0,
        "ships": shrunk.shipped,
        "fast": shrunk.fast,
        "small": shrunk.small,
        "torch_eager_seconds": next(one.latency_seconds for one in shrunk.candidates if one.name == "torch"),
        "refused": {one.name: one.why for one in shrunk.candidates if not one.kept},
        "stages": [{"name": stage.name, "why": stage.why, "parameters": stage.parameters} for stage in shrunk.stages],
        "forms": contest.forms,
    }


# What the table promises


def latency(form: Mapping[str, Any], batch: int) -> float:
    """Seconds of a call, of the better number of threads."""
    return min(one["median"] for one in form["latency_seconds"][str(batch)].values())


def slowness(form: Mapping[str, Any]) -> float:
    return math.sqrt(latency(form, 1) * latency(form, 32))


def best_rival(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """What keeps the bound and has the smallest product of size and seconds."""
    others = [
        {"name": name, **form}
        for name, form in row["forms"].items()
        if form["within"] and not name.startswith("delest") and name != "start"
    ]
    return min(others, key=lambda form: form["bytes"] * slowness(form), default=None)


def compare(row: Mapping[str, Any]) -> dict[str, Any]:
    """The named artefacts against the start and against the best rival."""
    start, forms = row["forms"]["start"], row["forms"]
    fast, small, ships = (forms[f"delest {row[kind]}"] for kind in ("fast", "small", "ships"))
    rival = best_rival(row)
    found = {
        "smaller": start["bytes"] / small["bytes"],
        "latency_1": latency(fast, 1) / latency(start, 1),
        "latency_32": latency(fast, 32) / latency(start, 32),
        "rival": rival and rival["name"],
        "rival_smaller": None,
        "rival_faster": None,
    }
    if rival is not None:
        options = [(rival["bytes"] / one["bytes"], slowness(rival) / slowness(one)) for one in (ships, fast, small)]
        found["rival_smaller"], found["rival_faster"] = max(options, key=lambda pair: (min(pair) >= 1, max(pair)))
    return found


def bounds_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    low, high = results_file.bound_at_most, results_file.bound_at_least
    against = {row["row"]: compare(row) for row in rows}
    sizes = sorted(one["smaller"] for one in against.values())
    ahead = [max(one["rival_smaller"] or math.inf, one["rival_faster"] or math.inf) for one in against.values()]
    behind = sum(one["rival"] is not None and one["rival_smaller"] < 1 and one["rival_faster"] < 1 for one in against.values())
    return [
        *(low(f"{row['row']}, gained by half as much training again", row["more_training_gains"], CONVERGED) for row in rows),
        *(
            high(
                f"{row['row']}, lost by the narrow network from scratch, share of what may be",
                row["scratch_drop"] / row["allowed"],
                1.0,
            )
            for row in rows
            if row["scratch_drop"] is not None
        ),
        high("starts of 1 MB or more", sum(row["forms"]["start"]["bytes"] >= 1e6 for row in rows), 2),
        high("times smaller, median", statistics.median(sizes), 6.0),
        high("times smaller, second best", sizes[-2], 8.0),
        high("times smaller, worst", sizes[0], 4.0),
        *(
            low(f"latency at {batch} rows, {word}", pick(one[f"latency_{batch}"] for one in against.values()), bound)
            for batch, bound in ((1, 0.75), (32, 0.6))
            for word, pick, bound in (("median", statistics.median, bound), ("worst", max, 1.0))
        ),
        high("parameters that pruning alone removes, least", min(row["pruned_alone"] for row in rows), 0.3),
        high("parameters that pruning alone removes, second best", sorted(row["pruned_alone"] for row in rows)[-2], 0.5),
        high("tasks where delest is 1.25 times smaller or faster than the best rival", sum(one >= 1.25 for one in ahead), 3),
        low("tasks where delest is both larger and slower than it", behind, 0),
    ]


def show(row: Mapping[str, Any]) -> None:
    print(
        f"{row['row']}: {row['metric']}, {row['allowed']:.4g} may be lost on {row['selection_rows']:,} rows; ships {row['ships']}"
    )
    for name, form in row["forms"].items():
        if "fault" in form:
            print(f"  {name:26} {form['fault']}")
            continue
        times = " ".join(f"{1e6 * latency(form, batch):9.0f} us" for batch in BATCHES)
        mark = "" if form["within"] else "  loses too much"
        print(f"  {name:26} {form['bytes'] / 1024:9,.1f} KiB {times}  {form['selection']:.4f} {form['test']:.4f}{mark}")
    print(f"  {compare(row)}", flush=True)


def main() -> None:
    options = results_file.read_options(
        __doc__.splitlines()[0], tuple(TASKS), cifar10="folder of CIFAR-10", text="text file of the language model"
    )
    missing = {TASKS[name].source for name in options.only} - {None}
    for source in sorted(one for one in missing if one and getattr(options, one) is None):
        raise SystemExit(f"--{source} is missing: it names the data of that task (--only leaves a task out)")
    results_file.fill_table("shrink", tuple(TASKS), options, lambda name: measure(name, options), bounds_of, show)


if __name__ == "__main__":
    main()
