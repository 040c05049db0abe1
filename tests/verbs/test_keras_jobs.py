"""Which jobs are Keras's, told without Keras: it is not installed where the core tests run."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from delest import errors
from delest.backends.torch import TorchBackend, model as models
from delest.job import Job
from delest.records.source import Column, Schema, Target
from delest.verbs.keras_jobs import is_keras
from delest.verbs.workplace import backend

SCHEMA = Schema(inputs=(Column(name="x", kind="number"),), target=Target(name="y", kind="number"))


class Model:
    """Stands for keras.Model."""


Model.__module__ = "keras.src.models.model"


class Network(Model):
    pass


class OnTorch(nn.Module, Model):
    """What a keras.Model is on torch: a module as well."""


@pytest.fixture
def keras(monkeypatch: pytest.MonkeyPatch) -> None:
    fake: Any = type(sys)("keras")
    fake.Model = Model
    monkeypatch.setitem(sys.modules, "keras", fake)


def job(model: Any) -> Job:
    return Job(model=model, data="unused")


def test_where_keras_was_not_loaded_every_factory_is_torchs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "keras", raising=False)
    for model in (None, nn.Linear, lambda: nn.Linear(1, 1)):
        assert not is_keras(job(model), SCHEMA)
    assert isinstance(backend(job(nn.Linear), SCHEMA), TorchBackend)


def test_a_class_is_asked_for_its_bases(keras: None):
    assert is_keras(job(Network), SCHEMA)
    assert not is_keras(job(nn.Linear), SCHEMA)


def test_a_keras_file_without_keras_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        errors.MissingExtra, match=r"net.keras needs Keras, which is not installed: pip install 'delest\[keras\]'"
    ):
        is_keras(job(Path("net.keras")), SCHEMA)


def test_a_keras_model_that_was_taken_for_torchs_is_refused():
    with pytest.raises(errors.BadInput, match="imports keras at its top"):
        models.build(job(OnTorch), SCHEMA)
