"""`delest exec`: a script started as a plan needs it, as a process of its own has it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from delest import malloc
from delest.records.plan import Choice, Plan
from delest.storage import write_json

SCRIPT = """
import json, os, sys
from delest import malloc
print(json.dumps({"arguments": sys.argv[1:], "malloc": malloc.current(), "omp": os.environ.get("OMP_NUM_THREADS"), "pid": os.getpid()}))
print("on standard error", file=sys.stderr)
sys.exit(7)
"""


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "LD_PRELOAD", "OMP_"))}
    command = [sys.executable, "-m", "delest", "exec", *words]
    return subprocess.Popen(
        command, cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def write_plan(path: Path, *choices: Choice, threads: int | None = None) -> Path:
    write_json(path, Plan(batch_size=8, micro_batch=8, choices=choices, threads=threads))
    return path


def allocator(name: str) -> Choice:
    return Choice(method="allocator", config={"name": name}, keeps="bitwise", why="by hand")


@pytest.mark.skipif(not malloc.is_glibc(), reason="this system's malloc is not glibc's")
def test_a_script_gets_the_plans_malloc_and_threads_and_keeps_its_output_and_status(tmp_path):
    write_plan(tmp_path / "plan.json", allocator("mmap"), threads=3)
    (tmp_path / "train.py").write_text(SCRIPT)
    process = start(tmp_path, "plan.json", "--", sys.executable, "train.py", "--epochs", "5", "--json")
    output, said = process.communicate(timeout=60)
    assert process.returncode == 7, said
    told = json.loads(output)
    assert (told["arguments"], told["malloc"], told["omp"]) == (["--epochs", "5", "--json"], "mmap", "3")
    assert told["pid"] == process.pid  # the command has become the script: signals and memory are its own
    assert said.startswith("exec: MALLOC_MMAP_THRESHOLD_=65536 OMP_NUM_THREADS=3")
    assert said.endswith("on standard error\n")


def test_a_plan_with_nothing_of_the_kind_runs_the_script_as_it_is(tmp_path):
    write_plan(tmp_path / "plan.json")
    (tmp_path / "train.py").write_text(SCRIPT)
    output, said = start(tmp_path, "plan.json", "--quiet", "--", sys.executable, "train.py").communicate(timeout=60)
    told = json.loads(output)
    assert (told["malloc"], told["omp"]) == ("glibc", None)
    assert said == "on standard error\n"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ((), "a plan and a command are needed"),
        (("plan.json",), "a plan and a command are needed"),
        (("none.json", "--", "true"), "none.json"),
        (("broken.json", "--", "true"), "broken.json"),
        (("strange.json", "--", "true"), "unknown method 'witchcraft'"),
        ((".", "--", "true"), "cannot be read"),
        (("library.json", "--", "true"), "the choice allocator has 'mimalloc' as config.name"),
        (("plan.json", "--", "no-such-command"), "'no-such-command' cannot be run"),
        (("plan.json", "--", "./train.py"), "'./train.py' cannot be run"),
    ],
)
def test_what_cannot_be_started_is_bad_input(tmp_path, words, why):
    write_plan(tmp_path / "plan.json")
    write_plan(tmp_path / "strange.json", Choice(method="witchcraft", config={}, keeps="changed", why=""))
    write_plan(tmp_path / "library.json", allocator("mimalloc"))
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "train.py").write_text(SCRIPT)  # without the right to be executed
    process = start(tmp_path, *words)
    output, said = process.communicate(timeout=60)
    assert (process.returncode, output) == (2, ""), said
    assert why in said
