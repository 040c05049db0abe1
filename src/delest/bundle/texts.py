"""A bundle that is asked about texts: which token comes next, and how well the text was foretold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from delest import errors
from delest.bundle.model import log_probabilities
from delest.data.targets import refuse
from delest.data.text import encoder_of, read_pieces

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from delest.bundle.model import Model

_ROWS = 32  # windows of a batch


def predict_texts(model: Model, files: Sequence[Path]) -> list[dict[str, Any]]:
    """Answers for every window of the files: `input` (`file:window`, counted from 0), `label`, the token that most likely comes after it, with
    its `probability`, and `loss`, the mean cross-entropy in nats of the window's own tokens from the second on (None where it has one).

    A window holds as many tokens as the model sees at once, the last one of a file those that are left. Raises `BadInput` naming all files that
    hold no text, `MissingExtra`.
    """
    encoder = encoder_of(model.preprocessing.schema)
    faults: list[str] = []
    encoded = {}
    for file in files:
        try:
            encoded[file] = np.concatenate([np.empty(0, np.int64), *map(encoder.encode, read_pieces(file))])
        except errors.BadInput as error:
            faults.extend(error.faults)
            continue
        if not len(encoded[file]):
            faults.append(f"{file} holds no text: there is nothing to predict.")
    refuse(faults)
    return [answer for file, ids in encoded.items() for answer in _answers(model, str(file), ids)]


def _answers(model: Model, name: str, ids: NDArray) -> Iterator[dict[str, Any]]:
    (context,) = model.preprocessing.schema.inputs[0].shape
    count = -(-len(ids) // context)
    lengths = np.full(count, context)
    lengths[-1] = len(ids) - (count - 1) * context
    # What fills the last window up comes after its tokens, where none of them sees it.
    windows = np.pad(ids, (0, count * context - len(ids))).reshape(count, context)
    for start in range(0, count, _ROWS):
        rows = windows[start : start + _ROWS]
        given = log_probabilities(model.predict({model.description["inputs"][0]["name"]: rows}))
        foretold = np.take_along_axis(given[:, :-1], rows[:, 1:, None], 2)[..., 0]
        for row, length in enumerate(lengths[start : start + _ROWS].tolist()):
            best = int(given[row, length - 1].argmax())
            yield {
                "input": f"{name}:{start + row}",
                "label": (model.labels or [])[best],
                "probability": float(np.exp(given[row, length - 1, best])),
                "loss": float(-foretold[row, : length - 1].mean()) if length > 1 else None,
            }
