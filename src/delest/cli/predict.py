"""`delest predict`."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Annotated, Any

import typer

from delest import errors, storage
from delest.cli import Answer, options

EXAMPLE = "delest predict runs/digits-001 digit.png --out answers.csv"


@options.with_options()
def predict(
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="bundle folder, or the folder of its run", show_default=False)
    ],
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT", help="images, folders, texts, or files of rows", show_default=False)
    ],
    *,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="write a .csv or .json file instead of printing", show_default=False)
    ] = None,
) -> Answer:
    """Predict with a trained model; prints CSV."""
    if out is not None and out.suffix not in (".csv", ".json"):
        raise errors.BadInput(f"--out {out}: the name must end in .csv or .json, which says what is written.")
    if out is not None and not out.parent.is_dir():
        raise errors.BadInput(f"--out {out}: there is no folder {out.parent}; make it first.")
    from delest import verbs

    rows = verbs.predict(bundle, inputs)
    if out is None:
        return Answer({"rows": rows}, lambda: csv_text(rows))
    if out.suffix == ".json":
        storage.write_json(out, {"rows": rows})
    else:
        storage.write_atomic(out, csv_text(rows))
    return Answer({"rows": rows}, lambda: f"{len(rows):,} {'row' if len(rows) == 1 else 'rows'} written to {out}")


def csv_text(rows: list[dict[str, Any]]) -> str:
    """Rows as CSV under a header of every name that occurs."""
    written = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(written, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return written.getvalue()
