"""What the frameworks' own settings do to the time and the memory of `model.fit` on a CPU.

    python benchmarks/keras_settings.py [--only ROW]      # in an environment with delest[keras]

A row is a model on a framework: `fit` as it comes and with one setting changed, each in a process of its own. Memory is the highest resident set less that of the process with
its framework started and its data there. The page on Keras says what to take from it.
"""

from __future__ import annotations

import json
import re
import statistics
from typing import Any

import results_file

from frameworks import JOBS, answer, run, taken, times_of

GIVEN_BACK = "blocks given back (MALLOC_MMAP_THRESHOLD_=65536)"
MODELS, EPOCHS = ("cnn", "transformer"), 2
BF16, REMAT = {"SETTING": json.dumps({"policy": "mixed_bfloat16"})}, {"SETTING": json.dumps({"remat": "full"})}
NO_XLA, XLA = (
    "no XLA (jit_compile=False)",
    "XLA (jit_compile=True)",
)  # "auto", the default, leaves it out for layers that say so, as pooling does
SETTINGS: dict[str, dict[str, dict[str, str]]] = {
    "tensorflow": {
        NO_XLA: {"SETTING": json.dumps({"compile": {"jit_compile": False}})},
        XLA: {"SETTING": json.dumps({"compile": {"jit_compile": True}})},
        "no oneDNN (TF_ENABLE_ONEDNN_OPTS=0)": {"TF_ENABLE_ONEDNN_OPTS": "0"},
        GIVEN_BACK: {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)},
        "mixed_bfloat16": BF16,
        "RematScope": REMAT,
    },
    "jax": {GIVEN_BACK: {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}, "mixed_bfloat16": BF16, "RematScope": REMAT},
    "torch": {
        "torch.compile (jit_compile=True)": {"SETTING": json.dumps({"compile": {"jit_compile": True}})},
        GIVEN_BACK: {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)},
        "mixed_bfloat16": BF16,
        "RematScope": REMAT,
    },
}
ROWS = tuple(f"{model} {framework}" for model in MODELS for framework in SETTINGS)


def measure(name: str) -> dict[str, Any]:
    model, framework = name.split()
    found = {}
    for setting, variables in {"as it comes": {}, **SETTINGS[framework]}.items():
        done = run(framework, str(JOBS), model, str(EPOCHS), **variables)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if re.match(r"[\w.]*(Error|Exception)\b", line)]
            found[setting] = {"fault": (said or [f"exit status {done.returncode}"])[-1][:200]}
            continue
        told = answer(done)
        found[setting] = {**taken(told["peak_bytes"], told["idle_bytes"]), **times_of(**told["clock"])}
    return {"row": name, "settings": found}


def show(row: dict[str, Any]) -> None:
    plain = row["settings"]["as it comes"]
    for setting, one in row["settings"].items():
        if "fault" in one:
            print(f"{row['row']:24} {setting:52} {one['fault']}", flush=True)
            continue
        times, more = (one[name] / plain[name] for name in ("step_seconds", "above_idle_bytes"))
        print(
            f"{row['row']:24} {setting:52} {one['step_seconds'] * 1e3:8.1f} ms ({times:.2f}), {one['above_idle_bytes'] / 2**20:6,.0f} MiB ({more:.2f}), "
            f"warming up {one['warming_seconds']:.1f} s",
            flush=True,
        )


def bounds_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of what delest takes for granted: that TensorFlow's steps are better off without XLA."""
    found = [row["settings"] for row in rows if row["row"].endswith("tensorflow")]
    shares = [one[NO_XLA]["step_seconds"] / one[XLA]["step_seconds"] for one in found]
    return [
        results_file.bound_at_most("TensorFlow without XLA, share of its time with XLA, mean", statistics.mean(shares), 1.0)
    ]


def main() -> None:
    options = results_file.read_options(__doc__.splitlines()[0], ROWS)
    results_file.fill_table("keras_settings", ROWS, options, measure, bounds_of, show)


if __name__ == "__main__":
    main()
