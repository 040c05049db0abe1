"""The memory guard: holds a run's resident set within its budget while it runs.

The soft RLIMIT_DATA turns "killed for memory" into an allocation that fails: the step, which is then as if it had never
begun, is made again with the batch in more parts. A thread watches what is resident and tightens the limit where memory
that no allocation asked for comes into use. Every split is a decision, which a resumed run takes before the same step.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from delest import errors, malloc
from delest.training import limit
from delest.training.freed import Freed
from delest.training.growth import Growth, GrowthWatch
from delest.training.limit import MARGIN_BYTES, too_small
from delest.training.sizing import Sizing
from delest.units import format_bytes

if TYPE_CHECKING:
    from delest.backends import Splits
    from delest.training.decisions import Decisions
    from delest.training.position import Position

NEAR_BYTES = 8 << 20  # below the budget: what only the margin holds back
RISEN_BYTES = 64 << 20  # beyond what was resident when splits did not help: another reason, for which they may
PATIENCE = 10  # steps between two splits for closeness alone: the first must show its effect
MOST_STARTED = 16  # threads, until one has the main heap: glibc gives heaps out by turns
SPARED = 8  # times in a run that a step is tried again as it is
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Failure:
    """An allocation that failed; the error itself is let go, since its traceback holds the step's tensors."""

    phase: str
    detail: str
    begun: bool = False

    @property
    def harmful(self) -> bool:
        """Whether the update may be half done."""
        return self.begun or self.phase == "optimizer"

    @property
    def asked_bytes(self) -> int:
        """0 where the words do not tell."""
        found = re.search(r"allocate (\d+) bytes", self.detail)
        return int(found[1]) if found else 0


class Guard:
    """Watches one run's memory. Without a budget it lets everything through, and follows what an earlier part decided. `option` is how a larger budget is asked for."""

    def __init__(self, session: Splits, batch_size: int, note: Callable[[str], None], *, option: str = "--memory "):
        self.session, self.batch_size, self.note, self.option = session, batch_size, note, option
        self.budget_bytes: int | None = None
        self._watch: limit.Limit | None = None
        self._growth: GrowthWatch | None = None
        self._owner = ""
        self._thread: ThreadPoolExecutor | None = None
        self._spared, self._eased_at = 0, -PATIENCE
        self._sizing: Sizing | None = None
        self._freed: Freed | None = None
        self._told, self._eased = False, list[int]()  # what was resident at each split for closeness alone

    @contextlib.contextmanager
    def watching(self, budget_bytes: int | None) -> Iterator[None]:
        """Guard a budget of resident bytes while the context is open; None guards nothing, but keeps what steps free where the machine has the room.

        Raises `NothingFits` where memory ran out outside a step, as when a batch was read.
        """
        if budget_bytes is None:
            self._freed = Freed.of_machine()
            try:
                yield
            finally:
                self._leave_malloc()
            return
        self.budget_bytes, self._growth = budget_bytes, GrowthWatch(budget_bytes)
        with limit.held(budget_bytes) as self._watch:
            assert self._watch is not None
            try:
                self._freed = Freed(budget_bytes, scatters=getattr(self.session, "scatters", False))
                if getattr(self.session, "sized", False):
                    self._watch.only_watch()
                    self._sizing = Sizing(self.session, budget_bytes, self.option)
                with self._watch.lifted():
                    self.session.warm()
                self._watch.begin_anew(widen=True)
                yield
            except MemoryError as error:
                raise self._too_small(_Failure("reading", str(error))) from None
            finally:
                self._watch = None
                self._leave_malloc()
                self._end_thread()

    def attempt(
        self,
        work: Callable[[], Result],
        decisions: Decisions,
        position: Position,
        *,
        rows: int | None = None,
        evaluating: bool = False,
    ) -> Result:
        """What `work` gives: a step on `rows` rows (None: a whole batch), or an evaluation. Where memory runs out it is begun again with the batch in more parts.

        Raises `NothingFits` where no smaller parts are left; `OutOfMemory` where the update failed, which may be half done.
        """
        if not self._told:
            self._told = True
            for line in decisions.earlier:
                self._note_split(line)
        self.follow(decisions, position, evaluating=evaluating)
        small = rows is not None and rows < self.batch_size  # the last of an epoch, which says nothing of whole batches
        if self._watch is None:
            result = work()
            if self._freed is not None and not evaluating and not small:
                self._freed.stepped()
            return result
        if not evaluating:
            self._ease(decisions, position)
        sizing = self._sizing
        if evaluating or small or sizing is None or not sizing.wants(position.step):
            sizing = None
        tried: set[int] = set()  # parts
        while True:
            self._watch.highest_bytes = 0
            if sizing is not None:
                sizing.begin(position.step, self.batch_size)
            try:
                result = work() if self._thread is None else self._thread.submit(work).result()
            except (errors.OutOfMemory, MemoryError) as error:
                failure = _failure(error, evaluating)
            else:
                if not evaluating:
                    parts = self.session.parts
                    self._size(sizing, decisions, position)
                    if self._freed is not None and parts == self.session.parts and sizing is None and not small:
                        self._freed.stepped()
                    self._look_for_growth(decisions, position)
                return result
            self._give_back_freed()
            if failure.harmful:
                raise errors.OutOfMemory(failure.phase, failure.detail, failure.begun)
            again = self.session.parts not in tried and self._was_address_space(failure)
            tried.add(self.session.parts)
            if not again:
                self.split(decisions, position, failure)
            self._watch.begin_anew(widen=again)
            self._change_thread()

    def _size(self, sizing: Sizing | None, decisions: Decisions, position: Position) -> None:
        """Set the parts that a sizing found, as the interrupted run did after this very step if there was one."""
        line = decisions.scripted("split", position.step)
        why = None if sizing is None else sizing.end(self.batch_size)
        if line and line["phase"] == "sizing":
            decisions.take("split", position.step)
            self.session.parts = line["parts"]
            if self._sizing is not None:
                self._sizing.close()
        elif why:
            decisions.take("split", position.step, phase="sizing", parts=self.session.parts, why=why)
            self.note(f"step {position.step:,}: {why}.")
        else:
            return
        position.parts, position.decisions = self.session.parts, decisions.count
        assert self._watch is not None
        self._watch.highest_bytes = 0  # of the parts before

    def _leave_malloc(self) -> None:
        if self._freed is not None:
            self._freed.close()
            self._freed = None

    def _give_back_freed(self) -> bool:
        """Have what steps free go back from here on; whether it did not, so that there may be room now."""
        given = self._freed is not None and self._freed.give_back()
        if given and self._watch is not None:
            self._watch.highest_bytes = 0
        return given

    def _change_thread(self) -> None:
        """Go on in another thread: oneDNN's code generator (Xbyak) remembers for each thread that an allocation failed, and then
        makes no kernel for any new shape in it. Here, as long as its kernels do, where a limit from outside leaves no room for stacks."""
        assert self._watch is not None
        self._end_thread()
        with self._watch.lifted():
            if limit.has_room_for_threads():
                self._thread = _started()
            if self._thread is not None:
                try:
                    self._thread.submit(self.session.warm).result()
                except RuntimeError:
                    self._end_thread()
        self._watch.begin_anew()  # what the thread took for itself and uses is no room

    def _end_thread(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def read_again(self, error: MemoryError) -> None:
        """After memory ran out outside a step, as when a batch was read: return where it is worth another try.

        Raises `NothingFits` where it is not, and without a budget what was raised.
        """
        failure = _Failure("reading", str(error))
        if self._watch is None:
            raise error
        self._give_back_freed()
        if not self._was_address_space(failure):
            raise self._too_small(failure)
        self._watch.begin_anew(widen=True)

    def make_room(self) -> None:
        """Before something other than a step that takes memory: what steps have freed is given back, and the limit set for what is left."""
        if self._watch is not None:
            self._watch.begin_anew(widen=True)

    def follow(self, decisions: Decisions, position: Position, *, evaluating: bool = False) -> bool:
        """Split as the interrupted run did before this very step or evaluation; whether it did."""
        followed = False
        while (line := decisions.scripted("split", position.step)) and (line["phase"] == "evaluation") == evaluating:
            if line["phase"] == "sizing":  # after the step
                break
            decisions.take("split", position.step)
            self._note_split(line)
            self.session.parts = max(self.session.parts, line["parts"])
            position.decisions, followed = decisions.count, True
            self.keep_parts()
            self._give_back_freed()
        return followed

    def keep_parts(self) -> None:
        """No fewer parts than the session has, from here on."""
        if self._sizing is not None:
            self._sizing.at_least(self.session.parts)

    def split(self, decisions: Decisions, position: Position, failure: _Failure, **facts: Any) -> None:
        """Decide on more parts. Raises `NothingFits` where there can be no more."""
        self._divide(decisions, position, failure.phase, f"memory ran out in the {failure.phase} phase", failure, **facts)

    def take_back(self, decisions: Decisions, position: Position, error: errors.OutOfMemory, failed_at: int) -> None:
        """Decide on more parts from a checkpoint on, since the step that failed left its mark."""
        self.split(decisions, position, _Failure(error.phase, error.detail), failed_at=failed_at)
        if self._watch is not None:
            self._watch.begin_anew()

    def parts_after_crash(self, parts: int, how: str, budget_bytes: int | None) -> dict[str, Any]:
        """The decision of a run whose process was ended at `parts`, by a signal that is told in words.

        Raises `NothingFits` where there can be no more parts.
        """
        self.budget_bytes = budget_bytes
        self.session.parts = max(self.session.parts, parts)
        if self.session.parts >= self.session.most_parts:
            raise self._too_small(_Failure("training", how))
        parts = self._next_parts()
        return {"phase": "crash", "parts": parts, "why": f"the process ended ({how}): {self._rows_words(parts)}"}

    def _ease(self, decisions: Decisions, position: Position) -> None:
        """Split before a step where the last one came too close to the budget."""
        assert self._watch is not None
        highest, sizing = self._watch.highest_bytes, self._sizing
        left = self._watch.budget_bytes - highest
        patience = 0 if sizing is not None and left < 0 else PATIENCE  # where nothing but the watch holds it back
        if (
            left >= NEAR_BYTES
            or position.step - self._eased_at < patience
            or (sizing is not None and sizing.wants(position.step))
        ):
            return
        if self._give_back_freed():
            self._watch.begin_anew()
            return
        if self.session.parts >= self.session.most_parts or (sizing is not None and self._split_in_vain(highest)):
            return
        self._eased_at = position.step
        self._note_split({"highest_bytes": highest})
        why = f"the resident set came to {format_bytes(highest)}"
        self._divide(decisions, position, "approach", why, _Failure("approach", ""), highest_bytes=highest)
        self._watch.begin_anew()

    def _split_in_vain(self, highest: int) -> bool:
        """Whether the last two splits for closeness have not helped: what grows is something else, such as what is read ahead."""
        return len(self._eased) > 1 and self._eased[-2] - NEAR_BYTES < highest < max(self._eased) + RISEN_BYTES

    def _note_split(self, decision: dict[str, Any]) -> None:
        highest = decision.get("highest_bytes")  # of a split for closeness alone
        if highest is not None:
            if highest >= max(self._eased, default=highest) + RISEN_BYTES:
                self._eased.clear()
            self._eased.append(highest)

    def _divide(self, decisions: Decisions, position: Position, phase: str, why: str, failure: _Failure, **facts: Any) -> None:
        if self.session.parts >= self.session.most_parts:
            raise self._too_small(failure)
        parts = self._next_parts()
        why = f"{why}, of a budget of {format_bytes(self.budget_bytes or 0)}: {self._rows_words(parts)}"
        decisions.take("split", position.step, phase=phase, parts=parts, why=why, **facts)
        self.session.parts, position.parts, position.decisions = parts, parts, decisions.count
        self.keep_parts()
        self.note(f"step {position.step:,}: {why}.")

    def _next_parts(self) -> int:
        return min(2 * self.session.parts, self.session.most_parts)

    def _rows_words(self, parts: int) -> str:
        now, then = (math.ceil(self.batch_size / number) for number in (self.session.parts, parts))
        return f"{parts} parts of {then} row{'s' * (then > 1)} instead of {self.session.parts} of {now}"

    def _was_address_space(self, failure: _Failure) -> bool:
        """Whether there was memory, and only the limit was too tight: threads that started since took address space for
        stacks that they hardly touch, and a failed backward keeps some."""
        assert self._watch is not None
        highest = max(self._watch.highest_bytes, self._watch.resident_bytes())
        if highest + failure.asked_bytes + 2 * MARGIN_BYTES > self._watch.budget_bytes or self._spared == SPARED:
            return False
        self._spared += 1
        return True

    def _look_for_growth(self, decisions: Decisions, position: Position) -> None:
        assert self._growth is not None
        assert self._watch is not None
        found = self._growth.stepped(self._watch.resident_bytes())
        unseen = found is not None and found.owner is None and self._freed is not None and self._freed.kept
        if found is not None and not unseen:  # what is kept comes into use bit by bit
            why = _growth_words(found)
            self._owner = f" {why[0].upper()}{why[1:]}."
            decisions.notice("growth", position.step, why=why, bytes_per_step=found.bytes_per_step)
            self.note(f"step {position.step:,}: {why}.")

    def _too_small(self, failure: _Failure) -> errors.NothingFits:
        """The error that names the smallest budget, as well as one failed allocation tells it."""
        budget, least = self.budget_bytes or 0, math.ceil(self.batch_size / max(1, self.session.most_parts))
        highest = max(budget - MARGIN_BYTES, self._watch.highest_bytes if self._watch is not None else 0)
        asked = f" when {format_bytes(failure.asked_bytes)} more were asked for" if failure.asked_bytes else ""
        how = failure.detail if failure.phase == "training" else f"memory ran out in the {failure.phase} phase{asked}"
        why = f"{how}, with {least} row{'s' * (least > 1)} at a time"
        return too_small(budget, highest + max(failure.asked_bytes, MARGIN_BYTES), why, self._owner, self.option)


def _started() -> ThreadPoolExecutor | None:
    """A thread, on the main thread's heap if one can be had; None where none can be started."""
    started = list[ThreadPoolExecutor]()
    with contextlib.suppress(RuntimeError):  # a limit on the number of threads
        on_main_heap = False
        while not on_main_heap and len(started) < MOST_STARTED:
            thread = ThreadPoolExecutor(1, "memory-guard-work")
            on_main_heap = thread.submit(malloc.has_main_heap).result()
            started.append(thread)
    for thread in started[:-1]:
        thread.shutdown()
    return started[-1] if started else None


def _failure(error: errors.OutOfMemory | MemoryError, evaluating: bool) -> _Failure:
    if isinstance(error, errors.OutOfMemory):
        return _Failure(error.phase, error.detail, error.begun)
    return _Failure("evaluation" if evaluating else "forward", str(error))


def _growth_words(found: Growth) -> str:
    """ "264 KiB a step: a list of 412 tensors (103 MiB) held by `history` in train.py"."""
    owner = found.owner or "nothing that Python holds; libraries or the allocator keep it"
    return f"memory grows by {format_bytes(found.bytes_per_step)} a step: {owner}"
