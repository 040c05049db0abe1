"""Estimated against measured peaks of Keras jobs: eight models on TensorFlow and torch.

    python benchmarks/keras_footprint.py [--only ROW]      # in an environment with delest[keras]

A row is a model: on each framework `delest estimate`, which makes steps on a quarter and a half of the batch, and `delest measure`, which makes them on the whole
batch, each in processes of their own.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import results_file

HERE = Path(__file__).parent
MODELS = ("cnn", "vgg", "resnet", "mobilenet", "unet", "mlp", "transformer", "recommender")
FRAMEWORKS = ("tensorflow", "torch")


def call(framework: str, command: str, model: str) -> dict[str, Any]:
    words = [sys.executable, "-m", "delest", command, f"{HERE / 'keras_models.py'}:{model}_job", "--json"]
    environment = {**os.environ, "KERAS_BACKEND": framework, "TF_CPP_MIN_LOG_LEVEL": "2"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{framework}: delest {command} {model}: {done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(model: str) -> dict[str, Any]:
    row: dict[str, Any] = {"row": model}
    for framework in FRAMEWORKS:
        estimated, measured = (call(framework, command, model) for command in ("estimate", "measure"))
        names = ("peak_bytes", "low_bytes", "high_bytes", "runtime_bytes", "step_seconds")
        row[framework] = {
            "estimated": {name: estimated[name] for name in names},
            "measured": {name: measured[name] for name in names},
            "error": estimated["peak_bytes"] / measured["peak_bytes"] - 1,
        }
    return row


def show(row: dict[str, Any]) -> None:
    for framework in FRAMEWORKS:
        one = row[framework]
        estimated, measured = (one[kind]["peak_bytes"] / 2**20 for kind in ("estimated", "measured"))
        print(
            f"{row['row']:12} {framework:10} estimated {estimated:7,.0f} MiB, measured {measured:7,.0f} MiB: {one['error']:+.1%}",
            flush=True,
        )


def bounds_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = [row[framework]["error"] for row in rows for framework in FRAMEWORKS]
    return [
        results_file.bound_at_most("error of the peak, median", statistics.median(map(abs, found)), 0.08),
        results_file.bound_at_least("error of the peak, lowest", min(found), -0.10),
    ]


def main() -> None:
    options = results_file.read_options(__doc__.splitlines()[0], MODELS)
    results_file.fill_table("keras_footprint", MODELS, options, measure, bounds_of, show)


if __name__ == "__main__":
    main()
