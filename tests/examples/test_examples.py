"""Every example runs as its docstring says; small where it is large."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import delest

EXAMPLES = Path(__file__).parents[2] / "examples"


def call(folder: Path, *arguments: str) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DELEST_CACHE": str(folder / "cache"), "TMPDIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-m", "delest", *arguments, "--json"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def run(folder: Path, *arguments: str) -> dict:
    answer = call(folder, "run", *arguments)
    assert (folder / answer["path"] / "report.html").exists()
    return answer


def test_digits_small(tmp_path):
    answer = run(tmp_path, str(EXAMPLES / "digits.py"), "--rows", "1500", "--epochs", "4")
    assert answer["test"]["accuracy"] > 0.8
    assert answer["data"]["rows"] == 1500


@pytest.mark.slow
def test_digits_whole(tmp_path):
    answer = run(tmp_path, str(EXAMPLES / "digits.py"))
    assert answer["test"]["accuracy"] >= 0.975
    shrunk = json.loads((tmp_path / answer["path"] / "shrunk" / "shrink.json").read_text())
    fp32 = next(candidate for candidate in shrunk["candidates"] if candidate["name"] == "fp32")
    int8 = next(candidate for candidate in shrunk["candidates"] if candidate["name"] == "int8")
    assert fp32["weights_bytes"] / int8["file_bytes"] >= 3.5


def test_table(tmp_path):
    answer = run(tmp_path, str(EXAMPLES / "table.py"))
    assert answer["test"]["auc"] > 0.85


@pytest.mark.slow  # tests/verbs/test_text_jobs.py goes the same way
def test_text_on_a_file(tmp_path):
    random = np.random.default_rng(0)
    lines = (
        f"{random.choice(['cats', 'dogs'])} {random.choice(['eat', 'see'])} {random.choice(['fish', 'birds'])}\n"
        for _ in range(800)
    )
    (tmp_path / "lines.txt").write_text("".join(lines))
    options = ("--data", str(tmp_path / "lines.txt"), "--context", "32", "--epochs", "4", "--max-drop", "20%")
    answer = run(tmp_path, str(EXAMPLES / "text.py"), *options)
    assert answer["metric"] == "loss"
    assert answer["test"]["loss"] < 0.9 * answer["data"]["baseline"]["loss"]
    assert json.loads((tmp_path / answer["path"] / "bundle" / "labels.json").read_text())["labels"][:2] == ["\ufffd", "\n"]


def test_text_without_its_file_says_how_to_name_it(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "delest", "run", str(EXAMPLES / "text.py")], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "book.txt does not exist" in done.stderr


def photograph(label: int, random: np.random.Generator) -> dict:
    pixels = np.full((32, 32, 3), 40 + 20 * label) + random.integers(-30, 30, (32, 32, 3))
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(buffer := io.BytesIO(), "JPEG")
    return {"bytes": buffer.getvalue(), "path": None}


def write_hub_parquet(path: Path, rows: int, seed: int) -> None:
    """Images as the Hugging Face hub lays them out, with class names in the schema's metadata."""
    random, labels = np.random.default_rng(seed), [i % 10 for i in range(rows)]
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    features = {"img": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    schema = pa.schema([("img", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())])
    schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    table = pa.table({"img": [photograph(label, random) for label in labels], "label": labels}, schema=schema)
    pq.write_table(table, path)


def test_cifar10_on_a_folder_of_its_layout(tmp_path):
    (tmp_path / "photos").mkdir()
    write_hub_parquet(tmp_path / "photos" / "train.parquet", 900, 0)
    write_hub_parquet(tmp_path / "photos" / "test.parquet", 200, 1)
    answer = run(tmp_path, str(EXAMPLES / "cifar10.py"), "--data", str(tmp_path / "photos"), "--rows", "600", "--epochs", "2")
    assert answer["data"]["rows"] == 600
    assert list(answer["data"]["classes"])[:3] == ["airplane", "automobile", "bird"]
    assert answer["measured"]["peak_bytes"] < 1 << 30


def test_cifar10_without_its_folder_says_how_to_name_it(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "delest", "run", str(EXAMPLES / "cifar10.py")], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "cifar10 does not exist" in done.stderr


def test_detect_small(tmp_path):
    answer = run(tmp_path, str(EXAMPLES / "detect.py"), "--rows", "400", "--epochs", "1")
    assert 0 <= answer["test"]["mAP@0.5"] <= 1
    shrunk = json.loads((tmp_path / answer["path"] / "shrunk" / "shrink.json").read_text())
    assert shrunk["metric"] == "mAP@0.5"
    assert "mAP@0.5" in (tmp_path / answer["path"] / "report.html").read_text()
    Image.new("L", (128, 128)).save(tmp_path / "scene.png")
    (found,) = delest.predict(tmp_path / answer["path"], [tmp_path / "scene.png"])
    assert np.shape(found["outputs"]) == (1, 15, 8, 8)


@pytest.mark.slow
def test_detect_whole_and_a_third_smaller(tmp_path):
    answer = run(tmp_path, str(EXAMPLES / "detect.py"))
    assert answer["test"]["mAP@0.5"] >= 0.9
    shrunk = call(tmp_path, "shrink", answer["path"], "--max-drop", "1%", "--time", "3min")
    trained, ships = (next(c for c in shrunk["candidates"] if c["name"] == name) for name in ("fp32", shrunk["shipped"]))
    assert ships["parameters"] <= 0.7 * trained["parameters"]
    assert shrunk["test"]["mAP@0.5"] >= answer["test"]["mAP@0.5"] - 0.015
