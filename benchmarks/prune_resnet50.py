"""A ResNet-50 with 30 % fewer parameters: how soon it answers, against torch-pruning.

    python benchmarks/prune_resnet50.py [--only THREADS]

The same network with random weights, of which each is worth the same, is cut by three: delest (by measured seconds of layers), torch-pruning as its README shows (the same
ratio everywhere, found so that as many parameters go) and the same with `round_to=16`; no layer loses more than half its channels. All are timed by turns in ONNX
Runtime, one image of 224 pixels. A row is a number of threads.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import results_file
import torch
import zoo_networks
from torch import nn

from delest.backends.torch.export import export_network
from delest.backends.torch.pruning.widths import cut, find_widths
from delest.bundle.timing import time_alternating
from delest.records.pruning import Width
from delest.shrinking.layer_times import suitable_step, time_layers
from delest.shrinking.prune import Costs, Wish, choose_units

REMOVED, MOST, ROUNDS = 0.30, 0.5, 4
AGAINST = {"torch-pruning": 0.65, "torch-pruning, round_to=16": 0.85}
THREADS = {"1 thread": 1, "2 threads": 2}


def network() -> nn.Module:
    torch.manual_seed(0)
    return zoo_networks.resnet(blocks=[3, 4, 6, 3], bottleneck=True, classes=1000).eval()


def images(rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 3, 224, 224, generator=torch.Generator().manual_seed(1))


def ours(threads: int) -> nn.Module:
    model, given = network(), images()
    run = lambda inner: inner(given)  # noqa: E731
    before, step = count(model), suitable_step(threads)
    start = {name: module.out_channels for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    for _ in range(ROUNDS):
        gone = 1 - count(model) / before
        if gone >= REMOVED - 0.005:
            break
        found = find_widths(model, run)
        costs = Costs(
            parameters={name: layer.parameters for name, layer in found.layers.items()},
            seconds=time_layers(found.layers, threads=threads),
        )
        most = min(1 - MOST * start[width.name] / width.size for width in found.widths)
        scores = {width.name: np.full(width.size, worth(width, costs)) for width in found.widths}
        cut(
            model,
            run,
            choose_units(
                found.widths,
                scores,
                costs,
                Wish(parameters=(REMOVED - gone) / (1 - gone), most=most),
                step=step,
                favour_seconds=1.0,
            ).cuts,
        )
    return model


def worth(width: Width, costs: Costs) -> float:
    """Of one unit: the weights are random, so that each parameter is worth the same."""
    return sum(costs.parameters[layer] for layer, _ in width.sides) / width.size


def theirs(round_to: int | None) -> nn.Module:
    """torch-pruning with the ratio that takes as many parameters away."""
    low, high, best = 0.0, MOST, network()
    for _ in range(7):
        ratio = (low + high) / 2
        model = uniformly(ratio, round_to)
        if abs(1 - count(model) / count(network()) - REMOVED) < abs(1 - count(best) / count(network()) - REMOVED):
            best = model
        low, high = (ratio, high) if 1 - count(model) / count(network()) < REMOVED else (low, ratio)
    return best


def uniformly(ratio: float, round_to: int | None) -> nn.Module:
    import torch_pruning

    model = network()
    last = [module for module in model.modules() if isinstance(module, nn.Linear)]
    torch_pruning.pruner.MagnitudePruner(
        model,
        images(1),
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=last,
        round_to=round_to,
    ).step()
    return model.eval()


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def in_onnx(model: nn.Module, path: Path, threads: int) -> Callable[[], object]:
    import onnxruntime

    export_network(model, images().numpy(), path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return partial(session.run, None, {"x": images(1).numpy().astype(np.float32)})


def measure(name: str) -> dict[str, Any]:
    threads = THREADS[name]
    models = {
        "start": network(),
        "delest": ours(threads),
        "torch-pruning": theirs(None),
        "torch-pruning, round_to=16": theirs(16),
    }
    with tempfile.TemporaryDirectory() as folder:
        calls = {
            each: in_onnx(model, Path(folder, f"{number}.onnx"), threads) for number, (each, model) in enumerate(models.items())
        }
        seconds = time_alternating(calls, seconds=20.0)
    start = network()
    return {
        "row": name,
        "removed": {each: 1 - count(model) / count(start) for each, model in models.items()},
        "least_left": {each: least_left(model, start) for each, model in models.items()},
        "seconds": {each: values[0] for each, values in seconds.items()},
        "quartiles": {each: values[1:] for each, values in seconds.items()},
    }


def least_left(model: nn.Module, start: nn.Module) -> float:
    """Of the layer that lost most, the share of output channels that is left."""
    pairs = zip(model.modules(), start.modules(), strict=True)
    return min(now.out_channels / before.out_channels for now, before in pairs if isinstance(before, nn.Conv2d))


def bounds_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        results_file.bound_at_most(
            f"{row['row']}: seconds over those of {peer}", row["seconds"]["delest"] / row["seconds"][peer], bound
        )
        for row in rows
        for peer, bound in AGAINST.items()
    ]


def show(row: dict[str, Any]) -> None:
    for each, seconds in row["seconds"].items():
        print(
            f"{row['row']}  {each:28} {row['removed'][each]:.1%} removed, {row['least_left'][each]:.0%} left of the narrowest, {1e3 * seconds:.1f} ms",
            flush=True,
        )


def main() -> None:
    options = results_file.read_options(__doc__.splitlines()[0], list(THREADS))
    results_file.fill_table("prune_resnet50", list(THREADS), options, measure, bounds_of, show)


if __name__ == "__main__":
    main()
