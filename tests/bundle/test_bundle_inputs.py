import numpy as np
import polars as pl
import pytest
from networks import image_network, make_network, number_network, run_network, table_network
from onnx import TensorProto, helper
from PIL import Image

from delest import errors
from delest.bundle.inputs import predict_rows, read_inputs


@pytest.fixture
def picture_model(bundle, pictures):
    return bundle(image_network(3, 2), pictures)[0]


@pytest.fixture
def table_model(bundle, table):
    return bundle(table_network(3, 2), table, target="target")


def save(path, pixels):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def test_pictures_and_folders_of_them(picture_model, pictures, tmp_path):
    images = pictures[0]
    paths = [save(tmp_path / "new" / f"{place}.png", images[place]) for place in (3, 1, 2)]
    (tmp_path / "new" / "notes.txt").write_text("no picture")
    alone = save(tmp_path / "alone.PNG", images[4])
    answers = predict_rows(picture_model, [tmp_path / "new", alone])
    assert [answer["input"] for answer in answers] == [str(path) for path in (*sorted(paths), alone)]
    probabilities = picture_model.predict({"image": images[[1, 2, 3, 4]]})
    assert [answer["label"] for answer in answers] == [picture_model.labels[k] for k in probabilities.argmax(1)]
    np.testing.assert_allclose([answer["probability"] for answer in answers], probabilities.max(1), rtol=1e-6)


def test_pictures_of_another_size_are_fitted(picture_model, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 31, 3)).astype(np.uint8)
    [(names, raw)] = read_inputs(picture_model, [save(tmp_path / "large.png", pixels)])
    from delest.data.images import fit

    np.testing.assert_array_equal(raw["image"][0], fit(Image.fromarray(pixels), 8))
    assert names == [str(tmp_path / "large.png")]


def test_pictures_that_cannot_be_fitted_are_named_with_those_that_cannot_be_read(bundle, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 6, 3)).astype(np.uint8)
    model, _ = bundle(image_network(3, 2), (images, np.arange(40) % 2))
    wrong = save(tmp_path / "in" / "wrong.png", images[0, :, :5])
    cut = save(tmp_path / "in" / "cut.png", images[0])
    cut.write_bytes(cut.read_bytes()[:60])
    save(tmp_path / "in" / "good.png", images[0])
    with pytest.raises(errors.BadInput) as caught:
        predict_rows(model, [tmp_path / "in"])
    assert len(caught.value.faults) == 2
    assert f"{cut} cannot be read" in str(caught.value)
    assert f"{wrong} is 5 x 8 pixels, the model takes 6 x 8" in str(caught.value)


def test_pixels_from_array_files(picture_model, pictures, tmp_path):
    images = pictures[0]
    np.save(tmp_path / "last.npy", images)
    np.save(tmp_path / "first.npy", images.transpose(0, 3, 1, 2))
    np.savez(tmp_path / "named.npz", images=images, labels=pictures[1])
    expected = picture_model.predict({"image": images}).max(1)
    for name in ("last.npy", "first.npy", "named.npz"):
        answers = predict_rows(picture_model, [tmp_path / name])
        np.testing.assert_allclose([answer["probability"] for answer in answers], expected, rtol=1e-6)
        assert answers[39]["input"] == f"{tmp_path / name}:39"


def test_grey_pixels_need_no_channel(bundle, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8)).astype(np.uint8)
    model, _ = bundle(image_network(1, 2), (images, np.arange(40) % 2))
    np.save(tmp_path / "grey.npy", images)
    assert len(predict_rows(model, [tmp_path / "grey.npy"])) == 40


def test_arrays_by_name(bundle, tmp_path):
    inputs = {
        "left": np.ones((40, 3), np.float32) * np.arange(40, dtype=np.float32)[:, None],
        "right": np.zeros((40, 1), np.float32),
    }
    nodes = [helper.make_node("Concat", ["left", "right"], ["output"], axis=1)]
    shapes = {"left": (TensorProto.FLOAT, [3]), "right": (TensorProto.FLOAT, [1])}
    network = make_network(nodes, shapes, {"output": (TensorProto.FLOAT, [4])}, {})
    model, feed = bundle(network, (inputs, np.arange(40) % 4))
    np.savez(tmp_path / "both.npz", left=inputs["left"], right=inputs["right"][:, 0])
    expected = model.predict(next(feed.raw()).inputs)
    answers = predict_rows(model, [tmp_path / "both.npz"])
    np.testing.assert_allclose([answer["probability"] for answer in answers[:16]], expected.max(1), rtol=1e-6)
    np.savez(tmp_path / "one.npz", left=inputs["left"][:, :2], other=inputs["right"])
    with pytest.raises(errors.BadInput) as caught:
        predict_rows(model, [tmp_path / "one.npz"])
    assert "the array 'right' is missing" in str(caught.value)
    assert "rows of 2, the model takes 3" in str(caught.value)


def test_array_files_of_the_wrong_kind_are_refused_together(picture_model, pictures, tmp_path):
    np.save(tmp_path / "scaled.npy", pictures[0] / 255)
    np.save(tmp_path / "small.npy", pictures[0][:, :4])
    np.save(tmp_path / "objects.npy", np.array([{}, {}], object))
    with pytest.raises(errors.BadInput) as caught:
        predict_rows(picture_model, [tmp_path / name for name in ("scaled.npy", "small.npy", "objects.npy")])
    assert len(caught.value.faults) == 3
    assert "pixels are float64" in str(caught.value)
    assert "rows of 4x8x3, the model takes 8x8x3" in str(caught.value)


def test_a_table_is_answered_row_by_row(table_model, table, tmp_path):
    model, feed = table_model
    answers = predict_rows(model, [table])
    expected = np.concatenate([model.predict(batch.inputs) for batch in feed.raw()])
    np.testing.assert_allclose([answer["value"] for answer in answers], expected, rtol=1e-6)
    assert answers[7]["input"] == f"{table}:7"
    text = table.read_text().replace("true", "True")
    (tmp_path / "other.csv").write_text("\n".join(line.rpartition(",")[0] for line in text.splitlines()))  # no target
    assert [answer["value"] for answer in predict_rows(model, [tmp_path / "other.csv"])] == [a["value"] for a in answers]
    pl.read_csv(table).write_parquet(tmp_path / "same.parquet")
    assert [answer["value"] for answer in predict_rows(model, [tmp_path / "same.parquet"])] == [a["value"] for a in answers]


def test_codes_that_look_like_numbers_stay_text(bundle, tmp_path):
    codes = ["007", "7", "x"]
    lines = [f"{codes[i % 3]},{i},{i % 5 + 0.5}" for i in range(30)]
    path = tmp_path / "codes.csv"
    path.write_text("code,n,y\n" + "\n".join(lines))
    model, feed = bundle(table_network(1, 1), path, target="y")
    whole = np.concatenate([model.predict(batch.inputs) for batch in feed.raw()])
    (tmp_path / "few.csv").write_text(
        "code,n,y\n" + "\n".join(lines[i] for i in range(30) if i % 3 < 2)
    )  # none is plainly text
    answers = [answer["value"] for answer in predict_rows(model, [tmp_path / "few.csv"])]
    np.testing.assert_allclose(answers, [whole[i] for i in range(30) if i % 3 < 2], rtol=1e-6)


def test_all_faults_of_tables_are_reported_together(table_model, tmp_path):
    model, _ = table_model
    (tmp_path / "a.csv").write_text("price,big,\n12,true,4\ncheap,false,inf\n")
    (tmp_path / "b.csv").write_text("price,colour\n1,red\n")
    with pytest.raises(errors.BadInput) as caught:
        predict_rows(model, [tmp_path / "a.csv", tmp_path / "b.csv"])
    message = str(caught.value)
    assert len(caught.value.faults) == 4
    assert "columns missing: 'colour'" in message
    assert "row 1 has 'cheap'" in message
    assert "row 1 has 'inf'" in message
    assert "columns missing: 'big', ''" in message


def test_what_is_not_there_or_of_another_kind_is_named(picture_model, table_model, tmp_path):
    with pytest.raises(errors.BadInput, match=r"none\.png does not exist"):
        predict_rows(picture_model, [tmp_path / "none.png"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.BadInput, match="holds no images"):
        predict_rows(picture_model, [tmp_path / "empty"])
    with pytest.raises(errors.BadInput, match="another kind"):
        predict_rows(table_model[0], [tmp_path / "empty"])
    with pytest.raises(errors.BadInput, match="nothing to predict"):
        predict_rows(picture_model, [])


def test_outputs_of_another_kind_are_lists(bundle, pictures, tmp_path):
    network = image_network(3, 7)
    model, feed = bundle(network, pictures)
    np.save(tmp_path / "images.npy", pictures[0][:2])
    answers = predict_rows(model, [tmp_path / "images.npy"])
    expected = run_network(network, next(feed.ordered()).inputs)
    np.testing.assert_allclose(answers[1]["outputs"], [expected[1]], rtol=1e-4)


def test_numbers_alone(bundle, tmp_path):
    path = tmp_path / "numbers.csv"
    path.write_text("a,b,y\n" + "\n".join(f"{i},{i * 100.5},{i % 3 + 0.5}" for i in range(40)))
    model, feed = bundle(number_network(2), path, target="y")
    expected = np.concatenate([model.predict(batch.inputs) for batch in feed.raw()])
    np.testing.assert_allclose([answer["value"] for answer in predict_rows(model, [path])], expected, rtol=1e-6)


def refused(model, paths, text):
    with pytest.raises(errors.BadInput) as caught:
        predict_rows(model, paths)
    assert text in str(caught.value)


def test_files_without_rows_and_arrays_with_gaps(bundle, table, tmp_path):
    model, _ = bundle(table_network(3, 2), table, target="target")
    (tmp_path / "none.csv").write_text(table.read_text().splitlines()[0] + "\n")
    refused(model, [tmp_path / "none.csv"], "none.csv holds no rows")
    model, _ = bundle(number_network(3, 2), (np.random.default_rng(0).standard_normal((40, 3)), np.arange(40) % 2))
    np.save(tmp_path / "gaps.npy", np.array([[1, 2, 3], [1, np.nan, np.inf]]))
    refused(model, [tmp_path / "gaps.npy"], "has 2 NaN or infinite values, the first at [1, 1]")
    np.save(tmp_path / "none.npy", np.empty((0, 3)))
    refused(model, [tmp_path / "none.npy"], "none.npy holds no rows")


def test_decimal_commas_and_codes_are_read_as_in_training(bundle, tmp_path):
    lines = ["price;plz;target", *(f"{i % 7},25;0{1000 + i % 3};{i},5" for i in range(30))]
    path = tmp_path / "commas.csv"
    path.write_text("\n".join(lines))
    model, feed = bundle(table_network(1, 1), path, target="target")
    [(_, raw)] = read_inputs(model, [path])
    expected = np.concatenate([batch.inputs["price"] for batch in feed.raw()])
    np.testing.assert_array_equal(raw["price"], expected)
    assert raw["plz"].tolist() == [f"0{1000 + i % 3}" for i in range(30)]
    path.write_text("\n".join([*lines[:2], "1,2,3;01000;1"]))
    refused(model, [path], "row 1 has '1,2,3'")
