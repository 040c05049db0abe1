from __future__ import annotations

import inspect
import json

import pytest

from delest import errors

EXAMPLES: list[tuple[errors.DelestError, int]] = [  # with the exit status that docs and scripts rely on
    (errors.DelestError("a fault of ours"), 1),
    (errors.BadInput("photos does not exist."), 2),
    (errors.BadInput(["lr is -1.", "unknown metric 'acuracy'."]), 2),
    (errors.MissingExtra("schedulefree is not installed: pip install delest[schedulefree]."), 2),
    (errors.FolderTaken("runs/x-001 was taken by another run just now: start again."), 2),
    (errors.DiskFull("no room on disk to write runs."), 2),
    (errors.NothingFits("nothing fits 10 MiB.", 300 << 20), 3),
    (errors.NothingFits("nothing fits."), 3),
    (errors.OutOfMemory("backward"), 3),
    (errors.OutOfMemory("optimizer", "12 MiB were asked for"), 3),
    (errors.AccuracyNotMet("int8 loses 2 %."), 4),
    (errors.Diverged("the loss is nan at step 3."), 5),
    (errors.CheckFailed("model.onnx is not what was written."), 6),
    (errors.Interrupted(2, "delest train job.py --resume"), 130),
    (errors.Interrupted(15, "delest train job.py --resume"), 143),
    (errors.ProbeFailed("the child was killed.", -9), 1),
    (errors.ProbeFailed("the child did not answer."), 1),
]


def kinds() -> set[type]:
    return {
        kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, (errors.DelestError, UserWarning))
    }


def test_every_error_has_an_example_here():
    assert {type(error) for error, _ in EXAMPLES} == kinds() - {errors.DelestWarning}


@pytest.mark.parametrize(("error", "status"), EXAMPLES, ids=lambda value: type(value).__name__)
def test_exit_statuses(error, status):
    assert error.exit_status == status


@pytest.mark.parametrize("error", [error for error, _ in EXAMPLES], ids=lambda error: type(error).__name__)
def test_an_error_is_rebuilt_from_its_fields_as_json(error):
    again = type(error).rebuilt(json.loads(json.dumps(error.fields())))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)
    assert again.exit_status == error.exit_status


def test_one_fault_is_the_message():
    error = errors.BadInput("photos does not exist.")
    assert str(error) == "photos does not exist."
    assert error.faults == ("photos does not exist.",)
    assert str(errors.BadInput(["photos does not exist."])) == "photos does not exist."


def test_several_faults_are_counted_and_listed():
    error = errors.BadInput(["lr is -1.", "unknown metric 'acuracy'."])
    assert str(error) == "2 faults:\n  - lr is -1.\n  - unknown metric 'acuracy'."
    assert error.faults == ("lr is -1.", "unknown metric 'acuracy'.")


def test_out_of_memory_names_the_phase_and_what_to_do():
    error = errors.OutOfMemory("backward", "12 MiB were asked for")
    assert "in the backward phase: 12 MiB were asked for." in str(error)
    assert "--memory" in str(error)
    assert "phase. Give" in str(errors.OutOfMemory("forward"))


def test_an_interruption_says_how_to_go_on():
    assert str(errors.Interrupted(15, "delest train job.py --resume")).endswith("Go on with: delest train job.py --resume")


def test_what_is_bad_input_can_be_caught_as_such():
    assert issubclass(errors.MissingExtra, errors.BadInput)
    assert issubclass(errors.DiskFull, errors.BadInput)
    assert not issubclass(errors.DelestWarning, errors.DelestError)
