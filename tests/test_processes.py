from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import children
from delest import errors, job as jobs, processes

TESTS = str(Path(__file__).parent)
ENVIRONMENT = {"PYTHONPATH": TESTS, "TOLD": "yes"}


@pytest.fixture
def job(tmp_path) -> jobs.Job:
    (tmp_path / "job.py").write_text("from delest import Job\njob = Job(data='x.npz', seed=7, loss=lambda outputs, targets: 0)")
    return jobs.override(jobs.load(tmp_path / "job.py"), {"batch_size": 9})


def call(name: str, job: jobs.Job, **more: Any) -> Any:
    return processes.call(f"children:{name}", job, environment=ENVIRONMENT, **more)


def fails(name: str, job: jobs.Job, **more: Any) -> errors.ProbeFailed:
    with pytest.raises(errors.ProbeFailed) as raised:
        call(name, job, **more)
    return raised.value


def is_running(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def wait_until(condition: Any) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until, "it did not come to pass"
        time.sleep(0.01)


def read_pids(path: Path) -> list[int]:
    return [int(line) for line in path.read_text().split()]


def test_the_answer_comes_from_another_process_with_the_same_job(job):
    answer = call("describe", job, words=["a", "ü"], share=0.5)
    assert answer["pid"] != os.getpid()
    assert answer["job"] == job.describe()
    assert answer["job"]["batch_size"] == 9
    assert answer["arguments"] == {"words": ["a", "ü"], "share": 0.5}
    assert answer["told"] == "yes"
    assert math.isnan(answer["nan"])


def test_a_function_that_needs_no_job_gets_its_arguments_alone():
    answer = processes.call("children:add", None, environment=ENVIRONMENT, left=2, right=3)
    assert answer["sum"] == 5
    assert answer["pid"] != os.getpid()


def test_nothing_is_left_in_the_temporary_folder(job, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    call("describe", job)
    fails("end", job, status=3)
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_job_that_cannot_be_rebuilt_elsewhere_is_run_here(job, monkeypatch):
    answer = processes.call("children:describe", jobs.Job(data=[1]), words=("a",))
    assert answer["pid"] == os.getpid()
    assert answer["arguments"] == {"words": ("a",)}
    with pytest.raises(ZeroDivisionError):
        processes.call("children:raise_error", jobs.Job())


@pytest.mark.parametrize("kind", children.ERRORS)
def test_an_error_of_delest_is_raised_here_as_it_was_there(job, kind):
    expected = children.ERRORS[kind]
    with pytest.raises(type(expected)) as raised:
        call("fail", job, kind=kind)
    assert type(raised.value) is type(expected)
    assert str(raised.value) == str(expected)
    assert vars(raised.value) == vars(expected)


def test_a_job_that_cannot_be_loaded_there_is_bad_input(job, tmp_path):
    (tmp_path / "job.py").write_text("import no_such_module_9")
    with pytest.raises(errors.BadInput, match=r"job\.py, line 1: ModuleNotFoundError"):
        call("describe", job)


def test_what_the_child_prints_does_not_disturb_the_answer(job, capfd):
    assert call("chatter", job) == "right"
    assert capfd.readouterr() == ("", "")


def test_another_error_shows_the_last_lines_that_were_printed(job):
    error = fails("raise_error", job)
    assert error.exit_code == 1
    assert "children:raise_error ended with status 1 before it answered." in str(error)
    assert "ZeroDivisionError: a fault of the function" in str(error)
    assert "the last words on standard output" in str(error)
    assert len(str(error).splitlines()) <= 13


@pytest.mark.parametrize(
    ("name", "arguments", "code", "words"),
    [
        ("end", {"status": 3}, 3, "ended with status 3 before it answered.\nthe last words"),
        ("kill", {"number": int(signal.SIGKILL)}, -9, "was killed by signal 9 (Killed) (most often: memory ran out)"),
        ("segfault", {}, -11, "was killed by signal 11 (Segmentation fault) before it answered."),
        ("give_what_is_no_json", {}, 1, "not JSON serializable"),
        ("no_such_function", {}, 1, "has no attribute 'no_such_function'"),
    ],
)
def test_a_crash_is_told_with_its_reason(job, name, arguments, code, words):
    error = fails(name, job, **arguments)
    assert error.exit_code == code
    assert words in str(error)


def test_after_the_time_the_whole_tree_ends(job, tmp_path):
    pids = tmp_path / "pids"
    error = fails("sleep", job, timeout=2.0, pids=str(pids))
    assert "children:sleep did not answer within 2 s.\nwaiting" in str(error)
    assert error.exit_code is None
    child, grandchild = read_pids(pids)
    wait_until(lambda: not is_running(grandchild))
    assert not is_running(child)


@pytest.mark.parametrize("answer", [True, False])
def test_a_grandchild_that_goes_on_is_neither_waited_for_nor_left(job, tmp_path, answer):
    pids = tmp_path / "pids"
    if answer:
        assert call("leave_one_behind", job, pids=str(pids), answer=True) == "done"
    else:
        assert fails("leave_one_behind", job, pids=str(pids), answer=False).exit_code == -9
    (grandchild,) = read_pids(pids)
    wait_until(lambda: not is_running(grandchild))


def start_and_wait(job: jobs.Job, pids: Path) -> subprocess.Popen[str]:
    """A process that has called `sleep`, once that is under way."""
    code = f"from delest import job, processes; processes.call('children:sleep', job.load({job.origin!r}), pids={str(pids)!r})"
    caller = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **ENVIRONMENT},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a suite in the background ignores it, and so would this
    )
    wait_until(lambda: pids.exists() or caller.poll() is not None)
    return caller


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_when_the_caller_goes_the_whole_tree_goes_with_it(job, tmp_path, number):
    pids = tmp_path / "pids"
    caller = start_and_wait(job, pids)
    caller.send_signal(number)
    caller.communicate(timeout=30)
    child, grandchild = read_pids(pids)
    wait_until(lambda: not is_running(child) and not is_running(grandchild))


def test_end_tree_of_a_process_that_has_ended():
    process = subprocess.Popen([sys.executable, "-c", ""], start_new_session=True)
    process.wait()
    processes.end_tree(process)
    assert process.returncode == 0


def test_a_call_that_goes_on_ends_with_its_context(job, tmp_path):
    pids = tmp_path / "pids"

    def leave() -> None:
        with processes.begin("children:sleep", job, environment=ENVIRONMENT, pids=str(pids)):
            wait_until(pids.exists)
            raise KeyError

    with pytest.raises(KeyError):
        leave()
    wait_until(lambda: not any(is_running(pid) for pid in read_pids(pids)))


def test_a_call_goes_on_while_its_caller_does_something_else(job):
    with processes.begin("children:add", None, environment=ENVIRONMENT, left=1, right=2) as running:
        assert is_running(running.process.pid)
        assert running.answer(60)["sum"] == 3


def test_a_prepared_process_loads_and_waits_for_its_arguments(job):
    with processes.prepare("children:describe", job, imports=["fractions"], environment=ENVIRONMENT) as running:
        time.sleep(0.3)
        assert is_running(running.process.pid)
        running.give({"words": ["ü"]})
        answer = running.answer()
    assert answer["pid"] == running.process.pid
    assert answer["arguments"] == {"words": ["ü"]}


def test_a_prepared_process_that_is_not_asked_ends_with_its_caller(job):
    with processes.prepare("children:describe", job, environment=ENVIRONMENT) as running:
        pass
    assert not is_running(running.process.pid)


def test_a_prepared_process_that_is_gone_says_so_when_it_is_asked(job):
    with processes.prepare("children:describe", job, imports=["no_such_module"], environment=ENVIRONMENT) as running:
        running.process.wait(30)
        running.give({})
        with pytest.raises(errors.ProbeFailed, match="no_such_module"):
            running.answer()
