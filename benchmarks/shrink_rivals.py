"""What others make of the start of `shrink.py`: each a bare ONNX network by name, or why there is none.

Each has the same start, data and time to recover as delest, trains by delest's own loop, and ends with ONNX Runtime's static int8 as its documentation shows beside the
float network. NNCF runs in a process of its own (`shrink_nncf.py`).
"""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from shrink_jobs import Task
from torch import nn

import delest
from delest.data import Feed
from delest.job import Job
from delest.training.progress import Progress
from delest.verbs.training import Trained, restore
from delest.verbs.workplace import backend

RATIO, GENTLER, STRONGER = 0.5, 0.3, 0.7
CALIBRATION_ROWS = 512
SEEDS = (1, 2, 3)


def fine_tuned(job: Job, network: nn.Module, start: Trained, seconds: float, folder: Path) -> Trained:
    """A network that goes on learning for so long, its best weights of all epochs."""
    recipe = replace(job.recipe, epochs=epochs_for(start, seconds), patience=100)
    learning = replace(job, model=lambda: copy.deepcopy(network), recipe=recipe, origin=None)
    delest.train(learning, out=folder, time=seconds, say=Progress())
    return restore(folder, Progress(), learning)


def epochs_for(start: Trained, seconds: float) -> int:
    """More than fit: the clock begins the decay."""
    epoch = start.run.seconds["training"] / max(1.0, start.run.epochs)
    return max(2, round(1.5 * seconds / epoch))


def by_torch_pruning(start: Trained, folder: Path, task: Task, accepts: Any) -> tuple[dict[str, Trained], dict[str, Any]]:
    """As its README shows: the same ratio everywhere by group magnitude, `round_to=8`, then training. Its ratio is the user's to find: half first,
    then more or less of it, by whether the bound is kept, each for half the time."""
    found, told, ratio = {}, {}, RATIO
    for number in range(2):
        try:
            network = _pruned(start, ratio)
        except Exception as error:
            told[f"torch-pruning {ratio:g}"] = {
                "fault": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}",
                "within": False,
            }
            ratio = GENTLER
            continue
        trained = fine_tuned(start.place.job, network, start, task.seconds / 2, folder / f"pruned-{number}")
        name = f"torch-pruning {ratio:g}"
        told[name] = {"parameters": trained.session.parameters()}
        found[name] = trained
        ratio = STRONGER if accepts(trained) else GENTLER
    return found, told


def _pruned(start: Trained, ratio: float) -> nn.Module:
    import torch_pruning

    network = copy.deepcopy(start.session.exportable()).train()
    given = start.place.first_inputs(2)
    example = _tensors(given)
    last = [module for module in network.modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1:]
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    pruner = torch_pruning.pruner.BasePruner(
        network,
        example,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=last,
        round_to=8,
    )
    pruner.step()
    with torch.no_grad():  # some cuts are only found to be wrong when the network runs
        network.eval()(**example) if isinstance(example, dict) else network.eval()(example)
    return network


def _tensors(inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return {name: torch.as_tensor(value) for name, value in inputs.items()}
    return torch.as_tensor(inputs)


def from_scratch(start: Trained, architecture: Mapping[str, Any], seconds: float, folder: Path) -> list[Trained]:
    """The network of delest's widths, trained from random weights for the time of training and shrinking together, by seed."""
    found = []
    for seed in SEEDS:
        narrow = backend(start.place.job, start.place.source.schema).narrower(
            start.place.job, start.place.source.schema, architecture
        )
        epochs = epochs_for(start, seconds)
        recipe = replace(start.place.job.recipe, epochs=epochs, patience=epochs)
        job = replace(narrow, recipe=recipe, seed=start.place.job.seed, origin=None)
        job = replace(job, model=_seeded(job.model, seed))
        delest.train(job, out=folder / f"scratch-{seed}", time=seconds, say=Progress())
        found.append(restore(folder / f"scratch-{seed}", Progress(), job))
    return found


def _seeded(factory: Any, seed: int) -> Any:
    """The rows of all roles follow the job's seed, which stays; only the weights begin elsewhere."""

    def build(*given: Any) -> nn.Module:
        torch.manual_seed(seed)
        return factory(*given)

    return build if delest.job.takes_schema(factory) else lambda: build()


def export(trained: Trained, path: Path) -> Path:
    backend(trained.place.job, trained.place.source.schema).export(trained.session, trained.place.first_inputs(2), path)
    return path


def calibration(start: Trained) -> list[dict[str, np.ndarray]]:
    feed = start.place.feed("train")
    rows = feed.index[np.linspace(0, len(feed) - 1, CALIBRATION_ROWS).astype(np.int64)]
    found = []
    for batch in Feed(feed.source, rows, feed.preprocessing, batch_size=32).ordered():
        found.append(dict(batch.inputs) if isinstance(batch.inputs, Mapping) else {"x": batch.inputs})
    return found


def by_onnx_runtime(network: Path, rows: list[dict[str, np.ndarray]]) -> Path:
    """Static int8 as ONNX Runtime's page "Quantize ONNX Models" shows: pre-processed, QDQ, min-max, by channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(rows)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    out = network.with_name(network.stem + "-int8.onnx")
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder, "prepared.onnx")
        quant_pre_process(network, prepared)
        quantize_static(
            prepared,
            out,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    return out


def by_nncf(network: Path, rows: list[dict[str, np.ndarray]]) -> Path:
    """NNCF's post-training quantisation of the ONNX network, with its own defaults."""
    out = network.with_name(network.stem + "-nncf.onnx")
    names = list(rows[0])
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder, "rows.npz")
        np.savez(given, **{f"{place}.{name}": row[name] for place, row in enumerate(rows) for name in names})
        child = Path(__file__).with_name("shrink_nncf.py")
        done = subprocess.run([sys.executable, str(child), str(network), str(given), str(out)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1][:200])
    onnx.checker.check_model(onnx.load(out))
    return out
