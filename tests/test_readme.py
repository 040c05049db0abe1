"""The README shows what the results files say, and its code runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_table_is_that_of_the_results_files():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import table
    finally:
        sys.path.pop(0)
    assert f"{table.BEGIN}\n{table.render()}\n{table.END}" in README


def test_promised_bounds_are_stated_in_every_results_file():
    import json

    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        content = json.loads(path.read_text())
        assert content["bounds"], path
        for bound in content["bounds"]:
            assert {"name", "value", "bound", "ok"} <= bound.keys()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder as after `make demo` on fewer rows, with the digits beside it."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "examples").symlink_to(ROOT / "examples")
    command = [sys.executable, "-m", "delest", "run", "examples/digits.py", "--rows", "2000", "--epochs", "4", "--quiet"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return folder


def test_five_lines_of_plain_onnxruntime_run_the_bundle(runs):
    code = next(block for block in blocks("python") if "onnxruntime" in block)
    assert len([line for line in code.splitlines() if line]) == 5
    done = subprocess.run(
        [sys.executable, "-c", code + "\nimport sys\nassert 'torch' not in sys.modules"],
        cwd=runs,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    import numpy as np

    truth = [str(label) for label in np.load(ROOT / "examples" / "data" / "mnist10k.npz")["labels"][:4]]
    assert sum(a == b for a, b in zip(eval(done.stdout), truth, strict=True)) >= 3


def test_predict_on_a_png_gives_the_label_in_the_bundles_words(runs):
    import json

    import numpy as np
    from PIL import Image

    digits = np.load(ROOT / "examples" / "data" / "mnist10k.npz")
    Image.fromarray(digits["images"][0]).save(runs / "digit.png")
    done = subprocess.run(
        [sys.executable, "-m", "delest", "predict", "runs/digits-001", "digit.png", "--json"],
        cwd=runs,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)["rows"][0]
    labels = json.loads((runs / "runs" / "digits-001" / "shrunk" / "labels.json").read_text())
    assert answer["label"] in (labels if isinstance(labels, list) else labels["labels"])
    assert answer["label"] == str(digits["labels"][0])


def test_the_library_example_runs(tmp_path):
    import shutil

    code = next(block for block in blocks("python") if "import delest" in block)
    shutil.copy(ROOT / "examples" / "data" / "mnist10k.npz", tmp_path / "digits.npz")
    code = code.replace("epochs=5", "epochs=1").replace('data="digits.npz",', 'data="digits.npz", rows=1000,')
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout


def test_the_loop_of_ones_own_runs_under_a_runs_plan(runs, tmp_path):
    import shutil

    code = next(block for block in blocks("python") if "delest.apply" in block)
    assert len([line for line in code.splitlines() if line]) == 9
    shutil.copy(runs / "runs" / "digits-001" / "plan.json", tmp_path / "plan.json")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "threads: " in done.stdout
    assert 0.0 < float(done.stdout.split("loss ")[1]) < 3.0


def test_every_command_of_the_readme_exists():
    for name in set(re.findall(r"^    delest (\w+)", README, re.MULTILINE)):
        done = subprocess.run([sys.executable, "-m", "delest", name, "--help"], capture_output=True, text=True)
        assert done.returncode == 0
        assert "Example:" in done.stdout
