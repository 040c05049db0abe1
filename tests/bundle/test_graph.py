import json

import numpy as np
import onnx
import pytest
from networks import image_network, make_network, number_network, run_network, table_network
from onnx import TensorProto, helper
from PIL import Image

from delest.bundle.graph import assemble, head
from delest.data import fit_preprocessing, open_source
from delest.data.images import fit
from delest.data.preprocessing import Preprocessing
from delest.records.source import Column, Schema, Target


def softmax(scores):
    scores = np.exp(scores - scores.max(1, keepdims=True))
    return scores / scores.sum(1, keepdims=True)


def test_an_image_bundle_gives_the_probabilities_of_training(bundle, pictures):
    network = image_network(3, 2)
    model, feed = bundle(network, pictures)
    batch, raw = next(feed.ordered()), next(feed.raw())
    assert raw.inputs["image"].dtype == np.uint8
    np.testing.assert_allclose(model.predict(raw.inputs), softmax(run_network(network, batch.inputs)), atol=1e-6)
    assert model.description["inputs"] == [{"name": "image", "dtype": "uint8", "shape": ["batch", 8, 8, 3]}]
    assert model.description["outputs"] == [{"name": "probabilities", "dtype": "float32", "shape": ["batch", 2]}]


@pytest.mark.parametrize("size", [(50, 70), (91, 37), (20, 25), (32, 32), (33, 32), (300, 201)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_graph_resizes_like_pillow_within_one_level(size, channels):
    random = np.random.default_rng(1)
    pixels = random.integers(0, 256, (2, *size, channels)).astype(np.uint8)
    column = Column(name="image", kind="image", shape=(32, 32, channels), dtype="uint8")
    preprocessing = Preprocessing(
        schema=Schema(inputs=(column,)), mean={"image": (0.0,) * channels}, std={"image": (1.0,) * channels}, image_size=32
    )
    same = helper.make_node("Identity", ["x"], ["output"])
    shape = (TensorProto.FLOAT, [channels, 32, 32])
    model = assemble(make_network([same], {"x": shape}, {"output": shape}, {}), preprocessing)
    resized = run_network(model, {"image": pixels}).transpose(0, 2, 3, 1)
    pillow = [fit(Image.fromarray(row if channels == 3 else row[..., 0]), 32) for row in pixels]
    assert np.abs(resized - np.stack(pillow)).max() <= 1


def test_a_table_bundle_takes_one_raw_input_a_column(bundle, table):
    network = table_network(3, 2)  # price, its indicator, the unnamed column; colour, big
    model, feed = bundle(network, table, target="target")
    names = [(entry["name"], entry["dtype"]) for entry in model.description["inputs"]]
    assert names == [("price", "float64"), ("colour", "string"), ("big", "string"), ("column", "float64")]
    for batch, raw in zip(feed.ordered(), feed.raw(), strict=True):
        assert np.isnan(raw.inputs["price"]).any()
        expected = feed.preprocessing.restore(run_network(network, batch.inputs))
        np.testing.assert_allclose(model.predict(raw.inputs), expected, rtol=1e-5)


def test_unknown_categories_are_code_0(bundle, table):
    network = table_network(3, 2)
    model, feed = bundle(network, table, target="target")
    raw = next(feed.raw()).inputs
    unseen = {**raw, "colour": np.array(["violet"] * 16, object)}
    missing = {**raw, "colour": np.array([""] * 16, object)}
    np.testing.assert_array_equal(model.predict(unseen), model.predict(missing))
    assert not np.array_equal(model.predict(unseen), model.predict(raw))


def test_number_columns_alone_are_one_input_of_the_network(bundle, tmp_path):
    path = tmp_path / "numbers.csv"
    path.write_text("a,b,y\n" + "\n".join(f"{i},{i * 100.5},{i % 3 + 0.5}" for i in range(40)))
    model, feed = bundle(number_network(2), path, target="y")
    batch, raw = next(feed.ordered()), next(feed.raw())
    expected = feed.preprocessing.restore(run_network(number_network(2), batch.inputs))
    np.testing.assert_allclose(model.predict(raw.inputs), expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "uint8", "int64"])
def test_arrays_are_standardised_unless_they_are_ids(bundle, dtype):
    random = np.random.default_rng(0)
    x = random.integers(0, 200, (40, 6)).astype(dtype)
    shape = (TensorProto.INT64 if dtype == "int64" else TensorProto.FLOAT, [6])
    nodes = [
        helper.make_node("Cast", ["x"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["floats", "w"], ["output"]),
    ]
    weights = {"w": np.linspace(-1, 1, 18, dtype=np.float32).reshape(6, 3) / 100}
    network = make_network(nodes, {"x": shape}, {"output": (TensorProto.FLOAT, [3])}, weights)
    model, feed = bundle(network, (x, np.arange(40) % 3))
    batch, raw = next(feed.ordered()), next(feed.raw())
    assert raw.inputs["x"].dtype == dtype
    np.testing.assert_allclose(model.predict(raw.inputs), softmax(run_network(network, batch.inputs)), atol=1e-6)


def test_several_arrays_keep_their_names(bundle):
    random = np.random.default_rng(0)
    inputs = {
        "left": random.normal(size=(40, 3)).astype(np.float32),
        "right": random.normal(size=(40, 2, 4)).astype(np.float32),
    }
    nodes = [
        helper.make_node("ReduceMean", ["right", "axes"], ["mean"], keepdims=0),
        helper.make_node("Concat", ["left", "mean"], ["output"], axis=1),
    ]
    shapes = {"left": (TensorProto.FLOAT, [3]), "right": (TensorProto.FLOAT, [2, 4])}
    network = make_network(nodes, shapes, {"output": (TensorProto.FLOAT, [5])}, {"axes": np.array([2])})
    model, feed = bundle(network, (inputs, np.arange(40) % 5))
    batch, raw = next(feed.ordered()), next(feed.raw())
    np.testing.assert_allclose(model.predict(raw.inputs), softmax(run_network(network, batch.inputs)), atol=1e-6)


def classes(*names):
    column = Column(name="image", kind="image", shape=(8, 8, 3), dtype="uint8")
    return Schema(inputs=(column,), target=Target(name="label", kind="class", classes=names))


@pytest.mark.parametrize(
    ("network", "names", "expected"),
    [
        (image_network(3, 4), "abcd", "softmax"),
        (image_network(3, 4, "Softmax"), "abcd", "probabilities"),
        (image_network(3, 1), "ab", "sigmoid"),
        (image_network(3, 1, "Sigmoid"), "ab", "none"),
        (image_network(3, 7), "abcd", "none"),
    ],
)
def test_the_head_follows_target_and_outputs(network, names, expected):
    assert head(network, classes(*names)) == expected


def test_a_single_logit_becomes_two_probabilities(bundle, pictures):
    network = image_network(3, 1)
    model, feed = bundle(network, pictures)
    batch, raw = next(feed.ordered()), next(feed.raw())
    second = 1 / (1 + np.exp(-run_network(network, batch.inputs)))
    np.testing.assert_allclose(model.predict(raw.inputs), np.concatenate([1 - second, second], 1), atol=1e-6)


def test_labels_and_version_travel_in_the_file(bundle, pictures):
    model, _ = bundle(image_network(3, 2), pictures)
    facts = {entry.key: entry.value for entry in onnx.load(model.folder / "model.onnx").metadata_props}
    assert json.loads(facts["labels"]) == ["0", "1"]
    assert facts["delest"]


def test_an_output_never_takes_the_name_of_a_column(bundle, tmp_path):
    path = tmp_path / "numbers.csv"
    path.write_text("value,b,y\n" + "\n".join(f"{i},{i * 100.5},{i % 3 + 0.5}" for i in range(40)))
    model, feed = bundle(number_network(2), path, target="y")
    assert [entry["name"] for entry in model.description["outputs"]] == ["value_"]
    assert model.predict(next(feed.raw()).inputs).shape == (16,)


def test_outputs_of_another_kind_are_left_alone(bundle, pictures):
    network = image_network(3, 7)
    model, feed = bundle(network, pictures)
    batch, raw = next(feed.ordered()), next(feed.raw())
    np.testing.assert_allclose(model.predict(raw.inputs), run_network(network, batch.inputs), atol=1e-6)


def test_varying_sizes_are_taken_as_they_are(bundle, tmp_path):
    random = np.random.default_rng(0)
    for place in range(12):
        folder = tmp_path / "pictures" / "ab"[place % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (20 + place, 30 - place, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{place}.png")
    model, feed = bundle(image_network(3, 2), tmp_path / "pictures")
    assert model.description["inputs"][0]["shape"] == ["batch", "height", "width", 3]
    source = open_source(tmp_path / "pictures")
    rows = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "pictures").rglob("*.png"))]
    fitted = source.read(np.arange(len(source)))["image"]
    for picture in rows:
        expected = model.predict({"image": fit(Image.fromarray(picture), source.image_size)[None]})
        np.testing.assert_allclose(model.predict({"image": picture[None]}), expected, atol=5e-3)
    assert fitted.shape[1:3] == (source.image_size, source.image_size)


def test_a_tuple_of_arrays_is_named_by_place(bundle):
    random = np.random.default_rng(0)
    inputs = random.normal(size=(40, 3)).astype(np.float32), random.normal(size=(40, 2)).astype(np.float32)
    shapes = {"x0": (TensorProto.FLOAT, [3]), "x1": (TensorProto.FLOAT, [2])}
    nodes = [helper.make_node("Concat", ["x0", "x1"], ["output"], axis=1)]
    network = make_network(nodes, shapes, {"output": (TensorProto.FLOAT, [5])}, {})
    model, feed = bundle(network, (inputs, np.arange(40) % 5))
    batch, raw = next(feed.ordered()), next(feed.raw())
    np.testing.assert_allclose(model.predict(raw.inputs), softmax(np.concatenate(batch.inputs, axis=1)), atol=1e-6)


def test_large_offsets_keep_their_resolution(bundle):
    seconds = 1.7e9 + np.random.default_rng(0).integers(0, 500, 40)
    table = {"seconds": seconds, "other": np.ones(40), "target": seconds - 1.7e9 + 0.5}
    model, feed = bundle(number_network(2), table, target="target")
    batch, raw = next(feed.ordered()), next(feed.raw())
    expected = feed.preprocessing.restore(run_network(number_network(2), batch.inputs))
    np.testing.assert_allclose(model.predict(raw.inputs), expected, rtol=1e-5)
    assert abs(np.diff(batch.inputs[:, 0])).min() * feed.preprocessing.std["seconds"][0] == pytest.approx(
        abs(np.diff(seconds[batch.index])).min(), abs=0.01
    )


def test_whole_numbers_that_are_no_ids_are_standardised():
    values = np.random.default_rng(0).integers(0, 9, (40, 3)) + (1 << 40)
    source = open_source((values, np.arange(40) / 7))
    preprocessing = fit_preprocessing(source, np.arange(40), ids=False)
    model = assemble(number_network(3), preprocessing)
    standardised = preprocessing.inputs(source.read(np.arange(40)))
    expected = preprocessing.restore(run_network(number_network(3), standardised))
    np.testing.assert_allclose(run_network(model, {"x": values}), expected, rtol=1e-4)
