"""What methods that change results change: the digits example trained with each and without, with the same three seeds.

    python benchmarks/methods_on_digits.py [--only SIDE] [--minutes N]

Both sides make the same number of epochs and stop at none earlier; a seed decides the split, the first weights, the order of rows and the
masks of both. They take turns: for each seed the plain run, then the others, the next seed the other way round. Three seeds tell
a method that breaks training from one that does not, no more: differences are given beside their spread, and nothing is promised of them.
A complete table is also written into the methods' pages, docs/methods/NAME.md. Takes about five minutes on two cores.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import results_file
from torch import nn

from delest import job as jobs, methods
from delest.job import Recipe, Split
from delest.records.plan import Choice, Plan
from delest.training.progress import Progress
from delest.verbs.training import Settings, train_with

NAME, SEEDS, EPOCHS = "methods_on_digits", (0, 1, 2), 6
PAGES = results_file.HERE.parent / "docs" / "methods"
BEGIN, END = "<!-- digits: python benchmarks/methods_on_digits.py -->", "<!-- end of digits -->"
EXAMPLE = jobs.load(results_file.HERE.parent / "examples" / "digits.py")
SPLIT = Split(train=0.7, validation=0.05, selection=0.05, test=0.2)


@dataclass(frozen=True)
class Side:
    """One way of training; `method` None: plain. `about` is how a row of the table begins."""

    about: str
    method: str | None
    config: dict[str, Any]
    network: str = "digits"

    @property
    def name(self) -> str:
        return f"{self.network}, {self.about}"


def dropping() -> nn.Module:
    """The example's network with three dropout layers, and groups normalised in place of the batch, so that rows are independent."""
    assert EXAMPLE.model is not None
    net = EXAMPLE.model()
    layers = [nn.GroupNorm(8, one.num_features) if isinstance(one, nn.BatchNorm2d) else one for one in net.features]
    net.features = nn.Sequential(*layers[:6], nn.Dropout(0.1), *layers[6:], nn.Dropout(0.1))
    return net


NETWORKS: dict[str, Callable[..., Any] | None] = {"digits": EXAMPLE.model, "three dropout layers": dropping}
SIDES = (
    *(Side("plain", None, {}, network) for network in NETWORKS),
    Side("bf16", "precision", {"dtype": "bf16"}),
    Side("8 bits", "optimizer_state", {"bits": 8}),
    Side("4 bits", "optimizer_state", {"bits": 4}),
    Side("rows and columns", "factored_state", {}),
    Side("4 parts of 32 rows, each normalised by itself", "micro_batch", {"rows": 32}),
    Side("4 parts of 32 rows", "micro_batch", {"rows": 32}, "three dropout layers"),
    Side(
        "a block with two of them in 4 parts",
        "layered_accumulation",
        {"modules": ["features"], "parts": 4},
        "three dropout layers",
    ),
)


def measure(side: Side, seed: int) -> dict[str, Any]:
    """One row: a whole training, judged on the 2,000 test rows with the weights that were best on 500 validation rows."""
    recipe = Recipe(epochs=EPOCHS, patience=1000)
    job = replace(EXAMPLE, model=NETWORKS[side.network], split=SPLIT, recipe=recipe, seed=seed, origin=None)
    chosen = []
    if side.method is not None:
        keeps = methods.named(side.method).keeps(side.config, batch_statistics=side.network == "digits")
        chosen = [Choice(method=side.method, config=side.config, keeps=keeps, why="to be compared")]
    plan = Plan(choices=tuple(chosen), batch_size=job.batch_size, micro_batch=side.config.get("rows", job.batch_size))
    with tempfile.TemporaryDirectory() as folder:
        trained = train_with(job, Settings(plan=plan, out=Path(folder) / "run"), Progress(), "train")
    run, arrays = trained.run, trained.session.state().arrays
    return {
        "row": f"{side.name}, seed {seed}",
        "side": side.name,
        "method": side.method,
        "config": side.config,
        "network": side.network,
        "seed": seed,
        "accuracy": run.test["accuracy"],
        "loss": run.test["loss"],
        "epochs": run.epochs,
        "seconds": run.seconds["training"],
        "state_bytes": sum(array.nbytes for name, array in arrays.items() if name.startswith("optimizer.")),
    }


# The table


def sides_of(rows: Sequence[dict[str, Any]], side: Side) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of a side's plain runs and its own, by seed."""
    by = {(row["side"], row["seed"]): row for row in rows}
    plain = next(one for one in SIDES if one.method is None and one.network == side.network)
    return [by[plain.name, seed] for seed in SEEDS], [by[side.name, seed] for seed in SEEDS]


def differences(rows: Sequence[dict[str, Any]], side: Side, what: str) -> list[float]:
    """With the method less without, by seed."""
    return [its[what] - plain[what] for plain, its in zip(*sides_of(rows, side), strict=True)]


def render(rows: Sequence[dict[str, Any]], method: str) -> str:
    """A method's table in Markdown: test accuracy in per cent, test loss, bytes of the optimizer's state."""
    lines = [
        f"Digits, 7,000 rows, {EPOCHS} epochs, seeds {', '.join(map(str, SEEDS))}; judged on 2,000 test rows. Differences are those of pairs "
        "with the same seed: their mean and, in brackets, their standard deviation.",
        "",
        "| | network | accuracy, plain | with it | points | loss, plain | with it | difference | state, KiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for side in SIDES:
        if side.method == method:
            plain, its = sides_of(rows, side)
            cells = [side.about, side.network]
            for what, scale, digits in (("accuracy", 100, 2), ("loss", 1, 4)):
                cells += [", ".join(f"{scale * row[what]:.{digits}f}" for row in some) for some in (plain, its)]
                found = [scale * one for one in differences(rows, side, what)]
                cells.append(f"**{statistics.mean(found):+.{digits}f}** ({statistics.stdev(found):.{digits}f})")
            cells.append(" to ".join(f"{some[0]['state_bytes'] / 1024:,.0f}" for some in (plain, its)))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def compared() -> list[str]:
    """Names of the methods that have a table."""
    return list(dict.fromkeys(side.method for side in SIDES if side.method is not None))


def write_pages(rows: Sequence[dict[str, Any]], folder: Path = PAGES) -> None:
    """Write every method's table into its page, between the two marks that it has for it."""
    for method in compared():
        path = folder / f"{method}.md"
        text = path.read_text() if path.exists() else ""
        if BEGIN not in text or END not in text:
            raise SystemExit(f"{path} has no place for the table of {method}: put the lines {BEGIN} and {END} into it.")
        table = f"{BEGIN}\n{render(rows, method)}\n{END}"
        path.write_text(text[: text.index(BEGIN)] + table + text[text.index(END) + len(END) :])


def find_bounds(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is promised: that there is a comparison with three seeds; what it shows is not."""
    seeds = [len({row["seed"] for row in rows if row["side"] == side.name}) for side in SIDES]
    return [results_file.bound_at_least("seeds of each comparison", min(seeds), len(SEEDS))]


def describe(row: dict[str, Any]) -> str:
    return (
        f"{row['row']:75} {100 * row['accuracy']:6.2f} %, loss {row['loss']:.4f}, {row['epochs']:g} epochs, {row['seconds']:5.1f} s, "
        f"state {row['state_bytes'] / 1024:,.0f} KiB"
    )


def main() -> None:
    options = results_file.read_options(str(__doc__).splitlines()[0], [side.name for side in SIDES])
    until = time.monotonic() + 60 * options.minutes
    names = {f"{side.name}, seed {seed}" for side in SIDES for seed in SEEDS}
    rows = {row["row"]: row for row in results_file.kept_rows(NAME) if row["row"] in names}
    for seed in SEEDS:
        for side in SIDES if seed % 2 == 0 else SIDES[::-1]:
            name = f"{side.name}, seed {seed}"
            if side.name in options.only and name not in rows and time.monotonic() < until:
                rows[name] = measure(side, seed)
                print(describe(rows[name]), flush=True)
                results_file.write_results(NAME, list(rows.values()), [])
    done = list(rows.values())
    whole = len(rows) == len(names)
    path = results_file.write_results(NAME, done, find_bounds(done) if whole else [])
    if whole:
        for method in compared():
            print(f"\n{method}\n\n{render(done, method)}")
        write_pages(done)
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
