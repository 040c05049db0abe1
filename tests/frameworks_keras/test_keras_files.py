"""`.keras` files as models: loaded in safe mode, and refused before anything of theirs runs."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="`make test-keras` runs this test where Keras is installed")

from delest import errors  # noqa: E402
from delest.frameworks.keras.session import KerasSession  # noqa: E402
from delest.job import Job  # noqa: E402
from delest.records.plan import Plan  # noqa: E402
from delest.records.source import Column, Schema, Target  # noqa: E402
from delest.verbs.keras_jobs import is_keras  # noqa: E402

SCHEMA = Schema(
    inputs=(Column(name="x", kind="array", shape=(6,)),),
    target=Target(name="y", kind="class", classes=("a", "b", "c")),
)


def session(path: Path) -> KerasSession:
    return KerasSession(Job(model=path, data="unused", batch_size=4), Plan(batch_size=4, micro_batch=4), SCHEMA)


def saved(path: Path, *layers: Any) -> Path:
    keras.Sequential([keras.Input((6,)), *layers, keras.layers.Dense(3)]).save(path)
    return path


def changed(path: Path, change: Any) -> Path:
    """The same file with another configuration."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(parts["config.json"])
    change(config)
    parts["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return path


def test_a_file_is_a_model_with_its_weights(tmp_path: Path):
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(4, activation="relu"), keras.layers.Dense(3)])
    model.save(tmp_path / "net.keras")
    x = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    expected = keras.ops.convert_to_numpy(model(x))
    assert is_keras(Job(model=tmp_path / "net.keras", data="unused"), SCHEMA)
    np.testing.assert_allclose(session(tmp_path / "net.keras").predict(x), expected, rtol=1e-5, atol=1e-6)


@keras.saving.register_keras_serializable(package="delest_tests")
class Doubled(keras.layers.Layer):
    def call(self, x: Any) -> Any:
        return 2 * x


def test_classes_that_the_jobs_file_registers_are_loaded(tmp_path: Path):
    assert session(saved(tmp_path / "net.keras", Doubled())).parameters() == 21


def test_a_lambda_is_refused_and_does_not_run(tmp_path: Path):
    mark = tmp_path / "ran"
    layer = keras.layers.Lambda(eval(f"lambda x: (open({str(mark)!r}, 'w').close(), x)[1]"), output_shape=(6,))
    path = saved(tmp_path / "net.keras", layer)
    keras.saving.load_model(path, safe_mode=False, compile=False)(np.zeros((1, 6), np.float32))
    assert mark.exists(), "it would run"
    mark.unlink()
    with pytest.raises(errors.BadInput, match="refused and nothing of it was run: it names a Lambda, which holds code"):
        session(path)
    assert not mark.exists()


@pytest.mark.parametrize("module", ["evil_module", "keras_evil.layers"])
def test_a_module_outside_keras_is_refused_and_is_not_imported(tmp_path: Path, module: str, monkeypatch: pytest.MonkeyPatch):
    place = tmp_path.joinpath(*module.split(".")[:-1])
    place.mkdir(exist_ok=True)
    (place / f"{module.split('.')[-1]}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Dense: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def change(config: Any) -> None:
        config["config"]["layers"][1] |= {"module": module, "class_name": "Dense", "registered_name": None}

    with pytest.raises(errors.BadInput, match=f"{module}.Dense, which is not Keras's own"):
        session(changed(saved(tmp_path / "net.keras"), change))
    assert not (tmp_path / "ran").exists()


def test_a_function_of_keras_that_is_no_layer_is_refused(tmp_path: Path):
    def change(config: Any) -> None:
        name = {"module": "keras.utils", "class_name": "function", "config": "get_file", "registered_name": "get_file"}
        config["config"]["layers"][1]["config"]["activation"] = name

    with pytest.raises(errors.BadInput, match=r"net.keras could not be loaded"):
        session(changed(saved(tmp_path / "net.keras"), change))


def test_what_is_no_such_file_is_said(tmp_path: Path):
    (tmp_path / "net.keras").write_bytes(b"\x80\x04pickle")
    with pytest.raises(errors.BadInput, match=r"is no .keras file of Keras 3"):
        session(tmp_path / "net.keras")
