"""Dividing rows: shares, classes, roles that the data bring, groups and times; samples."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from delest import errors
from delest.data import open_source, sample, split
from delest.job import Split
from delest.records.source import ROLES


def source_of(labels, **columns):
    data = {"x": np.ones((len(labels), 2)), "target": np.asarray(labels), **columns}
    return open_source(data, target="target", split_by=next(iter(columns), None))


def sizes(divided):
    return [len(divided[role]) for role in ROLES]


def covers(divided, rows):
    return np.array_equal(np.sort(np.concatenate(list(divided.values()))), np.arange(rows))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=8), st.integers(0, 5), st.sampled_from([0.7, 0.5, 0.31, 0.1]))
def test_shares_are_exact_and_classes_keep_their_part(counts, seed, train):
    labels = np.repeat(np.arange(len(counts)), counts)
    if len(labels) < 20:
        labels = np.concatenate([labels, np.arange(20) % len(counts)])
    labels = np.random.default_rng(seed).permutation(labels)
    other = (1 - train) / 3
    spec = Split(train=train, validation=other, selection=other, test=other)
    divided = split(source_of(labels), spec, seed)
    assert covers(divided, len(labels))
    for role in ROLES:
        exact = getattr(spec, role) * len(labels)
        assert abs(len(divided[role]) - exact) < 1
        assert (np.diff(divided[role]) > 0).all()
        for k in range(len(counts)):
            assert abs((labels[divided[role]] == k).sum() - getattr(spec, role) * (labels == k).sum()) <= 3
    if len(divided["train"]) >= len(counts):
        for k in np.flatnonzero(np.bincount(labels) >= 4):
            assert (labels[divided["train"]] == k).any()


def test_rare_classes_get_training_rows_even_from_a_small_share():
    labels = np.repeat(np.arange(11), [160, *[4] * 10])
    divided = split(source_of(labels), Split(train=0.1, validation=0.3, selection=0.3, test=0.3), 0)
    assert set(labels[divided["train"]]) == set(range(11))
    assert sizes(divided) == [20, 60, 60, 60]


def test_the_same_seed_divides_alike():
    source = source_of(np.arange(100) % 3)
    first, again, other = (split(source, Split(), seed) for seed in (1, 1, 2))
    assert all(np.array_equal(first[role], again[role]) for role in ROLES)
    assert not np.array_equal(first["train"], other["train"])


def test_a_share_of_nothing():
    divided = split(source_of(np.arange(40) % 2), Split(train=0.8, validation=0.2, selection=0, test=0), 0)
    assert sizes(divided) == [32, 8, 0, 0]
    assert divided["test"].dtype == np.int64


def test_number_targets_are_divided_at_random():
    divided = split(source_of(np.linspace(0, 1, 100)), Split(), 0)
    assert sizes(divided) == [70, 10, 10, 10]
    assert divided["test"].min() < 50 < divided["test"].max()


def test_roles_of_the_data_stay_and_the_rest_comes_out_of_train(tmp_path):
    x, y = np.ones((120, 2)), np.arange(120) % 3
    np.savez(tmp_path / "d.npz", x_train=x[:90], y_train=y[:90], x_test=x[90:], y_test=y[90:])
    divided = split(open_source(tmp_path / "d.npz"), Split(), 0)
    assert divided["test"].tolist() == list(range(90, 120))
    assert sizes(divided) == [70, 10, 10, 30]
    assert covers(divided, 120)


def test_a_column_of_roles():
    roles = np.array(["Train"] * 80 + ["val"] * 10 + ["test"] * 10)
    divided = split(source_of(np.arange(100) % 2, part=roles), Split(by="part"), 0)
    assert divided["validation"].tolist() == list(range(80, 90))
    assert divided["test"].tolist() == list(range(90, 100))
    assert sizes(divided) == [70, 10, 10, 10]  # selection: 0.1 of 0.8 of the 80 rows


def test_groups_stay_together():
    groups = np.random.default_rng(0).integers(0, 40, 400)
    divided = split(source_of(np.arange(400) % 2, patient=groups), Split(by="patient"), 3)
    assert covers(divided, 400)
    found = [set(groups[divided[role]]) for role in ROLES]
    assert sum(map(len, found)) == len(set.union(*found))
    assert abs(len(divided["train"]) - 280) < 30


def test_few_groups_still_give_each_role_one():
    groups = np.repeat(["a", "b", "c", "d"], [50, 20, 20, 10])
    divided = split(source_of(np.arange(100) % 2, patient=groups), Split(by="patient"), 0)
    assert all(sizes(divided))


@pytest.mark.parametrize(
    ("name", "values"),
    [("year", np.arange(100)[::-1] + 1900), ("day", np.datetime64("2020-01-01") + np.arange(100)[::-1])],
)
def test_test_is_the_latest(name, values):
    divided = split(source_of(np.arange(100) % 2, **{name: values}), Split(by=name), 0)
    assert divided["test"].tolist() == list(range(10))
    assert divided["train"].tolist() == list(range(30, 100))


def test_the_kind_can_be_said():
    values = np.arange(100)
    divided = split(source_of(np.arange(100) % 2, batch=values // 10), Split(by="batch", kind="time"), 0)
    assert divided["test"].tolist() == list(range(90, 100))


def bad(source, spec, text):
    with pytest.raises(errors.BadInput) as caught:
        split(source, spec, 0)
    assert text in str(caught.value)
    return caught.value


def test_too_few_rows():
    fault = bad(source_of([0, 1]), Split(), "2 rows leave none for")
    assert len(fault.faults) == 3
    assert "at least 10 rows" in str(fault)


def test_too_few_groups():
    bad(source_of(np.arange(40) % 2, patient=np.arange(40) % 2), Split(by="patient"), "Give at least 4 groups")


def test_roles_that_are_none():
    source = source_of(np.arange(40) % 2, part=np.array(["train", "tets"] * 20))
    bad(source, Split(by="part", kind="role"), "'tets' is no role")


def test_roles_without_train():
    source = source_of(np.arange(40) % 2, part=np.array(["test", "val"] * 20))
    bad(source, Split(by="part"), "no row to train on")


def test_times_with_gaps():
    times = np.where(np.arange(40) == 3, np.nan, np.arange(40.0))
    bad(source_of(np.arange(40) % 2, time=times), Split(by="time"), "1 rows have no value there")


def test_a_sample_of_some_rows():
    source = source_of(np.repeat([0, 1], [150, 50]))
    chosen = sample(source, np.arange(0, 200, 2), 0.2, 5)
    assert len(chosen) == 20
    assert (chosen % 2 == 0).all()
    assert (chosen >= 150).sum() == 5


def kind_of(name, values):
    return split(source_of(np.arange(len(values)) % 2, **{name: values}), Split(by=name), 0).how


@pytest.mark.parametrize("name", ["candidate_no", "lifetime", "runtime", "updates"])
def test_words_that_merely_hold_a_word_of_time(name):
    assert kind_of(name, np.arange(100) // 5).startswith("split by group")


@pytest.mark.parametrize("name", ["time", "birth_year", "orderDate", "Order Date", "TIMESTAMP", "yearSold"])
def test_words_of_time(name):
    assert kind_of(name, np.arange(100)) == f"split by time of {name!r}: test is the latest"


DAYS = np.datetime64("2022-12-01") + np.arange(100)[::-1]


@pytest.mark.parametrize(
    "form", ["{m}/{d}/{y}", "{d}/{m}/{y}", "{d}.{m}.{y}", "{y}-{m}-{d} 07:30", "{m}/{d}/{y} 5:30 PM", "{d:02}.{m:02}.22"]
)
def test_dates_as_text_are_times(form):
    days = DAYS if "22" not in form else DAYS - 100
    texts = np.array([form.format(y=day.year, m=day.month, d=day.day) for day in days.tolist()])
    divided = split(source_of(np.arange(100) % 2, day=texts), Split(by="day"), 0)
    assert divided["test"].tolist() == list(range(10))
    assert "time of 'day'" in divided.how


def test_dates_as_text_that_cannot_be_ordered():
    labels = np.arange(40) % 2
    bad(source_of(labels, day=np.array(["03/04/2023", "05/06/2023"] * 20)), Split(by="day"), "the day may be the month")
    mixed = source_of(labels, day=np.array([*(f"3/{i + 1}/2023" for i in range(20)), "soon", *["14.3.2023"] * 19]))
    bad(mixed, Split(by="day"), "'soon' for one")
    bad(source_of(labels, day=np.array(["b", "a"] * 20)), Split(by="day", kind="time"), "no one form")
    assert split(mixed, Split(by="day", kind="group"), 0).how.startswith("split by group")
    assert "time" not in kind_of("version", np.array(["1.2.3", "1.10.0", "2.0.1", "3.0.0"] * 10))
