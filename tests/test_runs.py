from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from delest import errors, job as jobs, runs, storage
from delest.job import Job, Recipe
from delest.records.plan import Plan
from delest.records.run import Run

PLAN = Plan(batch_size=8, micro_batch=4, code="x = 1")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(f"from delest import Job\njob = Job(data='{name}.npz', batch_size=8)")
    return tmp_path


def begin(out: str, job: Job, status: Any = None, started: float | None = None) -> Path:
    """A claimed run; with `status` it has a record, `started` sets the time of its claim."""
    folder = Path(out)
    runs.claim(folder, job, PLAN)
    if status is not None:
        storage.write_json(folder / "run.json", Run(path=folder, name=folder.name, status=status))
    if started is not None:
        os.utime(folder / "job.json", (started, started))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Places


def test_a_new_run_has_the_next_number(here):
    assert runs.place(None, "digits") == Path("runs/digits-001")
    assert not Path("runs").exists()
    begin("runs/digits-001", Job())
    assert runs.place(None, "digits") == Path("runs/digits-002")
    Path("runs/digits-041").mkdir()
    Path("runs/digits-007").touch()
    assert runs.place(None, "digits") == Path("runs/digits-042")
    Path("runs/digits-1000").mkdir()
    assert runs.place(None, "digits") == Path("runs/digits-1001")


def test_runs_of_other_names_do_not_count(here):
    for name in ("digits-large-007", "digits-x", "digits-²", "small-digits-005", "digits-", "digits"):
        Path("runs", name).mkdir(parents=True)
    assert runs.place(None, "digits") == Path("runs/digits-001")
    assert runs.place(None, "digits-large") == Path("runs/digits-large-008")


@pytest.mark.parametrize(
    ("title", "folder"),
    [
        ("my photos (new)", "my-photos-new-001"),
        ("../../etc/passwd", "etc-passwd-001"),
        ("..", "job-001"),
        ("", "job-001"),
        ("Größe", "Gr-e-001"),
        ("猫", "job-001"),
        ("v1.2_b", "v1.2_b-001"),
        ("a[0-9]*", "a-0-9-001"),
        ("--out", "out-001"),
    ],
)
def test_names_are_cleaned(here, title, folder):
    assert runs.place(None, title) == Path("runs") / folder


def test_a_folder_that_is_new_or_empty_is_taken_as_it_is(here):
    assert runs.place("a/b", "digits") == Path("a/b")
    Path("a/b").mkdir(parents=True)
    assert runs.place(Path("a/b"), "digits") == Path("a/b")
    assert runs.place(str(here / "c"), "digits") == here / "c"


def test_a_folder_with_something_else_in_it_is_refused(here):
    with pytest.raises(errors.BadInput, match=r"\. is not empty: choose another --out, so that nothing in it is overwritten"):
        runs.place(".", "digits")


def test_a_folder_that_holds_another_run_is_refused(here):
    begin("a", Job())
    with pytest.raises(errors.BadInput, match="a holds another run: choose another --out, or go on with that run by --resume"):
        runs.place("a", "digits")


@pytest.mark.parametrize("out", ["one.py", "one.py/a/b"])
def test_a_file_is_no_place(here, out):
    with pytest.raises(errors.BadInput, match=r"one\.py is a file: --out must name a folder"):
        runs.place(out, "digits")


@pytest.mark.parametrize("out", ["locked/a", None])
def test_a_place_that_may_not_be_written_is_refused(here, monkeypatch, out):
    Path("locked").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write everywhere
    with pytest.raises(errors.BadInput, match="may not be written by this user: choose another place with --out"):
        runs.place(out, "digits")


# Claims


def test_a_claim_writes_what_the_run_is(here):
    job = jobs.override(jobs.load("one.py"), {"recipe.lr": 0.5})
    folder = begin("a/b", job)
    assert sorted(contents(folder)) == ["job.json", "plan.json"]
    described = json.loads((folder / "job.json").read_text())
    assert described == {"format": 1, **job.describe(), "settings": {}}
    assert described["set_by"] == {"recipe.lr": "command line"}
    assert runs.read_json(Plan, folder / "plan.json") == PLAN
    assert runs.job_of(folder) == job


def test_a_second_claim_is_refused_and_changes_nothing(here):
    folder = begin("a", jobs.load("one.py"))
    before = contents(folder)
    with pytest.raises(errors.BadInput, match="a was taken by another run just now: start again"):
        runs.claim(folder, jobs.load("two.py"), replace(PLAN, code="x = 2"))
    assert contents(folder) == before


def test_a_claim_that_was_cut_short_is_no_run_and_not_taken_over(here, monkeypatch):
    def cut(path: Path, record: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "write_json", cut)
    with pytest.raises(KeyboardInterrupt):
        begin("runs/one-001", jobs.load("one.py"))
    with pytest.raises(errors.BadInput, match="no unfinished run"):
        runs.unfinished(None, jobs.load("one.py"))
    with pytest.raises(errors.BadInput, match="is not empty"):
        runs.place("runs/one-001", "one")
    assert runs.place(None, "one") == Path("runs/one-002")


@pytest.mark.parametrize("failing", ["plan.json", "job.json"])
def test_a_claim_without_room_can_be_made_again(here, monkeypatch, failing):
    real = storage.write_atomic

    def write(path: Path, data: Any) -> None:
        with storage.room_reported(path):
            if path.name == failing:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(path, data)

    monkeypatch.setattr(storage, "write_atomic", write)
    with pytest.raises(errors.DiskFull, match=f"a/{failing}"):
        begin("a", jobs.load("one.py"))
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert contents(Path("a")) == {}
    begin(str(runs.place("a", "one")), jobs.load("one.py"))


# Going on


def test_the_newest_unfinished_run_of_the_job_is_picked(here):
    one, two = jobs.load("one.py"), jobs.load("two.py")
    begin("runs/one-001", one, "interrupted", started=1000)
    begin("runs/one-002", one, "failed", started=3000)
    begin("runs/one-003", one, started=2000)  # killed before its first record
    begin("runs/one-004", one, "done", started=4000)
    begin("runs/two-001", two, "diverged", started=5000)
    assert runs.unfinished(None, one) == Path("runs/one-002")
    assert runs.unfinished(None, two) == Path("runs/two-001")
    assert runs.unfinished(None, None) == Path("runs/two-001")
    storage.write_json(Path("runs/one-002/run.json"), Run(path=Path("x"), name="x", status="done"))
    assert runs.unfinished(None, one) == Path("runs/one-003")


@pytest.mark.parametrize("given", [True, False])
def test_where_nothing_is_unfinished_the_folder_is_to_be_named(here, given):
    one = jobs.load("one.py")
    begin("runs/one-001", one, "done")
    with pytest.raises(errors.BadInput) as raised:
        runs.unfinished(None, one if given else None)
    assert f"under {here / 'runs'}: name its folder with --out" in str(raised.value)
    assert ("of this job" in str(raised.value)) is given


@pytest.mark.parametrize("name", ["job.json", "run.json"])
def test_a_damaged_run_does_not_stand_in_the_way(here, name):
    one = jobs.load("one.py")
    begin("runs/one-001", one, "interrupted", started=1000)
    damaged = begin("runs/one-002", one, "interrupted", started=2000)
    (damaged / name).write_text('{"st')
    os.utime(damaged / "job.json", (2000, 2000))
    assert runs.unfinished(None, one) == Path("runs/one-001")


def test_the_named_folder_is_the_one_to_go_on_with(here):
    begin("a", jobs.load("one.py"), "done")
    assert runs.unfinished("a", jobs.load("one.py")) == Path("a")
    with pytest.raises(errors.BadInput, match=r"b holds no run to resume \(it has no job\.json\)"):
        runs.unfinished("b", None)


def test_the_job_of_a_run_is_the_one_it_began_with(here):
    job = jobs.override(jobs.load("one.py"), {"recipe.epochs": 4, "seed": 5, "recipe.augment": ("noise",)})
    folder = begin("a", job)
    (here / "one.py").write_text("from delest import Job\njob = Job(data='later.npz', batch_size=99)")
    assert runs.job_of(folder) == job
    assert runs.job_of(folder, jobs.load("one.py")) == job


def test_options_that_would_change_a_run_are_refused_all_at_once(here):
    job = jobs.override(jobs.load("one.py"), {"recipe.epochs": 4, "seed": 5})
    folder = begin("a", job)
    same = jobs.override(jobs.load("one.py"), {"recipe.epochs": 4, "batch_size": 8, "recipe.augment": ()})
    assert runs.job_of(folder, same) == job
    changes = {"recipe.epochs": 6, "batch_size": 16, "split.train": 0.7, "recipe.augment": ("flip",)}
    with pytest.raises(errors.BadInput) as raised:
        runs.job_of(folder, jobs.override(jobs.load("one.py"), changes))
    assert raised.value.faults == (
        "epochs is 4 in this run, not 6: leave the option out, or start a new run.",
        "batch_size is 8 in this run, not 16: leave the option out, or start a new run.",
        "augment is [] in this run, not ['flip']: leave the option out, or start a new run.",
    )


def test_a_run_of_another_job_is_refused(here):
    folder = begin("a", jobs.load("one.py"))
    with pytest.raises(errors.BadInput) as raised:
        runs.job_of(folder, jobs.load("two.py"))
    assert f"a is a run of {here / 'one.py'}, not of {here / 'two.py'}: name that job, or none" in str(raised.value)


def test_a_job_of_python_objects_must_be_given_again(here):
    job = Job(data=([1], [2]), recipe=Recipe(epochs=2))
    folder = begin("a", job)
    assert runs.job_of(folder, job) is job
    with pytest.raises(errors.BadInput, match="the job of a was given as Python objects: pass it again"):
        runs.job_of(folder)


def test_a_job_whose_file_has_gone_is_named(here):
    folder = begin("a", jobs.load("one.py"))
    (here / "one.py").unlink()
    with pytest.raises(errors.BadInput, match=r"one\.py does not exist"):
        runs.job_of(folder)


# Reading


def test_a_run_without_a_record_is_running(here):
    folder = begin("runs/one-001", jobs.load("one.py"))
    run = runs.read(folder)
    assert (run.path, run.name, run.status) == (folder, "one-001", "running")
    assert run.job == {**jobs.load("one.py").describe(), "settings": {}}


def test_a_run_that_was_moved_knows_where_it_is(here):
    begin("runs/one-001", jobs.load("one.py"), "done").rename("kept")
    assert runs.read(Path("kept")).path == Path("kept")


def test_a_damaged_record_is_named(here):
    folder = begin("a", jobs.load("one.py"))
    (folder / "run.json").write_text('{"status": "done"}')
    with pytest.raises(errors.BadInput, match=r"a/run\.json: path: Field required"):
        runs.read(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [("kept", "is not valid JSON"), ("[]", "not an object"), ('{"format": 2}', "upgrade delest to read it")],
)
def test_a_job_file_that_cannot_be_read_is_named(here, content, words):
    folder = begin("a", jobs.load("one.py"))
    (folder / "job.json").write_text(content)
    with pytest.raises(errors.BadInput) as raised:
        runs.job_of(folder)
    assert "a/job.json" in str(raised.value)
    assert words in str(raised.value)


def test_a_run_is_found_by_its_folder_its_file_or_its_record(here):
    folder = begin("runs/one-001", jobs.load("one.py"), "done")
    for given in (folder, str(folder), folder / "run.json", runs.read(folder)):
        assert runs.find(given) == folder


@pytest.mark.parametrize(("given", "hint"), [("none", "it does not exist"), (".", r"it has no job\.json")])
def test_what_holds_no_run_is_refused(here, given, hint):
    with pytest.raises(errors.BadInput, match=f"holds no run: {hint}"):
        runs.find(given)
