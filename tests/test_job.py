"""What is wrong with a job, and what follows from one."""

from __future__ import annotations

import functools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from delest import job as jobs, metrics
from delest.job import Job, Recipe, Split


class Accuracy:
    """A metric of the user's own, named otherwise than its class."""

    name = "top1"
    higher_is_better = True
    rows = None

    def init(self):
        return None

    def update(self, state, outputs, targets):
        return None

    def compute(self, state):
        return 1.0

    def __call__(self, outputs, targets):
        return 1.0


# Changing


def test_override_sets_fields_and_remembers_who_set_them():
    job = Job(data="x.npz", recipe=Recipe(lr=0.1, epochs=3), split=Split(by="day"))
    changes = {"batch_size": 32, "recipe.lr": 0.5, "split.kind": "time", "seed": None, "skip_bad": False}
    changed = jobs.override(job, changes)
    assert changed.batch_size == 32
    assert changed.recipe == Recipe(lr=0.5, epochs=3)
    assert changed.split == Split(by="day", kind="time")
    assert changed.seed == job.seed
    assert changed.set_by == dict.fromkeys(("batch_size", "recipe.lr", "split.kind", "skip_bad"), "command line")
    assert job.recipe.lr == 0.1
    again = jobs.override(changed, {"seed": 1}, who="search")
    assert again.set_by == {**changed.set_by, "seed": "search"}


# Description


def test_code_is_described_by_its_name():
    job = Job(
        model=functools.partial(Accuracy),
        loss=Accuracy,
        step=lambda model, batch: None,
        metric=Accuracy(),
        data=Path("a/x.npz"),
    )
    described = json.loads(json.dumps(job.describe()))
    assert (described["model"], described["loss"], described["metric"]) == ("partial", "Accuracy", "top1")
    assert "<lambda>" in described["step"]
    assert described["data"] == "a/x.npz"


def test_numpy_numbers_in_a_job_are_described():
    sizes: Any = np.int64(4), np.float32(0.5)
    job = Job(data="x", batch_size=sizes[0], recipe=Recipe(lr=sizes[1]))
    assert job.faults() == []
    assert json.loads(json.dumps(job.describe()))["recipe"]["lr"] == 0.5


# Faults


def test_a_plain_job_has_no_fault():
    assert Job(data="x.npz").faults() == []
    assert Job(data="x.npz", model=Accuracy, loss=Accuracy(), metric=Accuracy()).faults() == []
    named = [Job(data="x", metric=name) for name in ("auto", *metrics.NAMES)] + [
        Job(data="x", loss=name) for name in jobs.LOSSES
    ]
    assert [job.faults() for job in named] == [[]] * len(named)


def test_all_faults_come_at_once():
    job = Job(
        loss="mes",
        metric="acuracy",
        batch_size=0,
        split=Split(train=0.9, kind="tme"),
        recipe=Recipe(lr=-1, schedule="cosin", augment=("flp", "crop", "warp")),
        model=cast(Any, 5),
    )
    said = job.faults()
    expected = (
        "the shares add up to 1.2",
        "unknown split kind 'tme'. Did you mean 'time'?",
        "lr is -1; it must be a number of at least 0.",
        "unknown schedule 'cosin'. Did you mean 'cosine'?",
        "unknown augmentation 'flp'. Did you mean 'flip'?",
        "unknown augmentation 'warp'.",
        "data is missing",
        "unknown loss 'mes'. Did you mean 'mse'?",
        "unknown metric 'acuracy'. Did you mean 'accuracy'?",
        "batch size is 0",
        "model is a int, not a factory",
    )
    assert len(said) == len(expected)
    for fault, words in zip(said, expected, strict=True):
        assert words in fault


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"lr": math.nan}, "lr is nan; it must be a number of at least 0."),
        ({"lr": math.inf}, "lr is inf"),
        ({"lr": "0.1"}, "lr is '0.1'; it must be a number"),
        ({"lr": 0}, "lr is 0: nothing would be learnt"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"momentum": 1.5}, "momentum is 1.5; it must lie between 0 and 1."),
        ({"warmup": -0.1}, "warmup is -0.1"),
        ({"warmup": None}, "warmup is None"),
        ({"decay": 2}, "decay is 2"),
        ({"clip": -1}, "clip is -1"),
        ({"clip": math.inf}, "clip is inf"),
        ({"label_smoothing": 1.1}, "label_smoothing is 1.1"),
        ({"epochs": 0}, "epochs is 0; it must be a whole number of at least 1."),
        ({"epochs": 2.5}, "epochs is 2.5"),
        ({"patience": 0}, "patience is 0"),
        ({"patience": None}, "patience is None"),
        ({"precision": "fp16"}, "unknown precision 'fp16'."),
        ({"memory_format": "channel_last"}, "unknown memory format 'channel_last'. Did you mean 'channels_last'?"),
        ({"augment": "flip"}, "augment is 'flip': give a tuple of names"),
        ({"augment": None}, "augment is None: give a tuple of names"),
        ({"optimizer": dict}, "optimizer is a type: give its name"),
    ],
)
def test_faults_of_a_recipe(recipe, words):
    faults = Job(data="x", recipe=Recipe(**recipe)).faults()
    assert len(faults) == 1
    assert words in faults[0]


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ({"train": -0.1}, "split: train is -0.1; it must lie between 0 and 1."),
        ({"test": 1.5}, "split: test is 1.5"),
        ({"validation": math.nan}, "split: validation is nan"),
        ({"selection": "0.1"}, "split: selection is '0.1'"),
        ({"train": 0.5}, "the shares add up to 0.8; they must make 1"),
        ({"train": 0.0, "test": 0.8}, "there must be rows to train on"),
        ({"by": "day", "kind": "roles"}, "unknown split kind 'roles'. Did you mean 'role'? Known: role, group, time."),
    ],
)
def test_faults_of_a_split(split, words):
    faults = Job(data="x", split=Split(**split)).faults()
    assert len(faults) == 1
    assert words in faults[0]


def test_shares_that_make_one_but_for_rounding():
    assert Split(train=0.1, validation=0.2, selection=0.3, test=0.4).faults() == []
    assert Split(train=1 / 3, validation=1 / 3, selection=1 / 3, test=0.0).faults() == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 1.5}, "batch size is 1.5; it must be a whole number of at least 1."),
        ({"batch_size": None}, "batch size is None"),
        ({"rows": 0}, "rows is 0"),
        ({"image_size": -3}, "image size is -3"),
        ({"image_size": "64"}, "image size is '64'"),
        ({"seed": -1}, "seed is -1; it must be a whole number of at least 0."),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"loss": None}, "loss is a NoneType: give a function."),
        ({"step": "step"}, "step is a str: give a function."),
        ({"predict": 1}, "predict is a int: give a function."),
        ({"metric": max}, "metric is a builtin_function_or_method without name, higher_is_better, rows, init, update, compute"),
        ({"metric": None}, "metric is a NoneType without"),
        ({"split": (0.8, 0.2)}, "split is a tuple: give a delest.Split(...)."),
        ({"recipe": {"epochs": 2}}, "recipe is a dict: give a delest.Recipe(...)."),
        ({"model": [1]}, "model is a list, not a factory: give a function that builds it"),
        ({"model": "net.h5"}, "model is 'net.h5': a model can be a function that builds it, or a file that ends in .keras."),
        ({"model": Path("no-net.keras")}, "model is 'no-net.keras', which does not exist"),
    ],
)
def test_faults_of_a_job(changes, words):
    faults = replace(Job(data="x"), **changes).faults()
    assert len(faults) == 1
    assert words in faults[0]


@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_a_built_network_is_no_factory(monkeypatch, framework):
    class Module:
        def __call__(self): ...

    fake: Any = type(sys)(framework)
    fake.nn = type(sys)("torch.nn")
    fake.nn.Module = fake.Model = Module
    monkeypatch.setitem(sys.modules, framework, fake)
    (fault,) = Job(data="x", model=Module()).faults()
    assert "model is a built network: give the function or class that builds it" in fault
    assert Job(data="x", model=Module).faults() == []


def test_an_unknown_name_far_from_all_has_no_hint():
    assert jobs.unknown("loss", "zzzz", ("mse", "l1")) == "unknown loss 'zzzz'. Known: mse, l1."


# What follows from a job


@pytest.mark.parametrize(
    ("job", "title"),
    [
        (Job(name="mine", origin="/a/b.py"), "mine"),
        (Job(origin="/jobs/digits.py"), "digits"),
        (Job(origin="/jobs/digits.py:large"), "digits"),
        (Job(origin="/jobs/v1:2/digits.py:large"), "digits"),
        (Job(origin="shop.taste:large"), "taste"),
        (Job(origin="taste:large"), "taste"),
        (Job(origin="/data/photos", data="/data/photos"), "photos"),
        (Job(origin="/data/v1:2/loans.csv", data="/data/v1:2/loans.csv"), "loans"),
        (Job(origin="/"), "job"),
        (Job(data="data/x.npz"), "x"),
        (Job(data=Path("photos")), "photos"),
        (Job(data=([1], [2])), "job"),
    ],
)
def test_titles(job, title):
    assert job.title == title


@pytest.mark.parametrize(
    ("rows", "batch_size", "epochs"),
    [
        (7000, 128, 10),  # 55 steps: 500 need 9.1 epochs
        (1_000_000, 128, 5),  # never below 5
        (100, 128, 50),  # never above 50
        (1280, 128, 50),  # 10 steps: exactly 50
        (1281, 128, 46),  # 11 steps: 45.5
    ],
)
def test_the_default_number_of_epochs(rows, batch_size, epochs):
    assert Recipe().epochs_for(rows, batch_size) == epochs
    assert Recipe(epochs=3).epochs_for(rows, batch_size) == 3


class Takes:
    def __init__(self, schema): ...


class Bare:
    def __init__(self, width=3): ...


class WithMethod:
    def build(self, schema): ...


@pytest.mark.parametrize(
    ("factory", "takes"),
    [
        (lambda schema: None, True),
        (lambda schema, width=3: None, True),
        (Takes, True),
        (WithMethod().build, True),
        (lambda: None, False),
        (Bare, False),
        (lambda *sizes, **settings: None, False),
        (lambda *, width: None, False),
        (functools.partial(Takes, schema=None), False),
        (functools.partial(Takes, None), False),
        (dict, False),  # has no signature
    ],
)
def test_which_factories_are_given_the_schema(factory, takes):
    assert jobs.takes_schema(factory) is takes


def test_recipe_fields_are_those_of_the_recipe():
    assert jobs.RECIPE_FIELDS[:2] == ("optimizer", "lr")
    assert set(jobs.RECIPE_FIELDS) == set(vars(Recipe()))
