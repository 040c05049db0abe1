"""Parts found by a few first steps, where no limit can be set."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from delest import errors, malloc, storage
from delest.hardware import machine
from delest.training import limit
from delest.training.decisions import Decisions
from delest.training.guard import Guard
from delest.training.position import Position
from delest.training.sizing import Sizing

MIB = 1 << 20


@dataclass
class Session:
    """Takes 200 MiB and so much a row."""

    a_row: int = 4 * MIB
    parts: int = 1
    most_parts: int = 64
    sized: bool = True
    rows: int = 64

    def warm(self) -> None: ...

    def peak(self) -> int:
        return 200 * MIB + -(-self.rows // self.parts) * self.a_row


def sized(session: Session, budget: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Parts of each step that was looked at, and in the end."""
    monkeypatch.setattr(machine, "peak_resident_bytes", session.peak)
    sizing, found = Sizing(session, budget, "--memory "), []
    while sizing.wants(len(found)):
        sizing.begin(len(found), session.rows)
        found.append(session.parts)
        sizing.end(session.rows)
    return [*found, session.parts]


def test_the_fewest_parts_that_fit_follow_from_two_small_steps(monkeypatch: pytest.MonkeyPatch):
    assert sized(Session(), 1000 * MIB, monkeypatch) == [16, 8, 4, 1, 1]
    found = sized(session := Session(), 300 * MIB, monkeypatch)
    assert found[:2] == [16, 8]
    assert session.peak() <= 300 * MIB
    session.parts -= 1
    assert session.peak() > 270 * MIB  # the next larger part would not fit, with what is kept free


def test_rows_that_are_normalised_by_each_other_are_not_made_few(monkeypatch: pytest.MonkeyPatch):
    assert sized(Session(most_parts=32), 1000 * MIB, monkeypatch) == [4, 2, 1, 1]


def test_no_fewer_parts_than_were_planned(monkeypatch: pytest.MonkeyPatch):
    assert sized(Session(parts=4), 1000 * MIB, monkeypatch) == [16, 8, 4, 4]


def test_what_the_first_steps_take_for_themselves_is_not_taken_for_rows(monkeypatch: pytest.MonkeyPatch):
    session = Session(a_row=MIB)
    compiled = [0, 20 * MIB]  # of the second shape
    monkeypatch.setattr(machine, "peak_resident_bytes", lambda: session.peak() + (compiled.pop(0) if compiled else 20 * MIB))
    sizing, found = Sizing(session, 310 * MIB, "--memory "), []
    for step in range(5):
        if sizing.wants(step):
            sizing.begin(step, session.rows)
            sizing.end(session.rows)
        found.append(session.parts)
    assert found[-1] == 1  # by the first two steps a row takes 6 MiB
    assert found[1] > 1


def test_what_memory_ran_short_for_before_is_kept(monkeypatch: pytest.MonkeyPatch):
    session = Session()
    monkeypatch.setattr(machine, "peak_resident_bytes", session.peak)
    sizing = Sizing(session, 1000 * MIB, "--memory ")
    sizing.begin(0, session.rows)
    sizing.end(session.rows)
    sizing.at_least(32)
    sizing.begin(1, session.rows)
    assert session.parts == 32
    assert sizing.end(session.rows) == "a row takes 4 MiB, of a budget of 1000 MiB: 32 parts of 2 rows"
    assert session.parts == 32


def test_a_budget_that_no_part_keeps_is_named_with_what_would_do(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(errors.NothingFits, match=r"steps on 4 and 8 rows came to 216 MiB and 232 MiB.*--memory"):
        sized(Session(), 210 * MIB, monkeypatch)


def test_small_parts_that_came_just_below_the_budget_stay(monkeypatch: pytest.MonkeyPatch):
    session = Session(a_row=MIB // 64)  # 200 MiB and an eighth by 8 rows, of which fewer would save nothing
    assert sized(session, 210 * MIB, monkeypatch) == [16, 8, 8]
    assert session.peak() < 210 * MIB


def test_without_a_budget_freed_blocks_are_kept_where_the_machine_has_room(kept: list[str], monkeypatch: pytest.MonkeyPatch):
    resident, free = machine.resident_bytes(), machine.describe().available_bytes
    monkeypatch.setattr(machine, "resident_bytes", lambda: resident)
    for peak, expected in ((free // 3, ["kept", "moved", "back"]), (2 * free // 3, [])):
        monkeypatch.setattr(machine, "peak_resident_bytes", lambda peak=peak: resident + peak)
        guard = Guard(Session(sized=False), 64, lambda text: None)
        with guard.watching(None):
            for _ in range(3):
                guard.attempt(lambda: None, Decisions(None), Position(), rows=64)
        assert kept == expected
        kept.clear()


def guarded(folder: Path, session: Session, position: Position, steps: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Parts of steps from `position` on."""
    monkeypatch.setattr(machine, "peak_resident_bytes", session.peak)
    guard, found = Guard(session, session.rows, lambda text: None), []
    decisions = Decisions(folder / "decisions.jsonl", position.decisions)
    with guard.watching(machine.resident_bytes() + 4096 * MIB):
        assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.getrlimit(resource.RLIMIT_DATA)[1]
        if guard._sizing is not None:
            guard._sizing.budget_bytes = 300 * MIB
        for _ in range(steps):
            found.append(guard.attempt(lambda: session.parts, decisions, position))
            position.step += 1
    return found


def test_the_guard_sets_no_limit_and_writes_down_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = guarded(tmp_path, Session(), Position(), 4, monkeypatch)
    assert found[:2] == [16, 8]
    assert found[2] == found[3] not in (1, 8)
    (line,) = [json.loads(line) for line in (tmp_path / "decisions.jsonl").read_text().splitlines()]
    assert (line["kind"], line["at"], line["phase"], line["parts"]) == ("split", 1, "sizing", found[2])


def test_the_small_last_batch_of_an_epoch_says_nothing_of_whole_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    session, made, peaks = Session(), [], []
    monkeypatch.setattr(machine, "peak_resident_bytes", lambda: peaks[-1])
    guard, position, decisions = Guard(session, session.rows, lambda text: None), Position(), Decisions(None)
    with guard.watching(machine.resident_bytes() + 4096 * MIB):
        assert guard._sizing is not None
        guard._sizing.budget_bytes = 300 * MIB
        for step in range(8):
            rows = session.rows if step % 2 == 0 else 1
            guard.attempt(
                lambda rows=rows: peaks.append(200 * MIB + min(rows, -(-session.rows // session.parts)) * session.a_row),
                decisions,
                position,
                rows=rows,
            )
            made.append(session.parts)
            position.step += 1
    assert max(peaks) <= 300 * MIB
    assert made[0] == made[1] == 16
    assert made[-1] < 8


def test_parts_that_did_not_fit_are_made_smaller_again(monkeypatch: pytest.MonkeyPatch):
    session = Session(a_row=MIB)
    monkeypatch.setattr(machine, "peak_resident_bytes", lambda: session.peak() + 400 * MIB * (session.parts < 2))
    sizing = Sizing(session, 400 * MIB, "--memory ")
    for step in range(4):
        if sizing.wants(step):
            sizing.begin(step, session.rows)
            sizing.end(session.rows)
    assert (session.parts, sizing.wants(4)) == (2, False)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_run_that_goes_on_makes_the_same_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int):
    session, position = Session(), Position()
    whole = guarded(tmp_path, session, position, 4, monkeypatch)
    taken = position.decisions if step == 2 else 0
    again = Position(step=step, parts=whole[step], decisions=taken)
    assert (
        guarded(tmp_path, Session(parts=again.parts if step else 1, a_row=3 * MIB), again, 4 - step, monkeypatch)
        == whole[step:]
    )


def test_parts_decided_after_a_crash_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    storage.append_line(tmp_path / "decisions.jsonl", {"kind": "split", "at": 0, "phase": "crash", "parts": 32})
    assert guarded(tmp_path, Session(a_row=MIB), Position(), 3, monkeypatch) == [32, 32, 32]


def test_only_watching_outlasts_what_sets_limits_anew():
    budget = machine.resident_bytes() + 4096 * MIB
    with limit.held(budget) as held:
        assert held is not None
        assert resource.getrlimit(resource.RLIMIT_DATA)[0] != resource.getrlimit(resource.RLIMIT_DATA)[1]
        limit.only_watch()
        with held.lifted():
            pass
        held.begin_anew(widen=True)
        assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.getrlimit(resource.RLIMIT_DATA)[1]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What malloc was asked for: "fixed" gives freed blocks back, "kept" keeps them all, "moved" is what glibc does."""
    asked: list[str] = []
    monkeypatch.setattr(malloc, "current", lambda: "glibc")
    for name, word in {"fix_threshold": "fixed", "keep_freed": "kept", "move_threshold": "moved"}.items():
        monkeypatch.setattr(malloc, name, lambda word=word: asked.append(word) or True)
    monkeypatch.setattr(malloc, "give_back", lambda: asked.append("back") if asked and asked[-1] == "moved" else None)
    return asked


@dataclass
class Scattering(Session):
    scatters: bool = True


def stepped(session: Session, budget: int, peaks: list[int], monkeypatch: pytest.MonkeyPatch) -> Session:
    """A session after steps within so much more than is resident, each of which comes to a peak above that."""
    resident = machine.resident_bytes()
    monkeypatch.setattr(machine, "resident_bytes", lambda: resident)
    guard, position = Guard(session, session.rows, lambda text: None), Position(step=5)  # sized already
    with guard.watching(resident + budget):
        for peak in peaks:
            monkeypatch.setattr(machine, "peak_resident_bytes", lambda peak=peak: resident + peak)
            guard.attempt(lambda: None, Decisions(None), position)
            position.step += 1
    return session


@pytest.mark.parametrize("sized", [False, True])
def test_freed_blocks_are_kept_where_there_is_twice_the_room(sized: bool, kept: list[str], monkeypatch: pytest.MonkeyPatch):
    stepped(Session(sized=sized), 4096 * MIB, [2000 * MIB], monkeypatch)
    assert kept == []  # the first step says too little
    stepped(Session(sized=sized), 4096 * MIB, [2000 * MIB] * 3, monkeypatch)
    assert kept == ["kept", "moved", "back"]  # which ends with the training
    kept.clear()
    stepped(Session(sized=sized), 4096 * MIB, [2100 * MIB] * 8, monkeypatch)
    assert kept == []


def test_scattered_blocks_are_given_back_until_there_is_twice_the_room(kept: list[str], monkeypatch: pytest.MonkeyPatch):
    stepped(Scattering(parts=2), 4096 * MIB, [2000 * MIB] * 2, monkeypatch)
    assert kept == ["fixed", "kept", "moved", "back"]
    kept.clear()
    stepped(Scattering(), 4096 * MIB, [2100 * MIB] * 3, monkeypatch)
    assert kept == ["fixed", "moved"]


@pytest.mark.parametrize("variable", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_"])
def test_what_somebody_asked_of_malloc_stays(variable: str, kept: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(variable, "1000000")
    stepped(Scattering(), 4096 * MIB, [2000 * MIB] * 3, monkeypatch)
    monkeypatch.delenv(variable)
    monkeypatch.setattr(malloc, "current", lambda: "mmap")  # which a plan asked for
    stepped(Session(sized=False), 4096 * MIB, [2000 * MIB] * 3, monkeypatch)
    assert kept == []


def test_parts_that_an_interrupted_run_had_found_are_looked_at_themselves(
    tmp_path: Path, kept: list[str], monkeypatch: pytest.MonkeyPatch
):
    resident = machine.resident_bytes()
    monkeypatch.setattr(machine, "resident_bytes", lambda: resident)
    file, session, position = tmp_path / "decisions.jsonl", Scattering(parts=16), Position(step=1)
    file.write_text(json.dumps({"kind": "split", "at": 1, "phase": "sizing", "parts": 1}) + "\n")
    guard, decisions = Guard(session, session.rows, lambda text: None), Decisions(file, 0)
    with guard.watching(resident + 4096 * MIB):
        for expected in (["fixed"], ["fixed"], ["fixed", "kept"]):
            monkeypatch.setattr(machine, "peak_resident_bytes", lambda: resident + 50 * MIB)
            guard.attempt(lambda: None, decisions, position)
            position.step += 1
            assert (session.parts, kept) == (1, expected)


@pytest.mark.parametrize("phase", ["forward", "optimizer"])
def test_what_was_freed_is_given_back_after_a_step_that_fails(phase: str, kept: list[str], monkeypatch: pytest.MonkeyPatch):
    session, position, failures = Session(sized=False), Position(), []
    monkeypatch.setattr(machine, "peak_resident_bytes", machine.resident_bytes)
    guard = Guard(session, session.rows, lambda text: None)

    def failing() -> int:
        if len(failures) < 2:
            failures.append(list(kept))
            guard._watch.highest_bytes = guard._watch.budget_bytes  # of what is kept
            raise errors.OutOfMemory(phase, "planted")
        return session.parts

    with guard.watching(machine.resident_bytes() + 4096 * MIB):
        for _ in range(2):
            guard.attempt(lambda: None, Decisions(None), position)
        if phase == "optimizer":  # its state may be half new
            with pytest.raises(errors.OutOfMemory):
                guard.attempt(failing, Decisions(None), position)
        else:  # once more as it is, then in parts
            assert guard.attempt(failing, Decisions(None), position) == 2
    assert failures[0] == ["kept"]
    assert kept == ["kept", "moved", "back"]


@pytest.mark.parametrize("resumed", [False, True])
def test_where_memory_was_short_once_nothing_is_kept(
    resumed: bool, tmp_path: Path, kept: list[str], monkeypatch: pytest.MonkeyPatch
):
    session, failures = Session(sized=False), [] if resumed else ["forward"]
    monkeypatch.setattr(machine, "peak_resident_bytes", machine.resident_bytes)
    file, position = tmp_path / "decisions.jsonl", Position()
    if resumed:
        file.write_text(json.dumps({"kind": "split", "at": 0, "phase": "forward", "parts": 2, "why": ""}) + "\n")
    guard, decisions = Guard(session, session.rows, lambda text: None), Decisions(file, 0)

    def step() -> None:
        if failures:
            raise errors.OutOfMemory(failures.pop(), f"you tried to allocate {1 << 40} bytes.")

    with guard.watching(machine.resident_bytes() + 4096 * MIB):
        for _ in range(4):
            guard.attempt(step, decisions, position)
            position.step += 1
    assert (session.parts, kept) == (2, [])


def test_where_malloc_has_no_threshold_parts_are_made_smaller(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(malloc, "_mallopt", lambda *given: False)
    monkeypatch.setattr(malloc, "current", lambda: "glibc")
    assert near(Scattering(), lambda: 1100 * MIB, 3, freed=True) == [1, 2, 4]


def near(
    session: Session, resident: Callable[[], int], steps: int, decisions: Decisions | None = None, *, freed: bool = False
) -> list[int]:
    """Parts of steps, after each of which so much is resident, of a budget of 1,000 MiB; with `freed` what is freed is looked after."""
    guard, position, found = Guard(session, session.rows, lambda text: None), Position(), []
    decisions = decisions or Decisions(None)
    with guard.watching(machine.resident_bytes() + 4096 * MIB):
        assert guard._sizing is not None
        assert guard._watch is not None
        guard._sizing.close()
        guard._freed = guard._freed if freed else None
        for _ in range(steps):
            guard.attempt(lambda: None, decisions, position)
            found.append(session.parts)
            guard._watch.budget_bytes, guard._watch.highest_bytes = 1000 * MIB, resident()
            position.step += 1
        guard._watch.budget_bytes = 8192 * MIB
    return found


def test_beyond_the_budget_parts_are_made_smaller_at_once_and_not_in_vain():
    session = Session()
    assert near(session, lambda: (900 + 220 // session.parts) * MIB, 6) == [1, 2, 4, 4, 4, 4]  # 1,120, 1,010, 955
    assert near(Session(), lambda: 1100 * MIB, 6) == [1, 2, 4, 4, 4, 4]  # which smaller ones do not change


def test_a_run_that_goes_on_remembers_which_splits_were_in_vain(tmp_path: Path):
    file = tmp_path / "decisions.jsonl"
    assert near(Session(), lambda: 1100 * MIB, 6, Decisions(file)) == [1, 2, 4, 4, 4, 4]
    (first, second) = storage.read_lines(file)
    assert (first["phase"], first["highest_bytes"], second["parts"]) == ("approach", 1100 * MIB, 4)
    assert near(Session(parts=4), lambda: 1100 * MIB, 3, Decisions(file, taken=2)) == [4, 4, 4]
    assert near(Session(parts=4), lambda: 1300 * MIB, 3, Decisions(file, taken=2)) == [4, 8, 16]  # for another reason


def test_freed_blocks_are_given_back_before_parts_are_made_smaller(kept: list[str], monkeypatch: pytest.MonkeyPatch):
    resident = machine.resident_bytes
    monkeypatch.setattr(machine, "peak_resident_bytes", lambda: resident() + 50 * MIB)
    assert near(Scattering(), lambda: (1100 if kept[-1] == "kept" else 900) * MIB, 5, freed=True) == [1, 1, 1, 1, 1]
    assert kept == ["fixed", "kept", "fixed", "moved"]
