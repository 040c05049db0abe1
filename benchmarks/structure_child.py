"""`structure_child.py cut|load CASE SHARE FOLDER`: a network of the zoo made narrower, or built again; one JSON object on standard output."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zoo
from torch import Tensor, nn

from delest.backends.torch.export import export_network
from delest.backends.torch.pruning.architecture import describe, rebuild, shapes_of, sizes_of
from delest.backends.torch.pruning.widths import cut, find_widths, score_units
from delest.shrinking.prune import Costs, Wish, choose_units
from delest.tensors import Arrays, write

ROWS, ROUNDS = 2, 6


class Scores(nn.Module):
    """The network of a case without its loss: named inputs in, one tensor out."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        return first(self.network(*inputs, **named))


def first(outputs: Any) -> Tensor:
    """The scores that a model of transformers gives among others."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, tuple):
        return first(outputs[0])
    return outputs.logits if hasattr(outputs, "logits") else outputs.last_hidden_state


def given(case: zoo.Case) -> Any:
    """Inputs of two rows; labels go where a decoder needs them."""
    inputs, _ = case.inputs(ROWS)
    if isinstance(inputs, dict):
        labels = inputs.pop("labels", None)
        if case.network.get("architecture", "").startswith("T5"):
            inputs["decoder_input_ids"] = labels
    return inputs


def run_with(inputs: Any) -> Any:
    return lambda network: first(zoo.apply(network, inputs))


def build(case: zoo.Case) -> nn.Module:
    model = case.model().eval()
    if hasattr(model, "config"):
        model.config.use_cache = False
    return model


def cut_case(case: zoo.Case, share: float, folder: Path) -> dict[str, Any]:
    model, inputs = build(case), given(case)
    run = run_with(inputs)
    sizes, shapes, before = sizes_of(model), shapes_of(model), count(model)
    whole: dict[str, str] = {}
    for _ in range(ROUNDS):
        found = find_widths(model, run)
        whole |= found.whole
        gone = 1 - count(model) / before
        if gone >= share or not found.widths:
            break
        scores = {
            name: score.numpy() for name, score in score_units(model, run, [lambda: run(model).float().square().mean()]).items()
        }
        costs = Costs(parameters={name: layer.parameters for name, layer in found.layers.items()}, seconds={})
        choice = choose_units(found.widths, scores, costs, Wish(parameters=(share - gone) / (1 - gone), most=0.75))
        if not choice.cuts:
            break
        cut(model, run, choice.cuts)
    model.zero_grad()
    outputs = run(model)
    outputs.float().square().mean().backward()
    finite = bool(outputs.isfinite().all()) and all(
        parameter.grad is None
        or bool(
            parameter.grad.coalesce().values().isfinite().all() if parameter.grad.is_sparse else parameter.grad.isfinite().all()
        )
        for parameter in model.parameters()
    )
    removed = 1 - count(model) / before
    (folder / "architecture.json").write_text(json.dumps(describe(model, sizes, shapes)))
    with open(folder / "weights.safetensors", "wb") as file:
        write(file, {name: np.ascontiguousarray(tensor.detach().numpy()) for name, tensor in model.state_dict().items()})
    np.save(folder / "outputs.npy", outputs.detach().numpy())
    return {"removed": removed, "parameters": before, "finite": finite, "whole": whole}


def load_case(case: zoo.Case, folder: Path) -> dict[str, Any]:
    model = rebuild(build(case), json.loads((folder / "architecture.json").read_text()))
    model.load_state_dict(
        {name: torch.from_numpy(array.copy()) for name, array in Arrays(folder / "weights.safetensors").items()}
    )
    inputs, outputs = given(case), np.load(folder / "outputs.npy")
    with torch.no_grad():
        loaded = run_with(inputs)(model).numpy()
    answer: dict[str, Any] = {"loaded_difference": difference(loaded, outputs)}
    try:
        answer["onnx_difference"] = difference(in_onnx(model, inputs, folder / "model.onnx"), outputs)
    except Exception as error:
        answer["onnx_error"] = f"{type(error).__name__}: {str(error)[:300]}"
    return answer


def in_onnx(model: nn.Module, inputs: Any, path: Path) -> np.ndarray:
    import onnxruntime

    arrays = (
        {name: value.numpy() for name, value in inputs.items()}
        if isinstance(inputs, dict)
        else tuple(value.numpy() for value in inputs)
        if isinstance(inputs, tuple)
        else inputs.numpy()
    )
    export_network(Scores(model), arrays, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    listed = list(arrays.values()) if isinstance(arrays, dict) else list(arrays) if isinstance(arrays, tuple) else [arrays]
    return session.run(None, dict(zip((each.name for each in session.get_inputs()), listed, strict=True)))[0]


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / max(1e-6, float(np.abs(theirs).max())))


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    what, name, share, folder = sys.argv[1:]
    warnings.simplefilter("ignore")
    case = zoo.find_case(name)
    answer = cut_case(case, float(share), Path(folder)) if what == "cut" else load_case(case, Path(folder))
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
