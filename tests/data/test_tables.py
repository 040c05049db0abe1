"""Tables: which columns become what, which are left out and why, and each way in which a table can be wrong."""

import numpy as np
import polars as pl
import pytest

from delest import errors
from delest.data import open_source, split, tables
from delest.job import Split

CSV = """age,town,member,joined,price,userId,bought
30,Rome,true,2020-01-01,1.5,7,yes
,Oslo,false,2020-01-02,2.5,9,no
25,,true,2020-01-03,NA,7,no
41,Rome,false,2020-01-04,4.5,10,yes
"""


def written(path, text):
    path.write_text(text)
    return path


def bad(data, *texts, **wishes):
    with pytest.raises(errors.BadInput) as caught:
        open_source(data, **wishes)
    for text in texts:
        assert text in str(caught.value)
    return caught.value


@pytest.fixture
def source(tmp_path):
    return open_source(written(tmp_path / "shop.csv", CSV), target="bought")


def test_columns_of_a_csv(source):
    assert source.description == "4 rows of 5 columns in shop.csv"
    kinds = {column.name: (column.kind, column.categories, column.missing) for column in source.schema.inputs}
    assert kinds == {
        "age": ("number", None, 1),
        "town": ("category", ("Oslo", "Rome"), 1),
        "member": ("category", ("false", "true"), 0),
        "price": ("number", None, 1),
        "userId": ("category", ("7", "9", "10"), 0),
    }
    assert source.left_out == ("column 'joined': dates and times are no input yet; add what matters of them as numbers",)
    assert source.schema.classes == ("no", "yes")


def test_rows_of_a_csv(source):
    rows = source.read(np.array([1, 0, 2]))
    np.testing.assert_array_equal(rows["age"], [np.nan, 30, 25])
    assert rows["town"].tolist() == [1, 2, 0]
    assert rows["userId"].tolist() == [2, 1, 1]
    assert rows["bought"].tolist() == [0, 1, 0]
    assert {name: str(values.dtype) for name, values in rows.items()} == {
        "age": "float64", "town": "int64", "member": "int64", "price": "float64", "userId": "int64", "bought": "int64",
    }  # fmt: skip


def test_parquet_and_other_separators_give_the_same(tmp_path, source):
    pl.read_csv(CSV.encode(), null_values=["NA"], try_parse_dates=True).write_parquet(tmp_path / "shop.parquet")
    written(tmp_path / "semicolons.csv", CSV.replace(",", ";"))
    written(tmp_path / "tabs.tsv", CSV.replace(",", "\t"))
    for name in ("shop.parquet", "semicolons.csv", "tabs.tsv"):
        other = open_source(tmp_path / name, target="bought")
        assert other.schema.target == source.schema.target
        assert [column.categories for column in other.schema.inputs] == [column.categories for column in source.schema.inputs]
        for column, values in source.read(np.arange(4)).items():
            np.testing.assert_array_equal(other.read(np.arange(4))[column], values)


@pytest.mark.parametrize(
    ("early", "late", "kind"), [("3", "2.5", "number"), ("3", "many", "category"), ("2020-01-01", "soon", "category")]
)
def test_columns_that_change_their_type_further_down(tmp_path, monkeypatch, early, late, kind):
    monkeypatch.setattr(tables, "_LOOKED_AT_ROWS", 2)
    text = "a,y\n" + f"{early},0\n" * 5 + f"{late},1\n"
    column = open_source(written(tmp_path / "d.csv", text)).schema.inputs[0]
    assert (column.kind, column.missing) == (kind, 0)


def test_targets_of_tables(tmp_path):
    rows = "\n".join(f"{i},{i / 7},{i},{i % 3}" for i in range(80))
    path = written(tmp_path / "d.csv", "x,price,count,grade\n" + rows)
    assert open_source(path, target="price").schema.target.kind == "number"
    assert open_source(path, target="count").schema.target.kind == "number"
    assert open_source(path, target="grade").schema.classes == ("0", "1", "2")
    written(path, path.read_text().replace("grade", "label"))
    assert open_source(path).schema.target.name == "label"


def test_files_of_roles(tmp_path):
    written(tmp_path / "train.csv", "x,y\n" + "\n".join(f"{i},{i % 2}" for i in range(30)))
    written(tmp_path / "test.csv", "y,x\n" + "\n".join(f"{i % 2},{i}" for i in range(10)))
    source = open_source(tmp_path)
    assert np.unique(source.roles(), return_counts=True)[1].tolist() == [10, 30]
    divided = split(source, Split(train=0.6, validation=0.2, selection=0.1, test=0.1), 0)
    assert (source.roles()[divided["test"]] == "test").all()
    assert len(divided["validation"]) == 7


def test_text_and_ids_that_say_nothing_are_left_out(tmp_path):
    rows = "\n".join(f"{i},name {i},{i % 5},{i % 4},{i % 2},{i / 3}" for i in range(60))
    source = open_source(written(tmp_path / "d.csv", "PassengerId,name,paid,item_id,y,valid\n" + rows))
    assert [column.name for column in source.schema.inputs] == ["paid", "item_id", "valid"]
    assert [column.kind for column in source.schema.inputs] == ["number", "category", "number"]
    assert ["60 distinct values in 60 rows" in text for text in source.left_out] == [True, True]


def test_columns_that_cannot_be_used(tmp_path):
    frame = pl.DataFrame({"a": [1, 2, 3], "tags": [[1], [2], [3]], "none": [None] * 3, "y": ["p", "q", "p"]})
    frame.write_parquet(tmp_path / "d.parquet")
    source = open_source(tmp_path / "d.parquet")
    assert [text.split(":")[0] for text in source.left_out] == ["column 'tags'", "column 'none'"]
    frame.select("tags", "y").write_parquet(tmp_path / "e.parquet")
    bad(tmp_path / "e.parquet", "no usable input column", "'tags'")


FRAME = {"a": [1.0, None, 3.0], "town": ["x", None, "y"], "y": [0, 1, 0]}


def check_frame(source):
    assert [column.missing for column in source.schema.inputs] == [1, 1]
    assert source.read(np.arange(3))["town"].tolist() == [1, 0, 2]


def test_polars_data_frames():
    check_frame(open_source(pl.DataFrame(FRAME), target="y"))


def test_pandas_data_frames():
    check_frame(open_source(pytest.importorskip("pandas").DataFrame(FRAME), target="y"))


def test_columns_to_split_by_are_no_input(tmp_path):
    rows = "\n".join(f"{i},2021-01-{i % 28 + 1:02d},{i % 2}" for i in range(56))
    source = open_source(written(tmp_path / "d.csv", "x,day,y\n" + rows), split_by="day")
    assert [column.name for column in source.schema.inputs] == ["x"]
    assert source.values("day").dtype.kind == "M"
    divided = split(source, Split(by="day"), 0)
    assert source.values("day")[divided["test"]].min() >= source.values("day")[divided["train"]].max()


def test_a_target_that_is_not_there(tmp_path):
    path = written(tmp_path / "shop.csv", CSV)
    bad(path, "unknown target 'bougth'", "Did you mean 'bought'?", target="bougth")
    bad(path, "age, town, member, joined, price, userId, bought", "--target")
    fault = bad(path, "unknown target", "unknown column to split by 'role'", target="bougth", split_by="role")
    assert len(fault.faults) == 2


def test_gaps_in_the_target_and_infinite_values_are_named_together(tmp_path):
    path = written(tmp_path / "d.csv", "a,b,y\n1,inf,0.5\n2,1,\n-inf,inf,NA\n")
    fault = bad(
        path, "target 'y' has 2 missing or infinite values, the first in row 1", "'a' has 1 infinite", "'b' has 2 infinite"
    )
    assert len(fault.faults) == 3


def test_gaps_in_the_column_to_split_by(tmp_path):
    bad(written(tmp_path / "shop.csv", CSV), "1 rows have no value in 'town'", target="bought", split_by="town")


def test_a_single_class(tmp_path):
    bad(written(tmp_path / "d.csv", "a,y\n1,no\n2,no\n"), "a single class, 'no'")


def test_no_rows(tmp_path):
    bad(written(tmp_path / "d.csv", "a,y\n"), "has 0 rows")
    bad(written(tmp_path / "e.csv", ""), "cannot be read as a table")


def test_a_table_that_is_none(tmp_path):
    bad(written(tmp_path / "d.csv", 'a,y\n1,2,3,4\n"'), "cannot be read as a table")


def test_files_with_other_columns(tmp_path):
    written(tmp_path / "train.csv", "a,y\n1,0\n2,1\n")
    written(tmp_path / "test.csv", "b,y\n1,0\n")
    bad(tmp_path, "columns 'a', 'b' are not in all files")


def test_columns_that_differ_in_length():
    bad({"a": np.ones(3), "y": np.ones(4)}, "differ in length: a 3, y 4", target="y")


def test_decimal_commas(tmp_path):
    path = written(tmp_path / "d.csv", "a;b;c;y\n1,5;x,1;;0,5\n-2;x,2;,25;1,5\n;x,1;1e3;2,5\n")
    source = open_source(path)
    assert {column.name: column.kind for column in source.schema.inputs} == {"a": "number", "b": "category", "c": "number"}
    rows = source.read(np.arange(3))
    np.testing.assert_array_equal(rows["a"], [1.5, -2, np.nan])
    np.testing.assert_array_equal(rows["c"], [np.nan, 0.25, 1000])
    assert rows["y"].tolist() == [0.5, 1.5, 2.5]


def test_codes_with_leading_zeros(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_LOOKED_AT_ROWS", 2)
    text = "plz,size,y\n" + "20095,10,0\n80331,0,1\n" * 2 + "01067,30,1\n"
    for name in ("d.csv", "^d$.csv"):
        source = open_source(written(tmp_path / name, text))
        assert [column.kind for column in source.schema.inputs] == ["category", "number"]
        assert source.schema.inputs[0].categories == ("01067", "20095", "80331")


def test_dates_whose_day_may_be_the_month(tmp_path):
    rows = "".join(f"{i},0{i % 9 + 1}/0{i % 7 + 1}/2021,{i % 2}\n" for i in range(60))
    path = written(tmp_path / "d.csv", "x,day,y\n" + rows)
    source = open_source(path, split_by="day")
    with pytest.raises(errors.BadInput, match="the day may be the month"):
        split(source, Split(by="day"), 0)
    assert "dates and times are no input" in open_source(path).left_out[0]
