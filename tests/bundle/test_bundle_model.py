import json
import subprocess
import sys

import numpy as np
import pytest
from networks import image_network, table_network

from delest import errors, metrics
from delest.bundle import load
from delest.training.evaluate import evaluate


def test_evaluation_of_classes_agrees_with_the_probabilities(bundle, pictures):
    labels = np.arange(40) // 2 % 2  # half of them are not what the pictures show
    model, feed = bundle(image_network(3, 2), (pictures[0], labels))
    probabilities = np.concatenate([model.predict(batch.inputs) for batch in feed.raw()])
    found = evaluate(model, feed, metrics.named("accuracy"))
    assert found.score == (probabilities.argmax(1) == labels).mean()
    assert 0 < found.score < 1
    assert found.loss == pytest.approx(-np.log(probabilities[np.arange(40), labels]).mean(), rel=1e-5)
    np.testing.assert_array_equal(found.index, np.arange(40))


def test_evaluation_of_a_single_logit_is_that_of_the_logit(bundle, pictures):
    model, feed = bundle(image_network(3, 1), pictures)
    probabilities = np.concatenate([model.predict(batch.inputs) for batch in feed.raw()])
    found = evaluate(model, feed, metrics.named("accuracy"))
    assert found.outputs.shape == (40, 1)
    assert found.score == (probabilities.argmax(1) == pictures[1]).mean()


def test_evaluation_of_numbers_is_in_the_units_of_the_target(bundle, table):
    model, feed = bundle(table_network(3, 2), table, target="target")
    values = np.concatenate([model.predict(batch.inputs) for batch in feed.raw()])
    truth = np.arange(30) * 2.25 + 0.5
    found = evaluate(model, feed, metrics.named("rmse"))
    assert found.score == pytest.approx(np.sqrt(((values - truth) ** 2).mean()), rel=1e-5)
    assert found.loss == pytest.approx((((values - truth) / feed.preprocessing.target_std) ** 2).mean(), rel=1e-4)


@pytest.mark.parametrize("file", ["model.onnx", "labels.json"])
def test_a_damaged_file_is_named(bundle, pictures, file):
    model, _ = bundle(image_network(3, 2), pictures)
    path = model.folder / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(errors.CheckFailed, match=f"{file} has changed") as caught:
        load(model.folder)
    assert caught.value.exit_status == 6


def test_every_missing_or_damaged_file_is_named(bundle, pictures):
    model, _ = bundle(image_network(3, 2), pictures)
    (model.folder / "model.onnx").unlink()
    (model.folder / "labels.json").write_text("{}")
    with pytest.raises(errors.CheckFailed, match=r"(?s)labels.json has changed.*model.onnx is missing"):
        load(model.folder)


def test_a_cut_description_is_a_failed_check(bundle, pictures):
    model, _ = bundle(image_network(3, 2), pictures)
    path = model.folder / "bundle.json"
    path.write_text(path.read_text()[:50])
    with pytest.raises(errors.CheckFailed, match=r"bundle\.json is damaged"):
        load(model.folder)


def test_a_folder_without_a_bundle_is_bad_input(tmp_path):
    with pytest.raises(errors.BadInput, match="is no bundle"):
        load(tmp_path)


def test_a_newer_format_is_refused(bundle, pictures):
    model, _ = bundle(image_network(3, 2), pictures)
    path = model.folder / "bundle.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(errors.BadInput, match="format 99"):
        load(model.folder)


def test_all_unfit_inputs_are_reported_together(bundle, table):
    model, feed = bundle(table_network(3, 2), table, target="target")
    raw = dict(next(feed.raw()).inputs)
    del raw["colour"]
    raw["price"] = raw["price"][:, None]
    raw["big"] = np.zeros(16, np.float32)
    with pytest.raises(errors.BadInput) as caught:
        model.predict(raw)
    assert len(caught.value.faults) == 3
    assert all(any(name in fault for fault in caught.value.faults) for name in ("'colour'", "'price'", "'big'"))


def test_pixels_that_were_scaled_are_refused(bundle, pictures):
    model, _ = bundle(image_network(3, 2), pictures)
    with pytest.raises(errors.BadInput, match="is float64, the model takes uint8"):
        model.predict({"image": pictures[0] / 255})


def test_a_bundle_runs_without_torch_and_without_delest(bundle, pictures, tmp_path):
    model, _ = bundle(image_network(3, 2), pictures)
    np.save(tmp_path / "images.npy", pictures[0])
    program = f"""
import json, sys, numpy, onnxruntime
session = onnxruntime.InferenceSession({str(model.folder / "model.onnx")!r})
images = numpy.load({str(tmp_path / "images.npy")!r})
probabilities = session.run(["probabilities"], {{"image": images}})[0]
labels = json.loads(session.get_modelmeta().custom_metadata_map["labels"])
print(json.dumps([labels[k] for k in probabilities.argmax(1)]))
assert "torch" not in sys.modules and "delest" not in sys.modules
"""
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    expected = [model.labels[k] for k in model.predict({"image": pictures[0]}).argmax(1)]
    assert json.loads(printed) == expected


def test_loading_a_bundle_imports_no_torch(bundle, pictures):
    model, _ = bundle(image_network(3, 2), pictures)
    program = f"import sys; from delest.bundle import load; load({str(model.folder)!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(("threads", "expected"), [(2, 2), (None, 0)])
def test_threads_are_those_asked_for(bundle, pictures, threads, expected):
    model, _ = bundle(image_network(3, 2), pictures)
    assert load(model.folder, threads=threads).session.get_session_options().intra_op_num_threads == expected
