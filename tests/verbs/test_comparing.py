"""Which framework is recommended, and which layer is named: without Keras. Trainings on all of them: `tests/frameworks_keras`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from delest import errors
from delest.records.form import from_json, to_json
from delest.records.frameworks import FrameworkComparison, FrameworkResult
from delest.reporting.frameworks import frameworks_text
from delest.verbs import comparing

MIB = 1 << 20
RESULTS = (
    FrameworkResult(
        name="tensorflow",
        versions={"keras": "3.15", "tensorflow": "2.21"},
        start_seconds=4.0,
        compile_seconds=1.0,
        step_seconds=0.02,
        evaluation_seconds=0.2,
        whole_seconds=20.0,
        peak_bytes=900 * MIB,
        runtime_bytes=500 * MIB,
        first_loss=1.1,
        validation={"accuracy": 0.91},
    ),
    FrameworkResult(
        name="jax",
        versions={"keras": "3.15", "jax": "0.10"},
        start_seconds=3.0,
        compile_seconds=2.0,
        step_seconds=0.04,
        evaluation_seconds=0.3,
        whole_seconds=30.0,
        peak_bytes=600 * MIB,
        runtime_bytes=300 * MIB,
        first_loss=1.4,
        loss_difference=0.27,
        differs_at="sequential/odd",
        validation={"accuracy": 0.9},
    ),
    FrameworkResult(name="torch", fault="building the model failed"),
)


@pytest.mark.parametrize(
    ("priority", "budget", "name", "words"),
    [
        ("time", None, "tensorflow", "1.5 times as fast as the next"),
        ("memory", None, "jax", "33% less memory than the next"),
        ("time", 700 * MIB, "jax", "the only one that fits"),
        ("time", 100 * MIB, None, "none stays within 100 MiB: the least that one took is 600 MiB"),
    ],
)
def test_the_soonest_or_the_smallest_within_the_budget_is_recommended(priority, budget, name, words):
    assert comparing.recommend(RESULTS, priority, budget) == (name, words)


def test_with_none_that_trained_there_is_none_to_take():
    assert comparing.recommend(RESULTS[2:], "time", None) == (None, "none trained the job")
    assert comparing.recommend(RESULTS[:1], "time", None) == ("tensorflow", "the only one that trained the job")


def result(name: str, *seconds: float) -> FrameworkResult:
    return FrameworkResult(
        name=name, whole_seconds=sorted(seconds)[len(seconds) // 2], whole_seconds_of=seconds, peak_bytes=MIB
    )


def test_frameworks_that_are_close_are_trained_again():
    close = [replace(RESULTS[0], name=name, whole_seconds=whole) for name, whole in (("a", 10.0), ("b", 10.9), ("c", 11.1))]
    assert comparing.close([*close, RESULTS[2]], None) == ["a", "b"]
    assert comparing.close(close[1:], None) == ["b", "c"]
    assert comparing.close(close[::2], None) == []
    assert comparing.close([], None) == []
    assert comparing.close([close[0], replace(close[1], peak_bytes=2000 * MIB)], 1000 * MIB) == []


def test_a_tie_of_several_trainings_is_said():
    name, why = comparing.recommend([result("jax", 10.0, 10.4, 10.2), result("torch", 10.3, 10.6, 10.5)], "time", None)
    assert name == "jax"
    assert why == "level with torch: 10 to 10.4 s and 10.3 to 10.6 s in 3 trainings each"
    name, why = comparing.recommend([result("jax", 10.0, 10.1, 10.2), result("torch", 10.3, 10.6, 10.5)], "time", None)
    assert (name, why) == ("jax", "1.04 times as fast as the next")
    middle = comparing._middle([replace(RESULTS[0], whole_seconds=one) for one in (12.0, 10.0, 11.0)])
    assert (middle.whole_seconds, middle.whole_seconds_of) == (11.0, (12.0, 10.0, 11.0))
    assert comparing._middle([RESULTS[0], RESULTS[2]]) is RESULTS[2]


def compared(**changes) -> FrameworkComparison:
    facts = {"results": RESULTS, "recommended": "tensorflow", "why": "1.5 times as fast as the next", "priority": "time"}
    more = {"metric": "accuracy", "higher_is_better": True, "epochs": 3, "whole_epochs": 10, "batch_size": 32, "steps": 40}
    return FrameworkComparison(**{**facts, **more, **changes})


def test_text_says_which_to_take_first_and_what_differs():
    shown = frameworks_text(compared())
    assert shown.splitlines()[0] == "take tensorflow: 20 s for 10 epochs, peak 900 MiB; 1.5 times as fast as the next"
    assert "sequential/odd" in shown
    assert "torch: building the model failed" in shown
    assert "accuracy 91.0" in shown
    assert max(map(len, shown.splitlines())) <= 130
    none = frameworks_text(compared(recommended=None, why="none trained the job", results=RESULTS[2:]))
    assert none.startswith("none to take: none trained the job")


def test_record_goes_through_json():
    found = compared()
    assert from_json(FrameworkComparison, to_json(found)) == found


def test_the_first_layer_that_differs_is_found(tmp_path: Path):
    layers = {"names": np.array(["a", "b", "c"]), "a0": np.ones(4), "a1": np.arange(4.0), "a2": np.ones(2)}
    np.savez(tmp_path / "one.npz", **layers)
    for number, (changed, words) in enumerate(
        [
            ({}, None),
            ({"a1": np.arange(4.0) + 1e-4}, None),
            ({"a1": np.arange(4.0) + 0.1, "a2": np.zeros(2)}, "b"),
            ({"a2": np.array([1.0, np.nan])}, "c"),
            ({"a0": np.ones(5)}, "a (shapes (4,) and (5,))"),
            ({"names": np.array(["a", "x", "c"])}, "b (where the other runs x)"),
        ]
    ):
        np.savez(tmp_path / f"{number}.npz", **{**layers, **changed})
        assert comparing.first_difference(tmp_path / "one.npz", tmp_path / f"{number}.npz") == words


def test_without_keras_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(comparing.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(errors.MissingExtra, match=r"pip install 'delest\[keras\]'"):
        comparing.compare("job.py")
