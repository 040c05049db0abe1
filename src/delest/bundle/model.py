"""A bundle that is run: checked when loaded, without torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from delest import errors, storage
from delest.records.batch import Outputs
from delest.records.form import FORMAT, from_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SMALLEST = np.finfo(np.float32).tiny  # keeps the logarithm of a probability finite


def load(folder: Path | str, *, threads: int | None = None) -> Model:
    """Open a bundle after checking that each file is as it was written. `threads` None leaves the choice to ONNX Runtime.

    Raises `BadInput` where there is no bundle or a newer delest wrote it, `CheckFailed` naming each file that is damaged or missing.
    """
    folder = Path(folder)
    try:
        description = json.loads((folder / "bundle.json").read_text())
    except FileNotFoundError:
        raise errors.BadInput(
            f"{folder} is no bundle: there is no bundle.json in it. Give the folder that `delest shrink` wrote."
        ) from None
    except ValueError as error:
        raise errors.CheckFailed(
            f"{folder / 'bundle.json'} is damaged ({error}). Write the bundle again with `delest shrink`."
        ) from None
    if description["format"] > FORMAT:
        raise errors.BadInput(
            f"{folder / 'bundle.json'} has format {description['format']}, this delest reads up to {FORMAT}: "
            "a newer delest wrote it; upgrade delest to read it."
        )
    damaged = [
        f"{folder / name} {'has changed since it was written' if (folder / name).exists() else 'is missing'}"
        for name, expected in description["files"].items()
        if not (folder / name).exists() or storage.checksum(folder / name) != expected
    ]
    if damaged:
        raise errors.CheckFailed("; ".join(damaged) + ". Write the bundle again with `delest shrink`, or copy it anew.")
    return Model(folder, description, threads)


class Model:
    """A trained model as ONNX Runtime runs it: raw inputs in, probabilities [B, K] or values [B] out."""

    def __init__(self, folder: Path, description: dict[str, Any], threads: int | None):
        import onnxruntime

        from delest.data import Preprocessing

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3
        # Threads that spin after a call would take the cores from whatever runs next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.folder = folder
        self.description = description
        self.labels: list[str] | None = description["labels"]
        self.preprocessing = from_json(Preprocessing, description["preprocessing"], str(folder / "bundle.json"))
        self.session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])

    def predict(self, raw: Mapping[str, NDArray]) -> Any:
        """Probabilities float32 [B, K], values float32 [B] in the target's units, scores float32 [B, T, V] of a text's next tokens, or the
        network's outputs as they are (a tuple where there are several).

        `raw` holds the bundle's inputs by name: `image` uint8 [B, H, W, C], arrays as stored, `tokens` int64 [B, T], or table columns [B].

        Raises `BadInput` naming every input that is missing or does not fit.
        """
        outputs = self.session.run(None, self._checked(raw))
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def outputs(self, feed: Any) -> Iterator[Outputs]:
        """Evaluation over `feed.raw()`: log-probabilities [B, K] (of a single logit: the logit [B, 1]) with cross-entropy a row,
        standardised numbers [B] with squared error a row, scores of tokens [B, T, V] with their mean cross-entropy a row, or outputs as they are
        with losses that are NaN."""
        head = self.description["head"]
        for batch in feed.raw():
            given = self.predict(batch.inputs)
            judged, losses = given, np.full(batch.count, np.nan)
            if head in ("softmax", "sigmoid", "probabilities"):
                judged = np.log(np.maximum(given, _SMALLEST))
                losses = -judged[np.arange(batch.count), batch.targets]
                if head == "sigmoid":
                    judged = judged[:, 1:] - judged[:, :1]
            elif head == "value":
                judged = ((given - self.preprocessing.target_mean) / self.preprocessing.target_std).astype(np.float32)
                losses = (judged - batch.targets) ** 2
            elif head == "logits":
                found = np.take_along_axis(log_probabilities(given), batch.targets[..., None], 2)
                losses = -found[..., 0].mean(1)
            yield Outputs(judged, batch.targets, losses, batch.index)

    def _checked(self, raw: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """The inputs with their declared dtype."""
        faults, inputs = [], {}
        for wanted in self.description["inputs"]:
            name, shape = wanted["name"], wanted["shape"]
            # A table's column without a name reaches here under its own, empty one.
            array = raw.get(name, raw.get("") if name == "column" else None)
            if array is None:
                faults.append(
                    f"the input {name!r} ({wanted['dtype']} {shape}) is missing; given: {', '.join(map(repr, raw)) or 'nothing'}."
                )
                continue
            array = np.asarray(array)
            expected = np.dtype(object if wanted["dtype"] == "string" else wanted["dtype"])
            if len(array.shape) != len(shape) or any(
                isinstance(n, int) and n != m for n, m in zip(shape, array.shape, strict=True)
            ):
                faults.append(f"the input {name!r} has shape {list(array.shape)}, the model takes {shape}.")
            elif not _fits(array.dtype, expected):
                faults.append(f"the input {name!r} is {array.dtype}, the model takes {wanted['dtype']}.")
            else:
                inputs[name] = array.astype(expected, copy=False)
        if faults:
            raise errors.BadInput(faults)
        return inputs


def log_probabilities(scores: NDArray) -> NDArray:
    """Of scores [..., V]."""
    shifted = scores - scores.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _fits(given: np.dtype[Any], expected: np.dtype[Any]) -> bool:
    """Whether values can be passed on: text as text, numbers as wider or other floats, pixels only as bytes."""
    if expected.kind == "O":
        return given.kind in "OUT"
    if expected == np.uint8:
        return given == np.uint8
    return given.kind in ("iub" if expected.kind in "iu" else "iubf")
