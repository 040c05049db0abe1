"""Networks that the own framework's exporter does not know are written by another's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="`make test-keras` runs this test where Keras is installed")

from delest import job as jobs  # noqa: E402
from delest.frameworks.keras import KerasBackend  # noqa: E402
from delest.frameworks.keras.session import KerasSession  # noqa: E402
from delest.records.plan import Plan  # noqa: E402
from delest.records.source import Column, Schema, Target  # noqa: E402

JOB = """
import keras
import numpy as np

import delest


def net():
    layers = keras.layers
    body = [layers.Embedding(9, 4, mask_zero=True), layers.Bidirectional(layers.GRU(5)), layers.Dense(3)]
    return keras.Sequential([keras.Input((6,), dtype="int64"), *body])


job = delest.Job(model=net, data=(np.zeros((40, 6), int), np.zeros(40, int)), batch_size=8)
"""


def test_recurrent_layers_with_masks_take_batches_of_any_size(tmp_path: Path):
    import onnxruntime

    (tmp_path / "masked.py").write_text(JOB)
    columns = (Column(name="x", kind="array", shape=(6,), dtype="int64"),)
    schema = Schema(inputs=columns, target=Target(name="y", kind="class", classes=("a", "b", "c")))
    trained = KerasSession(jobs.load(str(tmp_path / "masked.py")), Plan(batch_size=8, micro_batch=8), schema)
    rows = np.random.default_rng(0).integers(0, 9, (5, 6))
    KerasBackend().export(trained, rows[:2], tmp_path / "model.onnx")
    written = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (answers,) = written.run(None, {written.get_inputs()[0].name: rows})
    np.testing.assert_allclose(answers, trained.predict(rows), rtol=1e-4, atol=1e-5)
