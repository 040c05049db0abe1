"""A trained PyTorch network as one ONNX file."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from delest import errors, storage

if TYPE_CHECKING:
    from delest.records.batch import Inputs


def export_network(module: torch.nn.Module, inputs: Inputs, path: Path) -> None:
    """Write a network in evaluation mode as one ONNX file with a dynamic batch.

    `inputs` are two rows as the model receives them, NumPy: an array (named `x` in the file), a tuple (`x0`, `x1`, ...)
    or a mapping (its keys). A single output is named `output`. Node and weight names stay readable, so that a report can name
    layers; the bundle shortens them. The module's own mode is restored.

    Raises `BadInput` with the operator or the reason where the network has no ONNX form.
    """
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    if isinstance(inputs, Mapping):
        names, keywords, arrays = list(inputs), True, list(inputs.values())
    elif isinstance(inputs, tuple):
        names, keywords, arrays = [f"x{position}" for position in range(len(inputs))], False, list(inputs)
    else:
        names, keywords, arrays = ["x"], False, [inputs]
    network = _Positional(module, names if keywords else None)
    tensors = tuple(torch.as_tensor(array, device=device) for array in arrays)
    with _evaluating(network), _quiet():
        try:
            try:
                written = _convert(network, tensors, names)
            except Exception:
                # Fused attention gives a result of other strides than what the exporter puts in its place, where the code behind may then
                # not view it as it does.
                with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                    written = _convert(network, tensors, names)
        except Exception as error:
            raise errors.BadInput(
                f"the network cannot be written as ONNX: {_reason(error)}. The trained model is kept and can be used from PyTorch; "
                "replace that operation in the model (or leave it out with the job's `predict`) to get a bundle."
            ) from error
    storage.write_atomic(path, written)


class _Positional(torch.nn.Module):
    """A network whose inputs are all positional: torch.export mixes up dynamic dimensions where `forward` takes `**named`."""

    def __init__(self, network: torch.nn.Module, keywords: list[str] | None):
        super().__init__()
        self.network, self.keywords = network, keywords

    def forward(self, *inputs: torch.Tensor) -> Any:
        if self.keywords is None:
            return self.network(*inputs)
        return self.network(**dict(zip(self.keywords, inputs, strict=True)))


def _convert(network: torch.nn.Module, inputs: tuple[torch.Tensor, ...], names: list[str]) -> bytes:
    """The serialised ONNX model, without metadata and inferred shapes: in a small network they outweigh the weights."""
    batch = {0: torch.export.Dim.DYNAMIC}
    program = torch.onnx.export(
        network, inputs, dynamo=True, dynamic_shapes=(tuple(batch for _ in inputs),), input_names=names, verbose=False
    )
    assert program is not None
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(program.model)
    _name_transposed(program.model.graph, network)
    if len(program.model.graph.outputs) == 1 and "output" not in names:
        program.model.graph.outputs[0].name = "output"
    proto = program.model_proto
    del proto.graph.value_info[:]
    return proto.SerializeToString()


def _name_transposed(graph: Any, network: torch.nn.Module) -> None:
    """Name the weights of linear layers, which the exporter may store transposed and numbered, as in training, with `_Transposed`."""
    known = network.state_dict()
    missing = {
        name: weight.detach().cpu().numpy().T
        for name, weight in known.items()
        if weight.ndim == 2 and weight.dtype == torch.float32 and name not in graph.initializers
    }
    for value in [value for name, value in graph.initializers.items() if name not in known]:
        array = value.const_value.numpy()
        for name, weight in missing.items():
            if weight.shape == array.shape and (weight[:1] == array[:1]).all() and (weight == array).all():
                value.name = f"{name}_Transposed"
                del missing[name]
                break


def _reason(error: BaseException) -> str:
    """The operator, or the first lines of what was raised first: torch wraps it in pages of advice."""
    operator = None
    while True:
        found = re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", str(error))
        operator = found.group(1) if found else operator
        if error.__cause__ is None:
            break
        error = error.__cause__
    if operator:
        return f"the operator {operator} has no ONNX form"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2]) or 'no reason given'}".rstrip(".")


@contextlib.contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside, each submodule's own mode again outside."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No notes about torchvision or deprecated internals of torch, no dumped graphs: nobody can act on them."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    unread = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(unread), contextlib.redirect_stderr(unread):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
