"""Output, errors and exit statuses, with verbs that do nothing."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from delest import __version__, cli, errors, job as jobs
from delest.records.footprint import Footprint
from delest.records.frameworks import FrameworkComparison, FrameworkResult
from delest.records.hardware import Check, Diagnosis, Hardware
from delest.records.plan import Plan
from delest.records.run import Run, Summary
from delest.records.verification import ResumeCheck, Verification

HARDWARE = Hardware(
    processor="P", cores=2, instruction_sets=("avx2",), memory_bytes=1, memory_limit_bytes=None, available_bytes=1
)
FOOTPRINT = Footprint(
    peak_bytes=9, runtime_bytes=1, low_bytes=8, high_bytes=10, batch_size=4, micro_batch=4, basis="estimate", how="trace"
)
SUMMARY = Summary(
    source="s", fingerprint="f", rows=3, kind="table", columns=(), target="y", classes=None, splits={"train": 3}, row_bytes=4
)
VERIFICATION = Verification(
    ok=True, plan=Plan(batch_size=4, micro_batch=4), methods=(), resume=ResumeCheck(ok=True, why="the same"), rows=4
)


COMPARISON = FrameworkComparison(
    results=(FrameworkResult(name="torch", peak_bytes=1 << 30, whole_seconds=9.0),),
    recommended="torch",
    why="the only one that trained the job",
    priority="time",
    metric="accuracy",
    higher_is_better=True,
    epochs=3,
    whole_epochs=9,
    batch_size=32,
    steps=40,
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Each verb notes what it was called with and answers with a small record; a job is one of no data."""
    noted: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    answers: dict[str, Callable[..., Any]] = {
        "inspect": lambda job: SUMMARY,
        "plan": lambda *a, **k: Plan(batch_size=4, micro_batch=2),
        "verify": lambda *a, **k: VERIFICATION,
        "compare": lambda *a, **k: COMPARISON,
        "environment_for": lambda plan: {},
        "execute": lambda command, variables: None,
        "estimate": lambda *a, **k: FOOTPRINT,
        "sweep": lambda *a, **k: (FOOTPRINT,),
        "measure": lambda *a, **k: FOOTPRINT,
        "measure_script": lambda *a, **k: pytest.fail("give an answer"),
        "read_budget": lambda *a: None,
        "train": lambda *a, **k: Run(
            path=Path("runs/x-001"), name="x", status="done", metric="accuracy", test={"accuracy": 0.5}
        ),
        "run": lambda *a, **k: Run(path=Path("runs/x-001"), name="x", status="done", metric="accuracy"),
        "shrink": lambda *a, **k: pytest.fail("give an answer"),
        "report": lambda run: Path("runs/x-001/report.html"),
        "predict": lambda bundle, inputs: [
            {"input": "a.png", "label": "7", "probability": 0.9},
            {"input": "b, c", "value": 1.5},
        ],
        "doctor": lambda **wishes: Diagnosis(hardware=HARDWARE, versions={}, extras={}, checks=()),
        "progress": lambda *, quiet: "quiet" if quiet else "progress",
    }
    verbs = types.ModuleType("delest.verbs")
    for name, answer in answers.items():

        def verb(*args: Any, _name: str = name, _answer: Callable[..., Any] = answer, **kwargs: Any) -> Any:
            noted[_name] = (args, kwargs)
            return _answer(*args, **kwargs)

        setattr(verbs, name, verb)
    monkeypatch.setitem(sys.modules, "delest.verbs", verbs)
    monkeypatch.setattr("delest.verbs", verbs, raising=False)
    monkeypatch.setattr(jobs, "load", lambda what: jobs.Job(data="d", origin=str(what)))
    return noted


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException, verb: str = "inspect") -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(sys.modules["delest.verbs"], verb, fail)


@pytest.mark.usefixtures("calls")
class TestErrors:
    @pytest.mark.parametrize(
        ("error", "status"),
        [
            (errors.BadInput("no such column"), 2),
            (errors.NothingFits("needs 3 GiB"), 3),
            (errors.OutOfMemory("backward"), 3),
            (errors.AccuracyNotMet("too far"), 4),
            (errors.Diverged("not finite"), 5),
            (errors.CheckFailed("checksum"), 6),
            (errors.Interrupted(15, "delest train --resume"), 143),
            (KeyboardInterrupt(), 130),
        ],
    )
    def test_the_kind_of_error_is_the_exit_status(
        self, error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        raising(monkeypatch, error)
        assert cli.main(["inspect", "job.py"]) == status
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith(f"error: {error}" if str(error) else "error: interrupted")
        assert "Traceback" not in printed.err
        assert cli.main(["inspect", "job.py", "--json"]) == status
        told = json.loads(capsys.readouterr().out)["error"]
        assert told["exit_status"] == status
        assert told["kind"] == (type(error).__name__ if str(error) else "Interrupted")

    def test_all_faults_are_shown_a_line_each(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        raising(monkeypatch, errors.BadInput(["lr is -1", "epochs is 0"]))
        cli.main(["inspect", "job.py"])
        assert capsys.readouterr().err == "error: 2 faults:\n  - lr is -1\n  - epochs is 0\n"

    def test_a_fault_of_our_own_shows_its_traceback(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        raising(monkeypatch, ZeroDivisionError("division by zero"))
        assert cli.main(["inspect", "job.py", "--json"]) == 1
        printed = capsys.readouterr()
        assert "Traceback" in printed.err
        assert "This is a fault of delest" in printed.err
        assert json.loads(printed.out)["error"]["kind"] == "ZeroDivisionError"

    def test_a_job_file_that_ends_the_process_is_an_error(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        raising(monkeypatch, SystemExit(0))
        assert cli.main(["inspect", "job.py"]) == 2
        assert "called sys.exit(0)" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("line", "words"),
        [
            ("train job.py --batch-sise 3", "--batch-size"),
            ("trian job.py", "'train'"),
            ("train job.py --rows many", "--rows"),
            ("shrink", "RUN"),
            ("predict bundle", "INPUT"),
            ("train", "JOB is missing"),
            ("train --resume", "JOB is missing"),
            ("train --resume --out runs/x --epochs 3 --seed 0", "--seed, --epochs: a run goes on with the settings"),
            ("predict b i --out answers.txt", "must end in .csv or .json"),
            ("predict b i --out /no/such/folder/a.csv", "no folder"),
        ],
    )
    def test_a_wrong_command_line_is_bad_input_with_a_hint(
        self, line: str, words: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(line.split()) == 2
        printed = capsys.readouterr()
        assert words in printed.err
        assert printed.out == ""
        assert cli.main([*line.split(), "--json"]) == 2
        assert words in json.loads(capsys.readouterr().out)["error"]["message"]

    def test_all_wrong_budgets_are_told_together(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        (tmp_path / "plan.json").write_text('{"format": 1}')
        line = f"run job.py --memory lots --time soon --preview 7 --threads 0 --max-drop 500% --checkpoint-every 0s --plan {tmp_path}/plan.json"
        assert cli.main(line.split()) == 2
        told = capsys.readouterr().err
        assert all(
            f"- --{name}: " in told for name in ["memory", "time", "preview", "threads", "max-drop", "checkpoint-every", "plan"]
        )

    def test_own_warnings_are_one_line(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        def warn(job: object) -> Summary:
            warnings.warn("few rows", errors.DelestWarning, stacklevel=1)
            return SUMMARY

        monkeypatch.setattr(sys.modules["delest.verbs"], "inspect", warn)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            assert cli.main(["inspect", "job.py"]) == 0
        assert "warning: few rows\n" in capsys.readouterr().err


@pytest.mark.usefixtures("calls")
class TestOutput:
    def test_text_for_people_opens_with_the_verdict(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["inspect", "job.py"]) == 0
        assert capsys.readouterr().out.startswith("usable: 3 rows of a table")

    def test_json_is_one_object_whatever_is_printed_beside_it(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def chat(job: object) -> Summary:
            print("a user's own print")
            return SUMMARY

        monkeypatch.setattr(sys.modules["delest.verbs"], "inspect", chat)
        assert cli.main(["inspect", "job.py", "--json"]) == 0
        printed = capsys.readouterr()
        told = json.loads(printed.out)
        assert (told["format"], told["rows"], told["splits"]) == (1, 3, {"train": 3})
        assert "a user's own print" in printed.err

    def test_run_names_its_report(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["run", "job.py"]) == 0
        assert capsys.readouterr().out.endswith("report: runs/x-001/report.html\n")

    def test_report_prints_the_path(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["report", "runs/x-001", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"format": 1, "path": "runs/x-001/report.html"}

    def test_predictions_are_csv(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["predict", "b", "a.png", "b, c"]) == 0
        assert capsys.readouterr().out == 'input,label,probability,value\na.png,7,0.9,\n"b, c",,,1.5\n'

    def test_predictions_as_json_and_in_files(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["predict", "b", "a.png", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["format"] == 1
        assert [row["input"] for row in told["rows"]] == ["a.png", "b, c"]
        for name in ("a.csv", "a.json"):
            assert cli.main(["predict", "b", "a.png", "--out", str(tmp_path / name)]) == 0
            assert f"2 rows written to {tmp_path / name}" in capsys.readouterr().out
        assert json.loads((tmp_path / "a.json").read_text()) == told
        assert (tmp_path / "a.csv").read_text().startswith("input,label,probability,value\na.png,7,")

    @pytest.mark.parametrize(("essential", "status"), [(True, 6), (False, 0)])
    def test_doctor_fails_only_where_delest_cannot_work(
        self, essential: bool, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        check = Check(name="torch", ok=False, detail="not installed", remedy="pip install torch", essential=essential)
        diagnosis = Diagnosis(hardware=HARDWARE, versions={}, extras={"keras": False}, checks=(check,))
        monkeypatch.setattr(sys.modules["delest.verbs"], "doctor", lambda: diagnosis)
        assert cli.main(["doctor"]) == status
        assert "pip install torch" in capsys.readouterr().out
        assert cli.main(["doctor", "--json"]) == status
        assert json.loads(capsys.readouterr().out)["checks"][0]["name"] == "torch"

    @pytest.mark.parametrize(("ok", "status"), [(True, 0), (False, 6)])
    def test_verify_ends_with_its_verdict(
        self,
        ok: bool,
        status: int,
        calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert cli.main(["verify", "job.py", "--memory", "1GiB", "--threads", "2", "--quiet"]) == 0
        assert calls["verify"][1] == {"memory": "1GiB", "threads": 2, "say": "quiet"}
        found = replace(VERIFICATION, ok=ok, resume=replace(VERIFICATION.resume, ok=ok))
        monkeypatch.setattr(sys.modules["delest.verbs"], "verify", lambda *a, **k: found)
        capsys.readouterr()
        assert cli.main(["verify", "job.py"]) == status
        assert capsys.readouterr().out.startswith("verified: " if ok else "1 of 1 check failed: ")
        assert cli.main(["verify", "job.py", "--json"]) == status
        told = json.loads(capsys.readouterr().out)
        assert (told["format"], told["ok"], told["methods"], told["resume"]["ok"]) == (1, ok, [], ok)

    def test_compare_ends_with_what_can_be_taken(
        self,
        calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert cli.main(["compare", "job.py", "--backends", "torch,jax", "--epochs", "2", "--quiet"]) == 0
        assert calls["compare"][1] == {"backends": "torch,jax", "epochs": 2, "say": "quiet"}
        assert capsys.readouterr().out.startswith("take torch: 9 s for 9 epochs, peak 1 GiB; the only one")
        failed = replace(COMPARISON.results[0], fault="it broke")
        for found, status in ((replace(COMPARISON, recommended=None), 3), (replace(COMPARISON, results=(failed,)), 6)):
            monkeypatch.setattr(sys.modules["delest.verbs"], "compare", lambda *a, found=found, **k: found)
            assert cli.main(["compare", "job.py"]) == status

    def test_doctor_measures_and_clears_where_it_is_told_to(
        self, calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]]
    ) -> None:
        for wishes, given in (
            ([], {}),
            (["--clear-cache"], {"clear_cache": True}),
            (["--deep"], {"deep": True}),
            (["--measure", "--clear-cache"], {"measure": True, "clear_cache": True}),
        ):
            assert cli.main(["doctor", *wishes]) == 0
            assert calls["doctor"] == ((), given)

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["--version"]) == 0
        assert capsys.readouterr().out == f"delest {__version__}\n"

    def test_nothing_at_all_shows_the_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([]) == 0
        shown = capsys.readouterr().out
        assert all(f"\n  {name} " in shown for name in cli.COMMANDS)

    @pytest.mark.parametrize("command", ["", *cli.COMMANDS])
    def test_each_help_ends_with_an_example_that_works(
        self,
        command: str,
        calls: dict[str, Any],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        tmp_path: Path,
    ) -> None:
        from delest.records.shrunk import Shrunk

        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("DELEST_SUPERVISED", "by this test")  # a run with a budget would be a child that knows no fakes
        shrunk = Shrunk(path=Path("shrunk"), shipped="int8", metric="accuracy", max_drop=0.005, candidates=())
        monkeypatch.setattr(sys.modules["delest.verbs"], "shrink", lambda *a, **k: shrunk)
        monkeypatch.setattr("delest.reporting.text.shrunk_text", lambda record: "int8 ships")
        assert cli.main([*command.split(), "--help"]) == 0
        *_, title, example = capsys.readouterr().out.rstrip().splitlines()
        program, *words = shlex.split(example)
        assert (title.strip(), program) == ("Example:", "delest")
        assert cli.main(words) == 0
        assert command in ("", words[0])


class TestProcess:
    """What only a process of its own shows."""

    def run(self, line: str) -> subprocess.CompletedProcess[str]:
        delest = Path(sys.executable).with_name("delest")
        return subprocess.run(
            ["bash", "-c", line.replace("delest", str(delest), 1)], capture_output=True, text=True, timeout=60
        )

    def test_the_installed_command_ends_with_the_status(self) -> None:
        ended = self.run("delest inspect no-such-file.py")
        assert ended.returncode == 2
        assert ended.stderr.startswith("error: no-such-file.py does not exist")

    @pytest.mark.parametrize("line", ["delest --help", "delest inspect nothing --json"])
    def test_a_full_disk_is_told_without_a_traceback(self, line: str) -> None:
        ended = self.run(f"{line} > /dev/full")
        assert ended.returncode == 2
        assert "no room on disk to write standard output" in ended.stderr
        assert "Traceback" not in ended.stderr

    def test_a_reader_that_goes_away_is_no_fault(self) -> None:
        ended = self.run("delest --help | true")
        assert (ended.returncode, ended.stderr) == (0, "")


def test_a_termination_that_a_library_turned_into_an_error_is_still_one(calls, monkeypatch, capsys) -> None:
    def inspect(job: Any) -> Summary:
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:
            raise errors.BadInput("half imported") from None
        return SUMMARY

    monkeypatch.setattr(sys.modules["delest.verbs"], "inspect", inspect)
    assert cli.main(["inspect", "job.py"]) == 143
    assert "terminated" in capsys.readouterr().err
    monkeypatch.setattr(sys.modules["delest.verbs"], "inspect", lambda job: SUMMARY)
    assert cli.main(["inspect", "job.py"]) == 0
