"""Pictures in folders and Parquet: what is read, how it is fitted and packed, and damaged files."""

import io
import json

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from delest import errors, storage
from delest.data import images, open_source, packing
from delest.data.images import Decoding, decode, fit, fit_pixels
from delest.data.stored import PackedFile

RNG = np.random.default_rng(2)


def picture(width=8, height=6, mode="RGB"):
    """Smooth, so that JPEG changes little."""
    shape = (height, width, len(mode)) if len(mode) > 1 else (height, width)
    base = np.linspace(0, 200, height * width).reshape(height, width, *[1] * (len(mode) > 1))
    return Image.fromarray(
        (np.broadcast_to(base, shape) + RNG.integers(0, 50)).astype(np.uint8), mode if mode == "RGBA" else None
    )


def encoded(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def folder_of(root, classes=("cat", "dog"), each=6, make=picture, suffix=".png"):
    for label in classes:
        (root / label).mkdir(parents=True, exist_ok=True)
        for number in range(each):
            make().save(root / label / f"{number}{suffix}")
    return root


def parquet_of(path, rows=10, *, metadata=None, make=picture, plain=False, **columns):
    data = [encoded(make()) for _ in range(rows)]
    column = pa.array(data, pa.binary()) if plain else pa.array([{"bytes": item, "path": None} for item in data])
    table = pa.table({"img": column, "label": pa.array(np.arange(rows) % 2), **columns})
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=4)
    return path


def all_rows(source):
    return source.read(np.arange(len(source)))


def bad(data, *texts, **wishes):
    with pytest.raises(errors.BadInput) as caught:
        open_source(data, **wishes)
    for text in texts:
        assert text in str(caught.value)
    return caught.value


def test_a_folder_a_class(tmp_path):
    source = open_source(folder_of(tmp_path / "pets"))
    assert source.description == "12 images of 6x8x3 in pets"
    assert source.schema.classes == ("cat", "dog")
    assert source.image_size is None
    rows = source.read(np.array([11, 0, 5]))
    assert rows["label"].tolist() == [1, 0, 0]
    expected = np.asarray(Image.open(tmp_path / "pets" / "dog" / "5.png"))
    np.testing.assert_array_equal(rows["image"][0], expected)


def test_upper_case_jpegs_below_sub_folders(tmp_path):
    folder_of(tmp_path / "pets", suffix=".JPG")
    (tmp_path / "pets" / "cat" / "more").mkdir()
    picture().save(tmp_path / "pets" / "cat" / "more" / "x.jpeg")
    (tmp_path / "pets" / "cat" / "notes.txt").write_text("no picture")
    assert len(open_source(tmp_path / "pets")) == 13


def test_folders_of_roles(tmp_path):
    for role in ("train", "val", "test"):
        folder_of(tmp_path / role, each=3)
    source = open_source(tmp_path)
    assert source.roles().tolist() == ["train"] * 6 + ["validation"] * 6 + ["test"] * 6
    assert source.schema.classes == ("cat", "dog")


def test_grey_and_mixed_modes(tmp_path):
    grey = open_source(folder_of(tmp_path / "grey", make=lambda: picture(mode="L")))
    assert grey.schema.inputs[0].shape == (6, 8, 1)
    folder_of(tmp_path / "mixed", make=lambda: picture(mode="L"))
    picture(mode="RGBA").save(tmp_path / "mixed" / "cat" / "clear.png")
    picture().quantize(16).save(tmp_path / "mixed" / "cat" / "palette.png")
    mixed = open_source(tmp_path / "mixed")
    assert mixed.schema.inputs[0].shape == (6, 8, 3)
    assert len(mixed) == 14


def test_sixteen_bits_become_eight(tmp_path):
    Image.fromarray(np.array([[0, 257, 65535]], np.uint16)).save(tmp_path / "deep.png")
    assert fit(decode(tmp_path / "deep.png", 1), None)[0, :, 0].tolist() == [0, 1, 255]


def test_photographs_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        picture(16, 8).save(tmp_path / label / "lying.jpg", exif=exif)
    source = open_source(tmp_path)
    assert source.schema.inputs[0].shape == (16, 8, 3)
    rows = all_rows(source)["image"][0].astype(int)
    assert (np.diff(rows[:, :, 0], axis=1) < 0).mean() > 0.9  # what was top is now right


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize(("width", "height"), [(20, 13), (13, 20), (7, 7), (3, 40)])
def test_fit_is_pillows_resize_and_a_centre_crop(mode, width, height):
    image = Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)
    got = fit(image, 6)
    scale = 6 / min(width, height)
    wide, high = int(width * scale + 0.5), int(height * scale + 0.5)
    resized = np.asarray(image.resize((wide, high), Image.Resampling.BILINEAR)).reshape(high, wide, -1)
    top, left = (high - 6) // 2, (wide - 6) // 2
    np.testing.assert_array_equal(got, resized[top : top + 6, left : left + 6])
    assert got.shape == (6, 6, 3 if mode == "RGB" else 1)
    assert fit(image, None).shape[:2] == (height, width)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_fit_of_pixels(channels):
    pixels = RNG.integers(0, 256, (3, 9, 12, channels), dtype=np.uint8)
    got = fit_pixels(pixels, 5)
    assert got.shape == (3, 5, 5, channels)
    one = fit(Image.fromarray(pixels[1, ..., 0]), 5)
    if channels != 3:
        np.testing.assert_array_equal(got[1, ..., 0], one[..., 0])
    else:
        np.testing.assert_array_equal(got[1], fit(Image.fromarray(pixels[1]), 5))
    assert fit_pixels(pixels[:0], 5).shape == (0, 5, 5, channels)


def test_sizes_that_differ_take_the_median(tmp_path):
    folder_of(tmp_path, make=lambda: picture(8, 6))
    picture(30, 40).save(tmp_path / "cat" / "large.png")
    source = open_source(tmp_path)
    assert source.image_size == 6
    assert source.schema.inputs[0].shape == (6, 6, 3)
    large = list((tmp_path / "cat").iterdir())
    place = sorted(path.name for path in large).index("large.png")
    np.testing.assert_array_equal(source.read(np.array([place]))["image"][0], fit(decode(tmp_path / "cat" / "large.png", 3), 6))


def test_a_given_size(tmp_path):
    source = open_source(folder_of(tmp_path), image_size=4)
    assert source.image_size == 4
    assert source.schema.inputs[0].shape == (4, 4, 3)


def test_the_default_side_is_at_most_224(tmp_path):
    folder_of(tmp_path, make=lambda: picture(300, 290), each=2)
    picture(300, 299).save(tmp_path / "cat" / "x.png")
    assert open_source(tmp_path).image_size == 224


def test_a_pack_is_read_again_without_decoding(tmp_path, monkeypatch):
    folder_of(tmp_path)
    first = open_source(tmp_path)
    assert isinstance(first.stores["image"], PackedFile)
    monkeypatch.setattr(images, "_pack", None)
    again = open_source(tmp_path)
    np.testing.assert_array_equal(all_rows(again)["image"], all_rows(first)["image"])
    assert again.fingerprint == first.fingerprint


def test_a_pack_that_was_cut_is_made_again(tmp_path, own_cache):
    folder_of(tmp_path)
    expected = all_rows(open_source(tmp_path))["image"]
    pack = next((own_cache / "packed").glob("*.bin"))
    pack.write_bytes(pack.read_bytes()[:-1])
    np.testing.assert_array_equal(all_rows(open_source(tmp_path))["image"], expected)


def test_changed_pictures_make_a_new_pack(tmp_path):
    folder_of(tmp_path)
    first = open_source(tmp_path)
    Image.new("RGB", (8, 6), "red").save(tmp_path / "cat" / "0.png")
    second = open_source(tmp_path)
    assert first.fingerprint != second.fingerprint
    assert second.read(np.array([0]))["image"][0, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_without_room_pictures_are_decoded_when_read(tmp_path, monkeypatch, kind, own_cache):
    data = folder_of(tmp_path / "pets") if kind == "folder" else parquet_of(tmp_path / "d.parquet", 12)
    packed = open_source(data)
    monkeypatch.setattr(packing, "LARGEST_PACK_BYTES", 100)
    for path in (own_cache / "packed").iterdir():
        path.unlink()
    source = open_source(data)
    assert isinstance(source.stores["image"], Decoding)
    assert source.decodes
    assert not packed.decodes
    index = RNG.permutation(12)
    np.testing.assert_array_equal(source.read(index)["image"], packed.read(index)["image"])
    assert not list((own_cache / "packed").glob("*.bin"))
    if kind == "folder":
        (tmp_path / "pets" / "cat" / "3.png").write_bytes(b"gone")
        with pytest.raises(errors.BadInput, match=r"3\.png cannot be read"):
            source.read(np.arange(12))


def test_without_room_bad_pictures_are_known_before_rows_are_numbered(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "LARGEST_PACK_BYTES", 100)
    damaged(tmp_path)
    source = open_source(tmp_path, skip_bad=True)
    assert len(source) == 10
    assert all_rows(source)["image"].shape == (10, 6, 8, 3)


def damaged(root):
    folder_of(root, suffix=".jpg")
    whole = (root / "cat" / "2.jpg").read_bytes()
    (root / "cat" / "2.jpg").write_bytes(whole[: len(whole) - 40])
    (root / "dog" / "1.jpg").write_bytes(b"not a picture")
    return root


def test_damaged_pictures_are_named_together(tmp_path):
    fault = bad(damaged(tmp_path), "cat/2.jpg: it is damaged or cut off", "dog/1.jpg: it is no picture", "--skip-bad")
    assert len(fault.faults) == 2


def test_damaged_pictures_can_be_left_out(tmp_path):
    source = open_source(damaged(tmp_path), skip_bad=True)
    assert len(source) == 10
    assert np.bincount(source.values("label")).tolist() == [5, 5]
    assert ["2.jpg" in source.left_out[0], "1.jpg" in source.left_out[1]] == [True, True]
    kept = [
        name for label in ("cat", "dog") for name in sorted((tmp_path / label).iterdir()) if name.name not in ("2.jpg", "1.jpg")
    ]
    assert len(kept) == 8
    np.testing.assert_array_equal(source.read(np.array([2]))["image"][0], fit(decode(tmp_path / "cat" / "3.jpg", 3), None))
    again = open_source(tmp_path, skip_bad=True)
    assert again.left_out == source.left_out
    bad(tmp_path, "2.jpg", "1.jpg")


def test_many_damaged_pictures_are_counted(tmp_path):
    folder_of(tmp_path, each=8)
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"x")
    fault = bad(tmp_path, "and 6 more")
    assert len(fault.faults) == 11
    bad(tmp_path, "and 6 more", skip_bad=True)


def test_a_full_disk_is_not_a_damaged_picture(tmp_path, monkeypatch):
    folder_of(tmp_path)

    def full(self, data):
        raise OSError(28, "No space left on device")

    class File(io.BytesIO):
        write = full

        def fileno(self):
            return 0

    monkeypatch.setattr(storage, "open", lambda *_: File(), raising=False)
    with pytest.raises(errors.DiskFull):
        open_source(tmp_path)


def test_folders_without_pictures(tmp_path):
    bad(tmp_path, "is an empty folder")
    (tmp_path / "notes.txt").write_text("x")
    bad(tmp_path, "holds no pictures")
    picture().save(tmp_path / "a.png")
    bad(tmp_path, "a folder for each class")
    folder_of(tmp_path, ("cat",))
    bad(tmp_path, "a single class folder with pictures, 'cat'")
    folder_of(tmp_path, ("dog",))
    (tmp_path / "empty").mkdir()
    source = open_source(tmp_path)
    assert ["no pictures in it" in source.left_out[0], "lie in no class folder" in source.left_out[1]] == [True, True]


HUB = {"huggingface": json.dumps({"info": {"features": {"label": {"names": ["plane", "car", "bird"], "_type": "ClassLabel"}}}})}


def test_parquet_as_the_hub_has_it(tmp_path):
    parquet_of(tmp_path / "d.parquet", metadata=HUB)
    source = open_source(tmp_path / "d.parquet")
    assert source.schema.classes == ("plane", "car", "bird")
    assert source.description == "10 images of 6x8x3 in d.parquet"
    stored = pl.read_parquet(tmp_path / "d.parquet")["img"][7]["bytes"]
    np.testing.assert_array_equal(source.read(np.array([7]))["image"][0], fit(decode(stored, 3), None))


def test_parquet_files_of_roles_and_plain_bytes(tmp_path):
    (tmp_path / "data").mkdir()
    parquet_of(tmp_path / "data" / "train-00000-of-00002.parquet", 6, plain=True)
    parquet_of(tmp_path / "data" / "train-00001-of-00002.parquet", 5, plain=True)
    parquet_of(tmp_path / "data" / "validation-00000-of-00001.parquet", 4, plain=True)
    source = open_source(tmp_path)
    assert source.roles().tolist() == ["train"] * 11 + ["validation"] * 4
    assert source.schema.classes == ("0", "1")
    assert source.values("label").tolist() == [0, 1] * 3 + [0, 1, 0, 1, 0] + [0, 1] * 2


def test_parquet_samples_pack_only_their_rows(tmp_path, own_cache):
    parquet_of(tmp_path / "d.parquet", 20)
    whole = open_source(tmp_path / "d.parquet")
    source = open_source(tmp_path / "d.parquet", rows=6)
    assert len(source) == 6
    assert np.bincount(source.values("label")).tolist() == [3, 3]
    assert sorted(path.stat().st_size for path in (own_cache / "packed").glob("*.bin")) == [6 * 144, 20 * 144]
    every = all_rows(whole)["image"].reshape(20, -1)
    assert all(any((row == other).all() for other in every) for row in all_rows(source)["image"].reshape(6, -1))


def test_parquet_with_other_columns(tmp_path):
    who = pa.array(["p1", "p2"] * 5)
    parquet_of(tmp_path / "d.parquet", who=who, fine=pa.array(np.arange(10) % 3))
    source = open_source(tmp_path / "d.parquet", target="fine", split_by="who")
    assert source.schema.classes == ("0", "1", "2")
    assert source.values("who").tolist() == ["p1", "p2"] * 5
    assert source.left_out == ("column 'label': pictures are the input",)


def test_parquet_that_is_wrong(tmp_path):
    parquet_of(tmp_path / "d.parquet")
    bad(tmp_path / "d.parquet", "unknown target 'lable'", "'label'", target="lable")
    bad(tmp_path / "d.parquet", "unknown column to split by 'who'", split_by="who")
    gaps = pa.table({"img": pq.read_table(tmp_path / "d.parquet")["img"], "label": pa.array([0, 1, None, *[0] * 7])})
    pq.write_table(gaps, tmp_path / "gaps.parquet")
    bad(tmp_path / "gaps.parquet", "1 missing or infinite value, the first in row 2")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "d.parquet").read_bytes()[:90])
    bad(tmp_path / "cut.parquet", "no readable Parquet file")
    away = pa.table({"img": pa.array([{"bytes": None, "path": "a.png"}] * 4), "label": pa.array([0, 1, 0, 1])})
    pq.write_table(away, tmp_path / "away.parquet")
    bad(tmp_path / "away.parquet", "away.parquet, row 0: it is no picture")


def test_parquet_classes_beyond_the_names(tmp_path):
    fine = pa.array([5, *[0] * 9])
    parquet_of(tmp_path / "d.parquet", metadata={"huggingface": HUB["huggingface"].replace("label", "fine")}, fine=fine)
    bad(tmp_path / "d.parquet", "holds 0 to 5, but the file names 3 classes", target="fine")
