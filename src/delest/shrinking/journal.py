"""The journal of a shrink, `RUN/shrinking/decisions.jsonl`: what a clock decided, on disk before it acts, so that who is killed and asked again, and
who follows the journal in a copy of the run, ends with the same artefact.

Its lines: `settings` (which it belongs to), `step` (of how many channels widths are multiples), `begun` (a network, how much of the last one is cut and for how long it
learns), `layers` (their seconds, by which cuts are weighed), `teaching` (whether the trained network teaches), `decided` (what became of it, with the checksum of its weights), `timed` (seconds of
an answer by form), `shipped`. What a rung's training decides is in its own folder, in the `decisions.jsonl` that every training has.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from delest import storage


class Journal:
    """Lines by kind and name; of two alike the later one holds."""

    def __init__(self, path: Path, *, repeated: bool = False):
        """`repeated`: what the journal led to is there, so who asks for it again wants times measured again."""
        self.path = path
        lines = storage.read_lines(path)
        ends = [number for number, line in enumerate(lines, 1) if line["kind"] == "shipped"]
        followed = bool(ends) and ends[-1] == len(lines) and not repeated
        self._timed_from = ([0, *ends])[-2 if followed else -1]  # earlier times are those of earlier artefacts

    def open(self, settings: Mapping[str, Any]) -> None:
        """Go on where the journal has these very settings, or begin anew, without anything that lies beside it."""
        line = {"kind": "settings", "name": "", **settings}
        if line not in storage.read_lines(self.path):
            self.path.unlink(missing_ok=True)  # first: what is half removed must not be believed
            shutil.rmtree(self.path.parent, ignore_errors=True)
            self._timed_from = 0
            self._append(line)
        for leftover in self.path.parent.rglob(".*.tmp"):  # of a process that was killed while it wrote a file
            if leftover.is_file():
                leftover.unlink()

    def found(self, kind: str, name: str) -> dict[str, Any] | None:
        """What was noted last of this kind and name."""
        lines = storage.read_lines(self.path)
        lines = lines[self._timed_from :] if kind == "timed" else lines
        return next((line for line in reversed(lines) if line["kind"] == kind and line["name"] == name), None)

    def note(self, kind: str, name: str, **facts: Any) -> dict[str, Any]:
        """Write a line, on disk when this returns; gives it as it will be read."""
        self._append({"kind": kind, "name": name, **facts})
        line = self.found(kind, name)
        assert line is not None
        return line

    def follow(self, kind: str, name: str, decide: Callable[[], Mapping[str, Any]], **where: Any) -> dict[str, Any]:
        """What was decided before, or what `decide` says now, written down; one that was decided elsewhere (`where`) does not hold."""
        line = self.found(kind, name)
        if line is None or {key: line.get(key) for key in where} != where:
            line = self.note(kind, name, **where, **decide())
        return line

    def _append(self, line: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        storage.append_line(self.path, dict(line), sync=True)
        storage.sync_folder(self.path.parent)
