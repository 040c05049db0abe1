"""Decisions taken from a clock, from memory pressure or from failures: written down before they act, followed on resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from delest import storage

NOTICES = ("growth",)


class Decisions:
    """The lines of `decisions.jsonl`.

    Lines beyond those that led to the checkpoint at hand are a script: the resumed run takes each again at the same
    step, so that it ends like the run that was not interrupted.
    """

    def __init__(self, path: Path | None, taken: int = 0):
        """`path` None: for a preview, whose decisions are taken and forgotten."""
        self.path = path
        lines = [] if path is None else storage.read_lines(path)
        self._lines = len(lines)
        self.earlier = lines[:taken]  # which led to the checkpoint
        self._script = _standing(lines[taken:], taken)
        self.count = taken

    def scripted(self, kind: str, step: int) -> dict[str, Any] | None:
        """The next decision of the script, where it is of this kind and due at this step."""
        if self._script and self._script[0][1]["kind"] == kind and self._script[0][1]["at"] == step:
            return self._script[0][1]
        return None

    @property
    def following(self) -> bool:
        """Whether decisions of the interrupted run are still to come: the clock is not asked before they are through."""
        return bool(self._script)

    def take(self, kind: str, step: int, **facts: Any) -> None:
        """Write a decision down (on disk when this returns), unless it is the script's next."""
        if self.scripted(kind, step):
            number, _ = self._script.pop(0)
            self.count = number + 1
            return
        if self.path is not None:
            storage.append_line(self.path, {"kind": kind, "at": step, **facts}, sync=True)
        self._lines += 1
        self.count = self._lines

    def notice(self, kind: str, step: int, **facts: Any) -> None:
        """Write down what was noticed and decides nothing: a resumed run does not follow it."""
        if self.path is not None:
            storage.append_line(self.path, {"kind": kind, "at": step, **facts}, sync=True)
        self._lines += 1


def _standing(lines: list[dict[str, Any]], first: int) -> list[tuple[int, dict[str, Any]]]:
    """Numbered lines without notices, and without those that a later line undid by going back before them."""
    standing: list[tuple[int, dict[str, Any]]] = []
    for number, line in enumerate(lines, first):
        if line["kind"] in NOTICES:
            continue
        if "failed_at" in line:  # what failed there took the run back to `at`
            standing = [(n, other) for n, other in standing if other["at"] <= line["at"]]
        standing.append((number, line))
    return standing
