"""Scripts that know nothing of delest: what is seen of them, and that they do not notice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from delest.errors import BadInput
from delest.footprint.script import WATCH, measure_script
from delest.records.form import from_json, to_json
from delest.records.script import ScriptMeasurement

MIB = 1 << 20
WIDTH, ROWS, LAYERS = 256, 512, 6
WEIGHTS = LAYERS * (WIDTH * WIDTH + WIDTH)  # numbers
MLP = f"""
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
torch.manual_seed(0)
data = TensorDataset(torch.randn({ROWS} * 10, {WIDTH}), torch.randn({ROWS} * 10, {WIDTH}))
layers = [layer for _ in range({LAYERS}) for layer in (nn.Linear({WIDTH}, {WIDTH}), nn.Tanh())]
model = nn.Sequential(*layers)
optimizer = torch.optim.AdamW(model.parameters())
for inputs, targets in DataLoader(data, batch_size={ROWS}, shuffle=True):
    loss = (model(inputs) - targets).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(repr(loss.item()))
"""
POOR = """
import time, torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
class Slow(Dataset):
    def __init__(self, rows): self.rows = rows
    def __len__(self): return self.rows
    def __getitem__(self, k):
        time.sleep(0.01)
        return torch.full((512,), float(k), dtype=torch.float64)
model = nn.Linear(512, 512)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
evaluation = DataLoader(Slow(4), batch_size=4)
for epoch in range(2):
    model.train()
    for inputs in DataLoader(Slow(32), batch_size=4, num_workers=WORKERS):
        optimizer.zero_grad(set_to_none=False)
        model(inputs.float()).square().mean().backward()
        optimizer.step()
    model.eval()
    for inputs in evaluation:
        model(inputs.float())
raise ValueError("the end of the script")
"""


def write(folder: Path, text: str) -> list[str]:
    path = folder / "train.py"
    path.write_text(textwrap.dedent(text))
    return [sys.executable, str(path)]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def test_bytes_of_a_known_network_and_the_same_losses(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = write(tmp_path, MLP)
    measured = measure_script(command, timeline=True)
    watched = capfd.readouterr()
    subprocess.run(command, check=True)
    assert capfd.readouterr() == watched
    assert len(watched.out.splitlines()) == 10

    assert (measured.status, measured.steps, measured.notes) == (0, 10, ())
    assert measured.parameters == WEIGHTS
    assert measured.breakdown["parameters"] == measured.breakdown["gradients"] == 4 * WEIGHTS
    moments = 2 * 4 * WEIGHTS
    assert 0 <= measured.breakdown["optimizer"] - moments <= 8 * 2 * LAYERS  # a counter beside each parameter's moments
    assert measured.breakdown["data"] == 2 * 4 * ROWS * WIDTH
    # A tanh keeps its output, which is the next layer's input; the square keeps the difference.
    outputs = (LAYERS + 1) * 4 * ROWS * WIDTH
    assert measured.breakdown["activations"] == pytest.approx(outputs, rel=0.1)
    assert all(size >= 0 for size in measured.breakdown.values())
    assert sum(measured.breakdown.values()) == measured.steady_peak_bytes
    assert measured.steady_peak_bytes is not None
    assert measured.peak_bytes >= measured.steady_peak_bytes > outputs
    assert (measured.batch_rows, measured.micro_batch) == (ROWS, ROWS)
    assert measured.step_seconds is not None
    assert measured.backward_seconds is not None
    assert measured.step_seconds > measured.backward_seconds > 0
    (use,) = measured.optimizers
    assert (use.name, use.steps, use.implementation, use.parameter_bytes) == ("AdamW", 10, "loop", 4 * WEIGHTS)

    timeline = measured.timeline
    assert timeline is not None
    assert max(timeline.categories["gradients"]) == 4 * WEIGHTS
    assert max(timeline.categories["activations"]) == pytest.approx(outputs, rel=0.05)
    assert set(timeline.phase) == {"forward", "backward", "update"}
    assert from_json(ScriptMeasurement, to_json(measured)) == measured


@pytest.mark.parametrize("workers", [0, 2])
def test_a_poor_script_that_fails_keeps_its_end_and_gets_remedies(
    workers: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    measured = measure_script(write(tmp_path, POOR.replace("WORKERS", str(workers))))
    assert measured.status == 1
    assert "ValueError: the end of the script" in capfd.readouterr().err
    assert (measured.steps, measured.batch_rows, measured.notes) == (16, 4, ())  # workers, forked, are not counted
    assert measured.waiting_seconds is not None
    assert measured.step_seconds is not None
    if workers == 0:
        assert 0.04 <= measured.waiting_seconds <= measured.step_seconds * 1.5
        # Four apply; which three would help most depends on how fast the machine computes just now (test_remedies.py holds each).
        known = ("waiting for data", "evaluation keeps activations")
        assert any(words in remedy.what for words in known for remedy in measured.remedies)
    assert 1 <= len(measured.remedies) <= 3  # what would save next to nothing on this machine is left out


@pytest.mark.parametrize(
    ("end", "status"), [("os._exit(7)", 7), ("os.kill(os.getpid(), signal.SIGKILL)", 128 + signal.SIGKILL)]
)
def test_a_script_that_ends_without_notice_has_left_a_report(end: str, status: int, tmp_path: Path) -> None:
    script = f"""
    import os, signal, torch
    weight = torch.nn.Parameter(torch.ones(2 << 20))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    for _ in range(5):
        weight.sin().cos().sum().backward()  # the cosine keeps the sine
        optimizer.step()
    {end}
    """
    measured = measure_script(write(tmp_path, script))
    assert measured.status == status
    assert 3 <= measured.steps <= 5
    assert measured.breakdown["optimizer"] == 8 * MIB
    assert measured.breakdown["activations"] == pytest.approx(8 * MIB, rel=0.05)
    assert any("gradients stay in memory" in remedy.what for remedy in measured.remedies)
    assert (measured.batch_rows, measured.waiting_seconds) == (None, None)  # it drew from no loader


def test_a_program_without_torch_runs_as_ever(capfd: pytest.CaptureFixture[str]) -> None:
    measured = measure_script([sys.executable, "-c", "import sys; print('hello'); sys.exit(3)"])
    assert capfd.readouterr() == ("hello\n", "")
    assert (measured.status, measured.steps, measured.breakdown, measured.remedies) == (3, 0, {}, ())
    assert measured.peak_bytes > MIB
    assert "no Python process imported torch" in measured.notes[0]


def test_any_executable_is_run_with_its_input(tmp_path: Path) -> None:
    script = "import sys; from delest.footprint.script import measure_script; sys.exit(measure_script(sys.argv[1:]).status)"
    ran = subprocess.run([sys.executable, "-c", script, "cat"], input="a line\n", capture_output=True, text=True)
    assert (ran.stdout, ran.stderr, ran.returncode) == ("a line\n", "", 0)


def test_a_fault_of_the_watching_is_a_note(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("nothing_that_can_be_watched = True")
    measured = measure_script(write(tmp_path, "import torch, sys; print(torch.nothing_that_can_be_watched, torch.__loader__)"))
    out = capfd.readouterr()
    assert out.out.startswith("True <_frozen_importlib_external.SourceFileLoader")
    assert (out.err, measured.status) == ("", 0)
    assert "could not be watched" in measured.notes[0]


def test_nothing_is_loaded_before_torch_and_the_path_is_as_it_was(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = write(tmp_path, "import sys; print(sys.path, sorted(sys.modules))")
    measure_script(command)
    watched = capfd.readouterr().out
    subprocess.run(command, check=True)
    alone = capfd.readouterr().out
    assert str(WATCH) not in watched
    assert watched.replace(", 'sitecustomize'", "") == alone.replace(", 'sitecustomize'", "")


def test_the_users_own_sitecustomize_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('mine')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    measure_script([sys.executable, "-c", "import sitecustomize; print(sitecustomize.__file__)"])
    assert capfd.readouterr().out == f"mine\n{tmp_path}/sitecustomize.py\n"


def test_processes_that_multiprocessing_starts_are_not_the_script(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = """
    import multiprocessing, sys
    def show(): print(type(sys.meta_path[0]).__name__, flush=True)
    if __name__ == "__main__":
        show()
        worker = multiprocessing.get_context("spawn").Process(target=show)
        worker.start()
        worker.join()
    """
    measure_script(write(tmp_path, script))
    first, second = capfd.readouterr().out.split()
    assert first == "_WhenTorchIsImported"
    assert second != first


PASSES_ON = """
import sys
from delest.footprint.script import measure_script
sys.exit(measure_script([sys.executable, "-u", "-c", sys.argv[1]]).status)
"""
WAITS = """
import signal, sys, time
def stop(number, frame):
    print("got", number)
    sys.exit(40 + number)
if {handles}:
    signal.signal({number}, stop)
print("ready")
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("handles", [True, False])
def test_signals_reach_the_script_and_its_status_comes_back(number: signal.Signals, handles: bool) -> None:
    script = WAITS.format(handles=handles, number=int(number))
    if signal.getsignal(number) == signal.SIG_IGN:  # as under nohup; children would inherit it
        signal.signal(number, signal.SIG_DFL)
    process = subprocess.Popen(
        [sys.executable, "-c", PASSES_ON, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == (40 + number if handles else 128 + number)
    assert out == (f"got {int(number)}\n" if handles else "")


def test_of_several_processes_the_first_rank_is_shown(tmp_path: Path) -> None:
    script = """
    import json, os
    nothing = dict.fromkeys(("training", "evaluation", "samples", "roots", "optimizers", "frameworks", "notes"), [])
    for rank in (1, 0):
        told = {**nothing, "rank": rank, "steps": 9, "warm_up": 2, "intervals": [[0.5, 0.0, 0.0, 0, 0, 0]], "timeline": None,
                "peak_bytes": 1000 + rank, "steady_peak_bytes": 900, "cuda_allocated_bytes": None,
                "cuda_reserved_bytes": None, "parameter_bytes": 0, "evaluates_with_gradients": False, "gradients_kept": False}
        with open(os.path.join(os.environ["DELEST_WATCH_REPORTS"], f"{rank}.json"), "w") as file:
            json.dump(told, file)
    """
    measured = measure_script(write(tmp_path, script))
    assert (measured.peak_bytes, measured.step_seconds) == (1000, 0.5)
    assert "2 processes took steps" in measured.notes[0]
    assert "1001" in measured.notes[0]


@pytest.mark.parametrize(
    ("command", "words"), [([], "no command"), (["no-such-program-here"], "no such command"), (["/etc"], "cannot be run")]
)
def test_a_command_that_cannot_be_run_is_bad_input(command: list[str], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        measure_script(command)


def test_a_hook_that_fails_is_noted_once_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(WATCH))
    import delest_watching

    watcher = delest_watching.Watcher(str(tmp_path), False)
    for _ in range(2):
        watcher.drew(object(), None, 0.0)  # not an iterator of torch's
    assert len(watcher.notes) == 1
    assert watcher.notes[0].startswith("drew failed: AttributeError")
    watcher.stop()
    watcher.drew(object(), None, 0.0)
    watcher.write()
    assert list(tmp_path.iterdir()) == []  # a process that was told to stop reports nothing
