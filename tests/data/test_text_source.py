"""Text: windows of tokens, how they are divided, and each way in which a file can be wrong."""

import json
import sys

import numpy as np
import pytest

from delest import errors
from delest.data import Feed, fit_preprocessing, open_source, raw_rows, split, summarise, text
from delest.data.stored import Memory, PackedFile
from delest.job import Split
from delest.records.form import from_json, to_json
from delest.records.source import ROLES


def write(folder, content, name="book.txt"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def spelled(schema, ids):
    return "".join(schema.vocabulary[number] for number in ids)


def test_windows_follow_each_other_and_targets_come_one_token_later(tmp_path):
    content = "to be, or not to be: that is the question\n" * 10
    source = open_source(write(tmp_path, content), context=6)
    assert source.description == "60 windows of 6 characters in book.txt"
    assert source.schema.is_text
    assert source.schema.input_shape == (6,)
    assert source.schema.vocabulary == (text.UNKNOWN, *sorted(set(content)))
    assert source.schema.outputs == len(set(content)) + 1
    rows = source.read(np.array([0, 17, 3]))
    assert rows["tokens"].dtype == rows["next"].dtype == np.int64
    for row, start in enumerate((0, 17 * 7, 3 * 7)):
        assert spelled(source.schema, rows["tokens"][row]) == content[start : start + 6]
        assert spelled(source.schema, rows["next"][row]) == content[start + 1 : start + 7]


def test_what_model_and_bundle_receive_are_ids(tmp_path):
    source = open_source(write(tmp_path, "abcdefghij" * 20), context=4)
    preprocessing = fit_preprocessing(source, np.arange(len(source)), ids=False)
    batch = next(iter(Feed(source, np.arange(5), preprocessing, batch_size=5).ordered()))
    assert (batch.inputs.dtype, batch.inputs.shape) == (np.int64, (5, 4))
    np.testing.assert_array_equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    np.testing.assert_array_equal(raw_rows(source, np.arange(5))["tokens"], batch.inputs)
    assert preprocessing.restore(batch.targets) is batch.targets
    again = from_json(type(preprocessing), json.loads(json.dumps(to_json(preprocessing))))
    assert again.schema == source.schema


@pytest.mark.parametrize("letters", [20, 300, 70_000])
def test_ids_take_as_few_bytes_as_do(tmp_path, own_cache, letters):
    characters = [chr(code) for code in range(0x100, 0x12000) if not 0xD800 <= code < 0xE000][:letters]
    content = "".join(characters) + "".join(characters[:9])
    source = open_source(write(tmp_path, content), context=8)
    (packed,) = (own_cache / "packed").glob("*.tokens")
    assert packed.stat().st_size == len(content) * {20: 1, 300: 2, 70_000: 4}[letters]
    whole = source.read(np.arange(len(source)))["tokens"]
    assert spelled(source.schema, whole[-1]) == content[(len(source) - 1) * 9 :][:8]


def test_a_text_is_encoded_once_and_held_in_memory_where_the_cache_has_no_room(tmp_path, monkeypatch):
    path = write(tmp_path, "one two three " * 50)
    first = open_source(path, context=5)
    monkeypatch.setattr(text, "_write", None)  # a second time would fail
    again = open_source(path, context=5)
    assert isinstance(again.stores["tokens"]._store, PackedFile)
    assert first.fingerprint == again.fingerprint != open_source(path, context=6).fingerprint
    monkeypatch.setattr(text, "has_room", lambda *_, **__: False)
    held = open_source(path, context=5)
    assert isinstance(held.stores["tokens"]._store, Memory)
    index = np.arange(len(first))
    np.testing.assert_array_equal(held.read(index)["next"], first.read(index)["next"])


def test_pieces_make_no_difference(tmp_path, own_cache, monkeypatch):
    path = write(tmp_path, "a line of äöü\nand one more, €\n" * 30)
    whole = open_source(path, context=7)
    expected = whole.read(np.arange(len(whole)))["tokens"]
    for packed in (own_cache / "packed").iterdir():
        packed.unlink()
    monkeypatch.setattr(text, "_PIECE", 5)
    source = open_source(path, context=7)
    np.testing.assert_array_equal(source.read(np.arange(len(source)))["tokens"], expected)


def test_a_byte_order_mark_and_line_ends_of_other_systems_are_no_tokens(tmp_path):
    one = open_source(write(tmp_path, b"\xef\xbb\xbfone\r\ntwo\r\n" * 1 + b"one\r\ntwo\r\n" * 9, "one.txt"), context=3)
    other = open_source(write(tmp_path, "one\ntwo\n" * 10, "other.txt"), context=3)
    assert one.schema == other.schema
    np.testing.assert_array_equal(one.read(np.arange(20))["tokens"], other.read(np.arange(20))["tokens"])


def test_unknown_characters_have_an_id_of_their_own(tmp_path):
    source = open_source(write(tmp_path, "abc" * 20 + text.UNKNOWN), context=4)
    assert source.schema.vocabulary == (text.UNKNOWN, "a", "b", "c")
    assert text.encoder_of(source.schema).encode(f"a{text.UNKNOWN}\N{SNOWMAN}c").tolist() == [1, 0, 0, 3]


# Dividing


@pytest.mark.parametrize("rows", [None, 37])
def test_roles_follow_each_other_in_the_text(tmp_path, rows):
    source = open_source(write(tmp_path, "the quick brown fox " * 100), context=9, rows=rows)
    divided = split(source, Split(), 3)
    assert np.array_equal(np.concatenate([divided[role] for role in ROLES]), np.arange(len(source)))
    assert [len(divided[role]) for role in ROLES] == ([140, 20, 20, 20] if rows is None else [26, 4, 4, 3])
    assert "order of the text" in divided.how


def test_no_token_is_in_two_roles(tmp_path):
    content = "".join(chr(0x4E00 + place) for place in range(1100))  # each character is in one place
    source = open_source(write(tmp_path, content), context=10)
    divided = split(source, Split(), 0)
    seen = [set(np.concatenate(list(source.read(divided[role]).values()), axis=None).tolist()) for role in ROLES]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 1100


def test_too_few_windows_for_all_roles(tmp_path):
    source = open_source(write(tmp_path, "abcdefghij" * 3), context=9)
    with pytest.raises(errors.BadInput, match=r"3 windows leave none for .* Give at least 10 windows"):
        split(source, Split(), 0)


# Looking


def test_summary(tmp_path):
    source = open_source(write(tmp_path, "aaab" * 300), context=11)
    summary = summarise(source, split(source, Split(), 0))
    assert (summary.kind, summary.rows, summary.target, summary.classes) == ("text", 100, "next", None)
    assert summary.row_bytes == 8 * 11
    assert summary.columns[0] == {
        "name": "tokens", "kind": "tokens", "shape": (11,), "dtype": "int64", "missing": 0, "cardinality": 3,
    }  # fmt: skip
    # Of twelve tokens the first, an a, is no target: the entropy of eight a's and three b's.
    assert summary.baseline["loss"] == pytest.approx(-(8 * np.log(8 / 11) + 3 * np.log(3 / 11)) / 11)
    assert "the vocabulary has 3 tokens" in summary.notes
    assert any("also in train" in note for note in summary.notes)


def test_a_token_that_train_lacks_counts_once(tmp_path):
    source = open_source(write(tmp_path, "a" * 880 + "b" * 220), context=10)
    summary = summarise(source, split(source, Split(train=0.8, validation=0, selection=0, test=0.2), 0))
    assert summary.baseline["loss"] == pytest.approx(np.log(800))


# Faults


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no text"),
        (b"\xef\xbb\xbf", "holds no text"),
        (b"fine\nthen caf\xe9 here\n", r"line 2 has the byte 0xe9 in place 9\. Save it as UTF-8"),
        ("text".encode("utf-16"), "is UTF-16, not UTF-8"),
        (b"abcdefgh", r"has 8 characters, and one window of 8 takes 9"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, content, words):
    with pytest.raises(errors.BadInput, match=words):
        open_source(write(tmp_path, content), context=8)


def test_a_text_has_no_columns(tmp_path):
    with pytest.raises(errors.BadInput) as raised:
        open_source(write(tmp_path, "abc" * 100), target="y", split_by="day")
    assert len(raised.value.faults) == 2


def test_a_tokenizer_that_cannot_be_read(tmp_path, monkeypatch):
    path = write(tmp_path, "abc" * 100)
    with pytest.raises(errors.BadInput, match="does not exist"):
        open_source(path, tokenizer=str(tmp_path / "no.json"))
    with pytest.raises(errors.BadInput, match="cannot be read"):
        open_source(path, tokenizer=str(path))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(errors.MissingExtra, match=r"delest\[text\]"):
        open_source(path, tokenizer=str(write(tmp_path, "{}", "tokenizer.json")))


# Tokenizers, where the package is installed


@pytest.fixture
def tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    trained = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="[UNK]"))
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["[UNK]"], initial_alphabet=alphabet)
    trained.train_from_iterator(["the quick brown fox jumps over the lazy dog\n" * 20], trainer)
    trained.enable_truncation(4)  # a text is encoded whole all the same
    trained.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_tokens_of_a_tokenizer(tmp_path, tokenizer):
    content = "the quick brown fox jumps over the lazy dog\n" * 40
    source = open_source(write(tmp_path, content), context=8, tokenizer=str(tokenizer))
    assert "windows of 8 tokens" in source.description
    assert len(source) * 9 < len(content) / 2
    assert (
        spelled(source.schema, source.read(np.array([0]))["tokens"][0]).replace("Ġ", " ")
        == content[: len("the quick brown fox jumps over the lazy")]
    )
    ids = text.encoder_of(source.schema).encode("the dog \N{SNOWMAN}")
    assert ids.max() < source.schema.outputs
    with pytest.raises(errors.BadInput, match="none that the package tokenizers reads"):
        open_source(tmp_path / "book.txt", tokenizer=str(write(tmp_path, "{}", "other.json")))
