"""How a file, a module or a path becomes a job, and how a job gets to another process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from delest import errors, job as jobs
from delest.job import Job


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working folder; what jobs put on the module path is taken off again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def write(name: str, text: str) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("from delest import Job, Recipe, Split\n" + textwrap.dedent(text))
    return path


def refuse(what: str) -> str:
    with pytest.raises(errors.BadInput) as raised:
        jobs.load(what)
    return str(raised.value)


def test_a_job_is_itself():
    job = Job(data="x.npz")
    assert jobs.load(job) is job


@pytest.mark.parametrize("name", ["job", "mine"])
def test_the_only_job_of_a_file_needs_no_name(here, name):
    write("a.py", f"{name} = Job(data='x.npz', seed=7)")
    job = jobs.load("a.py")
    assert (job.data, job.seed) == ("x.npz", 7)
    assert job.origin == str(here / "a.py")


def test_of_several_jobs_the_one_called_job_is_meant(here):
    write("a.py", "small = Job(seed=1)\njob = Job(seed=2)")
    assert jobs.load("a.py").seed == 2


def test_of_several_jobs_one_must_be_named(here):
    write("a.py", "small = Job(seed=1)\nlarge = Job(seed=2)")
    said = refuse("a.py")
    assert "several jobs: name one, as in a.py:small (small, large)" in said
    job = jobs.load(Path("a.py:large"))
    assert job.seed == 2
    assert job.origin == f"{here / 'a.py'}:large"


def test_a_name_that_is_not_there_lists_those_that_are(here):
    write("a.py", "small = Job()\nlarge = Job()")
    assert "there is no 'medium' in that file. Jobs there: small, large." in refuse("a.py:medium")


def test_a_file_without_a_job_says_what_to_write(here):
    write("a.py", "")
    assert "write `job = delest.Job(model=..., data=...)` in it" in refuse("a.py")


@pytest.mark.parametrize(("text", "kind"), [("job = 5", "int"), ("def job(): return 'x'", "str")])
def test_what_is_called_job_and_is_none(here, text, kind):
    write("a.py", text)
    assert f"a.py: job is a {kind}, not a delest.Job" in refuse("a.py")


@pytest.mark.parametrize("what", ["a.py:make", "a.py"])
def test_a_function_that_makes_the_job(here, what):
    write("a.py", "def make(): return Job(seed=3)\njob = make")
    job = jobs.load(what)
    assert job.seed == 3
    assert jobs.rebuild(job.describe()) == job


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("1 / 0", "a.py:make, line 4: ZeroDivisionError: division by zero"),
        ("return int('x')", "a.py:make, line 4: ValueError: invalid literal"),
    ],
)
def test_a_function_that_raises_is_named_with_its_line(here, body, words):
    write("a.py", f"def make():\n    unused = 0\n    {body}\n")
    assert words in refuse("a.py:make")


def test_a_function_that_asks_for_something_is_refused(here):
    write("a.py", "def make(rows): return Job(rows=rows)")
    assert "a.py:make: TypeError: make() missing 1 required positional argument: 'rows'" in refuse("a.py:make")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\nraise ValueError('no such layer')", "a.py, line 3: ValueError: no such layer"),
        ("def f(): return {}['width']\n\nf()", "a.py, line 2: KeyError: 'width'"),
        ("import no_such_module_1", "a.py, line 2: ModuleNotFoundError: No module named 'no_such_module_1'"),
        ("import json\njson.loads('{')", "a.py, line 3: JSONDecodeError"),
        ("x = 1\njob = Job(data='x'", "a.py, line 3: SyntaxError: '(' was never closed"),
        ("Job(modle=1)", "a.py, line 2: TypeError: Job.__init__() got an unexpected keyword argument 'modle'"),
    ],
)
def test_a_file_that_raises_is_named_with_its_line(here, text, words):
    write("a.py", text)
    assert words in refuse("a.py")


@pytest.mark.parametrize("name", ["keras", "tensorflow", "jax"])
def test_a_framework_that_an_extra_brings_is_named_with_its_command(here, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    write("a.py", f"import {name}")
    with pytest.raises(errors.MissingExtra) as caught:
        jobs.load("a.py")
    assert str(caught.value) == f"a.py needs {name}, which is not installed: pip install 'delest[keras]'."


def test_the_line_is_found_through_a_link(here):
    write("real/a.py", "1 / 0")
    Path("link").symlink_to("real")
    assert "link/a.py, line 2: ZeroDivisionError" in refuse("link/a.py")


def test_an_error_of_delest_in_a_file_is_left_as_it_is(here):
    write("a.py", "from delest import errors\nraise errors.CheckFailed('no')")
    with pytest.raises(errors.CheckFailed, match="no"):
        jobs.load("a.py")


def test_a_file_imports_what_lies_beside_it_also_later(here):
    Path("elsewhere").mkdir()
    write("elsewhere/beside_one.py", "seed = 11")
    write("elsewhere/beside_two.py", "width = 5")
    write(
        "elsewhere/a.py",
        """
        import sys
        sys.path.insert(0, "another")
        import beside_one

        def model():
            import beside_two
            return beside_two.width

        job = Job(model=model, seed=beside_one.seed)
        """,
    )
    job = jobs.load("elsewhere/a.py")
    assert job.seed == 11
    assert job.model is not None
    assert job.model() == 5
    assert sys.path.count(str(here / "elsewhere")) == 1
    jobs.load("elsewhere/a.py")
    assert sys.path.count(str(here / "elsewhere")) == 1


def test_a_missing_file_names_the_nearest(here):
    write("digits.py", "")
    said = refuse("digts.py")
    assert f"digts.py does not exist (looked in {here}). Did you mean digits.py?" in said
    assert "Did you mean digits.py?" in refuse("digts.py:job")
    assert "Did you mean" not in refuse("nothing_like_it.csv")


def test_a_missing_path_to_data_names_the_nearest(here):
    Path("data/photos").mkdir(parents=True)
    assert "Did you mean data/photos?" in refuse("data/photo")
    assert "nowhere/photos does not exist" in refuse("nowhere/photos")


def test_a_job_of_a_module(here):
    write("shop/__init__.py", "")
    write("shop/taste.py", "large = Job(seed=4)\ndef make(): return Job(seed=5)\ndef fail(): return [][0]")
    job = jobs.load("shop.taste:large")
    assert (job.seed, job.origin) == (4, "shop.taste:large")
    assert jobs.rebuild(job.describe()) == job
    assert jobs.load("shop.taste:make").seed == 5
    assert "shop.taste:fail, line 4: IndexError" in refuse("shop.taste:fail")
    assert "there is no 'small' in that file. Jobs there: large." in refuse("shop.taste:small")


def test_a_module_in_the_working_folder_is_found_by_the_installed_command(here):
    write("brand_new.py", "job = Job(seed=6)")
    code = "import sys; sys.path = [p for p in sys.path if p]\nfrom delest.job import load; print(load('brand_new:job').seed)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "6\n", done.stderr


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("no_such_module_2:job", "ModuleNotFoundError: No module named 'no_such_module_2'"),
        ("shelf.none:job", "ModuleNotFoundError: No module named 'shelf.none'"),
        ("shelf.broken:job", ", line 3: NameError: name 'x' is not defined"),
        ("shelf.torn:job", ", line 2: SyntaxError"),
        ("shelf.lacking:job", ", line 2: ModuleNotFoundError: No module named 'no_such_module_3'"),
        ("time:time", "time:time: time is a float, not a delest.Job"),
        (".shelf:job", "TypeError"),
    ],
)
def test_modules_that_cannot_be_used(here, monkeypatch, what, words):
    write("shelf/__init__.py", "")
    write("shelf/broken.py", "\nx")
    write("shelf/torn.py", "x = = 1")
    write("shelf/lacking.py", "import no_such_module_3")
    said = refuse(what)
    assert words in said
    assert what.rpartition(":")[0] in said
    for name in [name for name in sys.modules if name.partition(".")[0] == "shelf"]:
        monkeypatch.delitem(sys.modules, name)


def test_a_path_to_data_is_a_job_without_a_model(here):
    Path("photos").mkdir()
    job = jobs.load("photos")
    assert job == Job(data=str(here / "photos"), origin=str(here / "photos"))
    assert jobs.rebuild(job.describe()) == job


def test_a_path_may_hold_a_colon(here):
    Path("3:4").mkdir()
    Path("3:4/x.npz").touch()
    job = jobs.load("3:4/x.npz")
    assert job.data == str(here / "3:4/x.npz")
    assert job.title == "x"
    assert jobs.rebuild(job.describe()) == job
    write("3:4/a.py", "job = Job(seed=8)")
    assert jobs.load("3:4/a.py").seed == jobs.load("3:4/a.py:job").seed == 8


def test_a_job_loads_without_numpy_or_a_framework(here):
    write("a.py", "job = Job(data='x', metric='auc')")
    code = "import sys; from delest.job import load; load('a.py').faults(); print({'numpy', 'torch', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ})
    assert done.stdout == "set()\n", done.stderr


# There and back


FULL = """
import numpy as np

class Accuracy:
    name, higher_is_better, rows = "top1", True, None
    def init(self): pass
    def update(self, state, outputs, targets): pass
    def compute(self, state): return 1.0

def model(): ...
def loss(outputs, targets): ...
def step(model, batch): ...
def predict(model, inputs): ...

full = Job(
    model=model, data=(np.ones((4, 2)), np.arange(4)), target="y", split=Split(train=0.5, validation=0.2, selection=0.2, by="day"),
    loss=loss, step=step, predict=predict, metric=Accuracy(), batch_size=16, seed=3, rows=9, image_size=64, skip_bad=True, name="own",
    recipe=Recipe(optimizer="sgd", lr=0.1, momentum=0.9, schedule="cosine", epochs=2, clip=1.0, augment=("flip", "crop")),
)
plain = Job(model=model, data="x.npz", loss="mse", metric="mae")
"""


def test_a_job_goes_to_another_process_and_back(here):
    write("a.py", FULL)
    job = jobs.load("a.py:full")
    description = json.loads(json.dumps(job.describe()))
    assert description["model"] == "model"
    assert (description["loss"], description["step"], description["predict"]) == ("loss", "step", "predict")
    assert (description["metric"], description["data"]) == ("top1", None)
    again = jobs.rebuild(description)
    for name in ("recipe", "split", "target", "batch_size", "seed", "rows", "image_size", "skip_bad", "name", "origin"):
        assert getattr(again, name) == getattr(job, name)
    assert getattr(again.loss, "__name__", None) == "loss"
    assert again.metric.name == "top1"
    assert isinstance(again.data, tuple)
    assert again.describe() == job.describe()


@pytest.mark.parametrize("name", ["plain", "full"])  # names and code of the user's own, both replaced by names
def test_what_was_changed_is_changed_there_too(here, name):
    write("a.py", FULL)
    changes = {"loss": "huber", "metric": "r2", "data": "y.npz", "recipe.lr": 0.25, "recipe.augment": ("noise",), "rows": 8}
    job = jobs.override(jobs.load(f"a.py:{name}"), changes)
    again = jobs.rebuild(json.loads(json.dumps(job.describe())))
    code = {field: getattr(again, field) for field in ("model", "step", "predict")}  # the file was run anew
    assert again == replace(job, **code)
