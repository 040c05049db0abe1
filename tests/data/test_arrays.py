"""Arrays in memory, `.npz` and `.npy`: what they become, and each way in which they can be wrong."""

import numpy as np
import pytest

from delest import errors
from delest.data import arrays, open_source
from delest.data.stored import PackedFile
from delest.records.source import Target

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (20, 6, 5), dtype=np.uint8)
LABELS = np.arange(20) % 4


def all_rows(source):
    return source.read(np.arange(len(source)))


def test_npz_with_the_usual_names(tmp_path):
    np.savez(tmp_path / "digits.npz", images=IMAGES, labels=LABELS.astype(np.uint8))
    source = open_source(tmp_path / "digits.npz")
    assert source.description == "20 images of 6x5x1 in digits.npz"
    assert source.schema.is_image
    assert source.schema.input_shape == (1, 6, 5)
    assert source.schema.classes == ("0", "1", "2", "3")
    rows = source.read(np.array([7, 3]))
    np.testing.assert_array_equal(rows["image"][..., 0], IMAGES[[7, 3]])
    assert rows["labels"].tolist() == [3, 3]
    assert rows["labels"].dtype == np.int64


def test_npz_fingerprint_is_of_the_content(tmp_path):
    for name, images in (("a", IMAGES), ("b", IMAGES), ("c", 255 - IMAGES)):
        np.savez(tmp_path / f"{name}.npz", images=images, labels=LABELS)
    a, b, c = (open_source(tmp_path / f"{name}.npz").fingerprint for name in "abc")
    assert a == b != c


def test_npz_target_by_name(tmp_path):
    np.savez(tmp_path / "d.npz", images=IMAGES, fine=LABELS, coarse=LABELS // 2)
    source = open_source(tmp_path / "d.npz", target="coarse")
    assert source.schema.target.name == "coarse"
    assert source.schema.classes == ("0", "1")
    assert any("'fine'" in text for text in source.left_out)


def test_npz_roles_in_names(tmp_path):
    np.savez(tmp_path / "d.npz", x_train=IMAGES[:12], y_train=LABELS[:12], x_test=IMAGES[12:], y_test=LABELS[12:])
    source = open_source(tmp_path / "d.npz")
    assert source.roles().tolist() == ["train"] * 12 + ["test"] * 8
    np.testing.assert_array_equal(source.read(np.array([13, 2]))["image"][..., 0], IMAGES[[13, 2]])
    np.testing.assert_array_equal(source.values("y"), LABELS)


def test_npz_roles_first_and_val(tmp_path):
    parts = {"train": slice(0, 10), "val": slice(10, 16), "test": slice(16, 20)}
    named = {
        f"{role}_{name}": array[rows]
        for role, rows in parts.items()
        for name, array in (("images", IMAGES), ("labels", LABELS))
    }
    np.savez(tmp_path / "d.npz", **named)
    source = open_source(tmp_path / "d.npz")
    assert np.unique(source.roles(), return_counts=True)[1].tolist() == [4, 10, 6]


def test_large_npz_members_are_not_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "_HELD_BYTES", 100)
    np.savez_compressed(tmp_path / "d.npz", x=IMAGES.astype(np.float32), y=LABELS)
    source = open_source(tmp_path / "d.npz")
    assert isinstance(source.stores["x"], PackedFile)
    np.testing.assert_array_equal(all_rows(source)["x"], IMAGES)


def test_npy_pair_is_read_from_the_file(tmp_path):
    values = RNG.standard_normal((20, 3)).astype(np.float32)
    np.save(tmp_path / "X.npy", values)
    np.save(tmp_path / "y.npy", LABELS)
    for path in (tmp_path / "X.npy", tmp_path):
        source = open_source(path)
        assert isinstance(source.stores["X"], PackedFile)
        index = RNG.permutation(20)
        np.testing.assert_array_equal(source.read(index)["X"], values[index])
        np.testing.assert_array_equal(source.read(index)["y"], LABELS[index])


def test_npy_in_fortran_order(tmp_path):
    values = np.asfortranarray(RNG.standard_normal((20, 3)))
    np.save(tmp_path / "X.npy", values)
    np.save(tmp_path / "y.npy", LABELS)
    np.testing.assert_array_equal(all_rows(open_source(tmp_path))["X"], values.astype(np.float32))


@pytest.mark.parametrize(
    ("array", "kind", "shape"),
    [
        (IMAGES, "image", (6, 5, 1)),
        (np.zeros((20, 6, 5, 3), np.uint8), "image", (6, 5, 3)),
        (np.zeros((20, 3, 6, 5), np.uint8), "image", (6, 5, 3)),
        (np.zeros((20, 6, 5, 4), np.uint8), "image", (6, 5, 4)),
        (np.zeros((20, 6, 5, 7), np.uint8), "array", (6, 5, 7)),
        (np.zeros((20, 6), np.uint8), "array", (6,)),
        (np.zeros((20, 6)), "array", (6,)),
        (np.zeros(20), "array", (1,)),
    ],
)
def test_what_arrays_become(array, kind, shape):
    column = open_source((array, LABELS)).schema.inputs[0]
    assert (column.kind, column.shape) == (kind, shape)


def test_channels_first_images_are_turned():
    images = RNG.integers(0, 256, (20, 3, 6, 5), dtype=np.uint8)
    np.testing.assert_array_equal(all_rows(open_source((images, LABELS)))["image"], images.transpose(0, 2, 3, 1))


def test_types_of_arrays():
    source = open_source(({"ids": LABELS.astype(np.int32)[:, None], "on": LABELS[:, None] > 1, "x": np.ones((20, 2))}, LABELS))
    rows = all_rows(source)
    assert [rows[name].dtype for name in ("ids", "on", "x")] == [np.int64, np.float32, np.float32]
    assert [column.dtype for column in source.schema.inputs] == ["int64", "float32", "float32"]


def test_images_beside_other_inputs_put_channels_first():
    source = open_source(({"photo": np.zeros((20, 6, 5, 3), np.uint8), "x": np.ones((20, 2))}, LABELS))
    assert source.schema.inputs[0].shape == (3, 6, 5)
    assert all_rows(source)["photo"].shape == (20, 3, 6, 5)


def test_several_inputs_as_a_tuple():
    source = open_source(((np.ones((20, 2)), np.ones((20, 3))), LABELS))
    assert [column.name for column in source.schema.inputs] == ["x0", "x1"]


def test_mapping_of_columns_is_a_table():
    source = open_source({"age": np.arange(20.0), "town": np.array(["a", "b"] * 10), "bought": LABELS > 1}, target="bought")
    assert source.schema.is_table
    assert source.schema.classes == ("false", "true")


def test_no_target():
    source = open_source(np.ones((20, 4), np.int64))
    assert source.schema.target is None
    assert list(all_rows(source)) == ["x"]


def test_image_size_of_arrays():
    source = open_source((IMAGES, LABELS), image_size=4)
    assert source.image_size == 4
    assert all_rows(source)["image"].shape == (20, 4, 4, 1)
    assert open_source((IMAGES[:, :5], LABELS), image_size=5).image_size is None


def test_labels_as_text_and_with_gaps_between_numbers():
    assert open_source((IMAGES, np.array(["dog", "cat"] * 10))).schema.classes == ("cat", "dog")
    source = open_source((IMAGES, np.where(LABELS == 3, -1, LABELS * 10)))
    assert source.schema.classes == ("-1", "0", "10", "20")
    assert source.values("target").tolist()[:4] == [1, 2, 3, 0]


def test_float_and_many_valued_targets_are_numbers():
    assert open_source((IMAGES, LABELS / 2)).schema.target.kind == "number"
    x = np.zeros((60, 2))
    assert open_source((x, np.arange(60))).schema.target.kind == "number"
    assert open_source((x, np.arange(60) % 50)).schema.target.kind == "class"
    column = open_source((x, np.arange(60.0)[:, None]))
    assert column.values("target").shape == (60,)


def test_a_sample_of_rows_keeps_the_classes(tmp_path):
    labels = np.repeat([0, 1], [75, 25])
    source = open_source((np.arange(200.0).reshape(100, 2), labels), rows=20)
    assert len(source) == 20
    assert np.bincount(source.values("target")).tolist() == [15, 5]
    rows = source.read(np.arange(20))
    assert ((rows["x"][:, 0] // 2 >= 75) == (rows["target"] == 1)).all()
    assert source.fingerprint != open_source((np.arange(200.0).reshape(100, 2), labels), rows=20, seed=1).fingerprint


def test_a_source_is_taken_as_it_is():
    source = open_source((IMAGES, LABELS))
    assert open_source(source) is source
    assert len(open_source(source, rows=8)) == 8


def bad(data, *texts, **wishes):
    with pytest.raises(errors.BadInput) as caught:
        open_source(data, **wishes)
    for text in texts:
        assert text in str(caught.value)
    return caught.value


def test_lengths_that_differ_and_values_that_are_not_finite_are_named_together():
    values = np.ones((20, 3))
    values[4, 1], values[9, 0] = np.nan, np.inf
    fault = bad((values, LABELS[:19]), "differ in length: x 20, target 19", "2 NaN or infinite values, the first at [4, 1]")
    assert len(fault.faults) == 2


def test_labels_with_gaps():
    bad((IMAGES, np.where(LABELS == 2, np.nan, 1.0)), "5 missing or infinite values, the first in row 2")


def test_a_single_class():
    bad((IMAGES, LABELS * 0), "a single class, '0'")


def test_no_rows():
    bad((np.empty((0, 3)), np.empty(0)), "'x' has 0 rows", "'target' has 0 rows")


def test_targets_of_several_values_are_arrays_as_they_are():
    boxes = RNG.normal(size=(20, 3, 5))
    source = open_source((IMAGES, boxes))
    assert source.schema.target == Target(name="target", kind="array", shape=(3, 5))
    given = all_rows(source)["target"]
    assert given.dtype == np.float32
    np.testing.assert_array_equal(given, boxes.astype(np.float32))
    assert all_rows(open_source((IMAGES, np.eye(4, dtype=bool)[LABELS])))["target"].dtype == np.int64
    boxes[[4, 4, 7], 0, [0, 1, 2]] = np.nan
    bad((IMAGES, boxes), "2 missing or infinite values, the first in row 4")
    bad((IMAGES, np.array([["a", "b"]] * 20)), "shape 20x2", "it must hold numbers")


def test_ragged_and_scalar_inputs():
    bad(([[1, 2], [3]], [0, 1]), "'x' cannot be made an array")
    bad((3.0, LABELS), "'x' is float, not an array of rows")


def test_text_inputs():
    bad((np.array([["a", "b"]] * 20), LABELS), "'x' has type <U1; inputs must be numbers")


def test_pickled_objects_are_refused(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.array([{}, []], object), y=np.array([None, 1], object))
    fault = bad(tmp_path / "d.npz", "'x' cannot be used: it holds Python objects, which are never unpickled")
    assert len(fault.faults) == 2
    np.save(tmp_path / "X.npy", np.array([{}, []], object))
    bad(tmp_path / "X.npy", "never unpickled")


def test_a_damaged_npz(tmp_path):
    np.savez(tmp_path / "d.npz", x=IMAGES, y=LABELS)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "d.npz").read_bytes()[:500])
    bad(tmp_path / "cut.npz", "no readable .npz")
    np.savez(tmp_path / "none.npz")
    bad(tmp_path / "none.npz", "holds no arrays")


def test_a_cut_npy(tmp_path):
    np.save(tmp_path / "X.npy", IMAGES)
    (tmp_path / "X.npy").write_bytes((tmp_path / "X.npy").read_bytes()[:-7])
    bad(tmp_path / "X.npy", "it was cut")
    (tmp_path / "X.npy").write_bytes(b"no numbers")
    bad(tmp_path / "X.npy", "cannot be used")


def test_names_that_are_not_there(tmp_path):
    np.savez(tmp_path / "d.npz", images=IMAGES, labels=LABELS)
    bad(tmp_path / "d.npz", "unknown target 'lables'", "Did you mean 'labels'?", target="lables")
    bad(tmp_path / "d.npz", "unknown column to split by 'role'", split_by="role")
    np.savez(tmp_path / "e.npz", images=IMAGES, what=LABELS)
    bad(tmp_path / "e.npz", "images, what", "--target")
    np.savez(tmp_path / "f.npz", labels=LABELS)
    bad(tmp_path / "f.npz", "there is no input")


def test_roles_that_do_not_fit_together(tmp_path):
    np.savez(tmp_path / "d.npz", x_train=IMAGES, y_train=LABELS, x_test=IMAGES)
    bad(tmp_path / "d.npz", "'y' for train and none for test")
    np.savez(tmp_path / "e.npz", x_train=IMAGES, y_train=LABELS, x_test=IMAGES[:, :3], y_test=LABELS[:7])
    bad(tmp_path / "e.npz", "(3, 5) in test, (6, 5) in train", "x 20, y 7")


def test_what_is_no_data(tmp_path):
    bad(7, "data is a int")
    bad(tmp_path / "nothing.npz", "does not exist")
    (tmp_path / "notes.doc").write_text("hello")
    bad(tmp_path / "notes.doc", "no kind that can be opened")
