"""From whatever the user calls data to a `Source`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from delest import errors
from delest.data.splitting import sample_rows
from delest.data.stored import Subset
from delest.data.targets import Wishes
from delest.job import Job, nearby
from delest.records.source import Source

_ACCEPTED = ".npz, .npy, .csv, .parquet or .txt files, or a folder of them or of images (a folder a class)"
_LABEL_STEMS = ("y", "labels", "label", "targets", "target", "Y")


def open_source(
    data: Any,
    *,
    target: str | None = None,
    rows: int | None = None,
    image_size: int | None = None,
    skip_bad: bool = False,
    split_by: str | None = None,
    context: int | None = None,
    tokenizer: str | None = None,
    seed: int = 0,
) -> Source:
    """Open data as a source: a path, `(inputs, targets)`, a mapping of arrays with `target` naming one, or a `Source`.

    `rows` takes a stratified sample; images are resized to `image_size` where they differ in size or it is given;
    `skip_bad` leaves out images that cannot be read; `split_by` names a column that is no input but divides the rows. A text
    becomes windows of `context` tokens, each a character or what the file `tokenizer` makes of it.
    Raises `BadInput` with all faults that were found.
    """
    wishes = Wishes(
        target=target,
        rows=rows,
        image_size=image_size,
        skip_bad=skip_bad,
        split_by=split_by,
        context=context,
        tokenizer=tokenizer,
        seed=seed,
    )
    source = _open(data, wishes)
    if rows is not None and len(source) > rows:
        return Subset(source, sample_rows(source, rows, seed))
    return source


def open_job(job: Job) -> Source:
    """Open the data of a job as its fields say. Raises `BadInput` with all faults that were found."""
    return open_source(
        job.data,
        target=job.target,
        rows=job.rows,
        image_size=job.image_size,
        skip_bad=job.skip_bad,
        split_by=job.split.by,
        context=job.context,
        tokenizer=job.tokenizer,
        seed=job.seed,
    )


def _open(data: Any, wishes: Wishes) -> Source:
    if all(hasattr(data, name) for name in ("schema", "read", "fingerprint", "values", "roles")):
        return data
    if isinstance(data, (str, Path)):
        return _open_path(Path(data).expanduser(), wishes)
    if hasattr(data, "columns") and hasattr(data, "__getitem__"):
        from delest.data.tables import open_frame

        return open_frame(data, wishes, "memory")
    if isinstance(data, Mapping) or hasattr(data, "__array__") or (isinstance(data, (tuple, list)) and len(data) == 2):
        from delest.data.arrays import open_arrays

        return open_arrays(data, wishes)
    raise errors.BadInput(
        f"data is a {type(data).__name__}: give a path ({_ACCEPTED}), (inputs, targets), a mapping of arrays with a target, or a Source."
    )


def _open_path(path: Path, wishes: Wishes) -> Source:
    if not path.exists():
        raise errors.BadInput(f"{path} does not exist (looked in {Path.cwd()}).{nearby(path)}")
    if path.is_dir():
        return _open_folder(path, wishes)
    name = path.name.lower()
    if name.endswith(".npz"):
        from delest.data.arrays import open_npz

        return open_npz(path, wishes)
    if name.endswith(".npy"):
        from delest.data.arrays import open_npy

        stems = _LABEL_STEMS if wishes.target is None else (wishes.target,)
        beside = next((path.with_name(f"{stem}.npy") for stem in stems if path.with_name(f"{stem}.npy").exists()), None)
        return open_npy([path] if beside is None else [path, beside], wishes, path.name, path.stem)
    if name.endswith(".parquet"):
        return _open_parquet([path], wishes, path.name)
    if name.endswith((".csv", ".tsv", ".csv.gz")):
        from delest.data.tables import open_table

        return open_table([path], wishes, path.name)
    if name.endswith(".txt"):
        from delest.data.text import open_text

        return open_text(path, wishes)
    raise errors.BadInput(f"{path} is of no kind that can be opened. Data are {_ACCEPTED}.")


def _open_folder(path: Path, wishes: Wishes) -> Source:
    for suffix in (".npy", ".parquet", ".csv"):
        files = sorted(
            file for pattern in (f"*{suffix}", f"*/*{suffix}") for file in path.glob(pattern) if not file.name.startswith(".")
        )
        if files and suffix == ".npy":
            from delest.data.arrays import open_npy

            return open_npy(files, wishes, path.name)
        if files and suffix == ".parquet":
            return _open_parquet(files, wishes, path.name)
        if files:
            from delest.data.tables import open_table

            return open_table(files, wishes, path.name)
    if not any(path.iterdir()):
        raise errors.BadInput(f"{path} is an empty folder. Data are {_ACCEPTED}.")
    from delest.data.encoded import find_class_folders
    from delest.data.images import open_images

    files_of, codes, target, roles, left_out = find_class_folders(path)
    return open_images(files_of, codes, target, roles, wishes, left_out)


def _open_parquet(paths: Sequence[Path], wishes: Wishes, where: str) -> Source:
    import pyarrow as pa

    from delest.data.encoded import image_column, read_parquet_labels

    try:
        column = image_column(paths[0])
    except (pa.ArrowException, OSError) as error:
        raise errors.BadInput(f"{paths[0]} is no readable Parquet file ({str(error).splitlines()[0]}).") from None
    if column is None:
        from delest.data.tables import open_table

        return open_table(paths, wishes, where)
    from delest.data.images import open_images

    pictures, codes, target, roles, left_out = read_parquet_labels(paths, column, wishes, where)
    return open_images(pictures, codes, target, roles, wishes, left_out)
