from delest import storage
from delest.shrinking.journal import Journal

SETTINGS = {"allowed": 0.01, "seconds": 60.0}


def test_what_was_decided_is_followed_also_behind_a_half_written_line(tmp_path):
    path = tmp_path / "shrinking" / "decisions.jsonl"
    first = Journal(path)
    first.open(SETTINGS)
    assert first.follow("step", "", lambda: {"channels": 8})["channels"] == 8
    with open(path, "ab") as file:
        file.write(b'{"kind": "step", "name": "", "chan')
    second = Journal(path)
    second.open(SETTINGS)
    assert second.follow("step", "", lambda: {"channels": 16})["channels"] == 8
    second.note("begun", "pruned-1", seconds=0.1 + 0.2)
    assert [line["kind"] for line in storage.read_lines(path)] == ["settings", "step", "begun"]
    assert Journal(path).found("begun", "pruned-1")["seconds"] == 0.1 + 0.2


def test_other_settings_begin_anew_without_what_lies_beside(tmp_path):
    journal = Journal(tmp_path / "shrinking" / "decisions.jsonl")
    journal.open(SETTINGS)
    journal.note("begun", "pruned-1", seconds=1.0)
    (journal.path.parent / "pruned-1").mkdir()
    (journal.path.parent / "pruned-1" / ".cut.safetensors.7.tmp").write_bytes(b"half")
    journal.open(SETTINGS)
    assert list((journal.path.parent / "pruned-1").iterdir()) == []
    journal.open({**SETTINGS, "seconds": 61.0})
    assert journal.found("begun", "pruned-1") is None
    assert [path.name for path in journal.path.parent.iterdir()] == ["decisions.jsonl"]


def test_times_are_of_one_artefact_one_machine_and_the_same_forms(tmp_path):
    path = tmp_path / "decisions.jsonl"
    clock = iter(range(9))

    def timed(journal, **where):
        return journal.follow("timed", "batch 1", lambda: {"seconds": next(clock)}, **where)["seconds"]

    journal = Journal(path)
    assert timed(journal, forms=["fp32"]) == timed(journal, forms=["fp32"]) == timed(Journal(path), forms=["fp32"]) == 0
    assert timed(journal, forms=["fp32", "int8"]) == 1
    assert timed(journal, forms=["fp32", "int8"], processor="another") == 2
    journal.note("shipped", "int8")
    assert (
        timed(Journal(path), forms=["fp32", "int8"], processor="another") == 2
    )  # what ships is not there: the journal was brought here
    again = Journal(path, repeated=True)
    assert timed(again, forms=["fp32", "int8"], processor="another") == 3
    killed = Journal(path, repeated=True)
    assert timed(killed, forms=["fp32", "int8"], processor="another") == 3
    killed.note("shipped", "int8")
    assert timed(Journal(path), forms=["fp32", "int8"], processor="another") == 3
