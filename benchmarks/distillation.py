"""What a student of one sixteenth of the parameters learns from a teacher, beside what it learns alone.

    python benchmarks/distillation.py [--only SEED] [--minutes N]

The network of the digits example and 300 of its rows to train on; the other 9,700 judge. The teacher makes as many steps as help it: half as many again are
measured too. The student is the same network with every width cut alike, as the ladder of `delest shrink` cuts, with fresh weights. It learns with the same recipe and
the same rows alone and from the teacher, by each objective of the library, on mixtures of rows (the default) and on the rows as they are: with as many steps as
alone, and within the seconds that it took alone, in which the teacher's answers are counted. What mixtures are worth without a teacher is a line of its own. Last
weights count; nothing is chosen by test rows. A row is a seed: of the split, the weights and the order of rows. Takes about ten minutes on two cores.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import results_file

from delest import job as jobs
from delest.backends.torch import TorchBackend
from delest.backends.torch.distillation import OBJECTIVE, OBJECTIVES, Mixture, StudentSession, Teacher
from delest.backends.torch.session import TorchSession
from delest.job import Job, Recipe, Split
from delest.records.batch import Batch
from delest.records.plan import Plan
from delest.training.evaluate import evaluate
from delest.training.loop import Limits, Trainer
from delest.training.progress import Progress
from delest.verbs.workplace import Workplace, open_workplace

NAME = "distillation"
SEEDS = {f"seed {seed}": seed for seed in (0, 1, 2)}
TRAINED_ON = 0.03  # of the 10,000 digits
BATCH, TEACHER_EPOCHS, STUDENT_EPOCHS = 64, 100, 200
PARAMETERS = 1 / 16
PAGE = results_file.HERE.parent / "docs" / "methods" / "shrinking.md"
BEGIN, END = "<!-- distillation: python benchmarks/distillation.py -->", "<!-- end of distillation -->"
STUDENTS = {
    f"{objective}, {on}": (objective, mixing)
    for mixing, on in ((True, "mixtures"), (False, "rows"))
    for objective in OBJECTIVES
}
PROMISED = f"{OBJECTIVE}, mixtures"  # what the ladder uses
WAYS = ("equal steps", "equal time")
BOUND_SATURATED, BOUND_GAP, BOUND_SHARE = 0.003, 0.02, 1 / 3

BACKEND = TorchBackend()


def job_of(seed: int, epochs: int) -> Job:
    example = jobs.load(results_file.HERE.parent / "examples" / "digits.py")
    split = Split(train=TRAINED_ON, validation=0.0, selection=0.0, test=1 - TRAINED_ON)
    recipe = Recipe(epochs=epochs)
    return replace(example, split=split, batch_size=BATCH, recipe=recipe, seed=seed, origin=None)


def measure(name: str) -> dict[str, Any]:
    seed = SEEDS[name]
    place = open_workplace(job_of(seed, TEACHER_EPOCHS), Progress())
    teacher = BACKEND.session(place.job, plan(), place.source.schema)
    row: dict[str, Any] = {"row": name, "seed": seed, "rows": {role: len(index) for role, index in place.splits.items()}}
    row["teacher"] = learn(place, teacher, place.job.recipe)
    more = replace(place.job.recipe, epochs=TEACHER_EPOCHS * 3 // 2)
    row["longer"] = learn(place, BACKEND.session(place.job, plan(), place.source.schema), more)
    student = narrow(place, teacher, seed)
    schema, recipe = place.source.schema, student.recipe
    row["alone"] = learn(place, BACKEND.session(student, plan(), schema), recipe)
    row["alone, mixtures"] = learn(place, Mixed(student, plan(), schema), recipe)
    for name, (objective, mixing) in STUDENTS.items():
        row[name] = {}
        for way in WAYS:
            answers = Teacher(teacher, rows=int(max(place.splits["train"])) + 1, keep=not recipe.augment)
            session = StudentSession(student, plan(), schema, answers, objective, mixing=mixing)
            row[name][way] = learn(place, session, recipe, row["alone"]["seconds"] if way == "equal time" else None)
    return row


class Mixed(TorchSession):
    """A session that learns from the targets of mixtures of rows, and from no teacher."""

    def batch_loss(self, batch: Batch) -> Any:
        mixture = Mixture.draw(batch.inputs)
        return mixture.loss(self.loss.rows, self.model(mixture.inputs), batch.targets)


def plan() -> Plan:
    return Plan(batch_size=BATCH, micro_batch=BATCH)


def narrow(place: Workplace, teacher: Any, seed: int) -> Job:
    """The job of the student: every width cut to the same share, the largest at which no more than a sixteenth of the parameters is left."""
    inputs = next(iter(place.feed("train").ordered())).inputs[:2]
    for thousandths in range(260, 200, -2):
        pruner = BACKEND.pruner(teacher, place.job, None, inputs)
        pruner.cut({width.name: range(round(width.size * thousandths / 1000), width.size) for width in pruner.widths})
        if pruner.parameters() <= PARAMETERS * teacher.parameters():
            break
    recipe = replace(place.job.recipe, epochs=STUDENT_EPOCHS)
    return BACKEND.narrower(replace(place.job, recipe=recipe, seed=seed + 100), place.source.schema, pruner.architecture())


def learn(place: Workplace, session: Any, recipe: Recipe, seconds: float | None = None) -> dict[str, Any]:
    """Train with the library's loop to the last step of the recipe, or within so many seconds, and judge on test and training rows."""
    trainer = Trainer(
        session=session,
        train_feed=place.feed("train", augmented=True),
        validation_feed=place.feed("validation"),
        recipe=recipe,
        metric=place.metric,
        folder=Path(),
        limits=Limits(seconds=seconds),
        saving=False,
    )
    trainer.train()
    test, train = (evaluate(session, place.feed(role), place.metric) for role in ("test", "train"))
    return {
        "parameters": session.parameters(),
        "steps": trainer.position.step,
        "seconds": trainer.position.training_seconds,
        "accuracy": test.score,
        "nll": test.loss,
        "train_accuracy": train.score,
        "train_nll": train.loss,
    }


# The table


def mean_of(rows: Sequence[dict[str, Any]], what: str, *keys: str) -> float:
    return statistics.mean(values_of(rows, what, *keys))


def values_of(rows: Sequence[dict[str, Any]], what: str, *keys: str) -> list[float]:
    """One figure of each seed: of the "teacher", of "plain, rows" at "equal steps"."""
    found = []
    for row in rows:
        inner = row
        for key in keys:
            inner = inner[key]
        found.append(inner[what])
    return found


def share_of(rows: Sequence[dict[str, Any]], what: str, *keys: str) -> float:
    """Of the gap between the student alone and its teacher, means over seeds, what a student gains; negative for one that loses."""
    alone, teacher = mean_of(rows, what, "alone"), mean_of(rows, what, "teacher")
    return (mean_of(rows, what, *keys) - alone) / (teacher - alone)


def bounds_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    longer = mean_of(rows, "accuracy", "longer") - mean_of(rows, "accuracy", "teacher")
    gap = mean_of(rows, "accuracy", "teacher") - mean_of(rows, "accuracy", "alone")
    size = max(row["alone"]["parameters"] / row["teacher"]["parameters"] for row in rows)
    return [
        results_file.bound_at_most("teacher, accuracy gained by half as many steps again", longer, BOUND_SATURATED),
        results_file.bound_at_most("student's parameters over the teacher's", size, PARAMETERS),
        results_file.bound_at_least("accuracy, teacher less student alone", gap, BOUND_GAP),
        *(
            results_file.bound_at_least(
                f"{PROMISED}, {way}: share of the gap gained, {words}", share_of(rows, what, PROMISED, way), BOUND_SHARE
            )
            for way in WAYS
            for what, words in (("accuracy", "accuracy"), ("nll", "negative log-likelihood"))
        ),
    ]


def render(rows: Sequence[dict[str, Any]]) -> str:
    """The table in Markdown: means over seeds, test accuracy in per cent with each seed's, negative log-likelihood."""
    first = rows[0]
    lines = [
        f"Digits, {first['rows']['train']:,} rows to train on, {first['rows']['test']:,} test rows, seeds {', '.join(str(row['seed']) for row in rows)}; "
        f"{first['teacher']['parameters']:,} parameters and {first['alone']['parameters']:,}.",
        "",
        "| | accuracy by seed | mean | of the gap | NLL | of the gap | steps | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [line_of(rows, "teacher", "teacher"), line_of(rows, "teacher, half as many steps again", "longer")]
    lines += [line_of(rows, "student alone", "alone"), line_of(rows, "student alone, mixtures", "alone, mixtures")]
    for name in STUDENTS:
        lines += [line_of(rows, f"{name}, {way}", name, way) for way in WAYS]
    return "\n".join(lines)


def line_of(rows: Sequence[dict[str, Any]], about: str, *keys: str) -> str:
    accuracies = [100 * value for value in values_of(rows, "accuracy", *keys)]
    shares = [
        f"{share_of(rows, what, *keys):.0%}" if keys[0] not in ("teacher", "longer", "alone") else ""
        for what in ("accuracy", "nll")
    ]
    steps, seconds = (mean_of(rows, what, *keys) for what in ("steps", "seconds"))
    return (
        f"| {about} | {', '.join(f'{one:.2f}' for one in accuracies)} | **{statistics.mean(accuracies):.2f}** | {shares[0]} | "
        f"{mean_of(rows, 'nll', *keys):.4f} | {shares[1]} | {steps:,.0f} | {seconds:.1f} |"
    )


def write_page(rows: Sequence[dict[str, Any]], path: Path = PAGE) -> None:
    text = path.read_text()
    path.write_text(f"{text[: text.index(BEGIN)]}{BEGIN}\n{render(rows)}\n{text[text.index(END) :]}")


def show(row: dict[str, Any]) -> None:
    print(render([row]), flush=True)


def main() -> None:
    options = results_file.read_options(__doc__.splitlines()[0], list(SEEDS))

    def bounds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        print(render(rows))
        write_page(rows)
        return bounds_of(rows)

    results_file.fill_table(NAME, list(SEEDS), options, measure, bounds, show)


if __name__ == "__main__":
    main()
