"""What a person sees while work goes on: a live line in a terminal, plain lines elsewhere, all on standard error."""

from __future__ import annotations

import sys
import time
from typing import Any

from delest.units import format_bytes, format_seconds


class Progress:
    """Says nothing: the base of those that do, and what library calls use by default."""

    def stage(self, text: str) -> None:
        """A new stage of the work begins."""

    def note(self, text: str) -> None:
        """Something worth knowing happened."""

    def training_started(self, total_steps: int, step: int) -> None: ...

    def total_changed(self, total_steps: int) -> None: ...

    def stepped(
        self, step: int, total_steps: int, loss: float, samples_per_second: float, resident: int, peak: int
    ) -> None: ...

    def evaluated(self, epoch: float, values: dict[str, float], best: bool) -> None: ...

    def training_finished(self) -> None: ...


class PlainProgress(Progress):
    """One line a stage and an evaluation, and a line of training every ten seconds."""

    def __init__(self) -> None:
        self._last = 0.0
        self._begun: tuple[float, int] | None = None
        self._score = ""

    def stage(self, text: str) -> None:
        self.say(text)

    def note(self, text: str) -> None:
        self.say(f"  {text}")

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def training_started(self, total_steps: int, step: int) -> None:
        self._begun, self._last = (time.monotonic(), step), time.monotonic()

    def stepped(self, step: int, total_steps: int, loss: float, samples_per_second: float, resident: int, peak: int) -> None:
        if time.monotonic() - self._last >= 10:
            self._last = time.monotonic()
            self.say("  " + self.line(step, total_steps, loss, samples_per_second, resident, peak))

    def line(self, step: int, total_steps: int, loss: float, samples_per_second: float, resident: int, peak: int) -> str:
        """Step, loss, the last score, speed, memory now and at its highest, time left."""
        speed = f"{samples_per_second:,.0f} samples/s, " if samples_per_second else ""
        return (
            f"step {step:,} of {total_steps:,}: loss {loss:.4f}, {self._score}{speed}"
            f"memory {format_bytes(resident)} (peak {format_bytes(peak)}){self.left(step, total_steps)}"
        )

    def left(self, step: int, total_steps: int) -> str:
        if self._begun is None or step <= self._begun[1]:
            return ""
        seconds = (time.monotonic() - self._begun[0]) / (step - self._begun[1]) * (total_steps - step)
        return f", {format_seconds(seconds)} left"

    def evaluated(self, epoch: float, values: dict[str, float], best: bool) -> None:
        shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        self._score = shown.partition(",")[0] + ", "
        self.say(f"  epoch {epoch:g}: validation {shown}{'  (best so far)' if best else ''}")


class LiveProgress(PlainProgress):
    """A bar that is drawn again in place, with evaluations printed above it."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        self._bar: Any = None

    def say(self, text: str) -> None:
        self._console.print(text)

    def training_started(self, total_steps: int, step: int) -> None:
        from rich.progress import BarColumn, Progress as Bar, TextColumn

        super().training_started(total_steps, step)
        self._bar = Bar(BarColumn(24), TextColumn("{task.description}"), console=self._console, transient=True)
        self._task = self._bar.add_task("starting", total=total_steps, completed=step)
        self._bar.start()

    def total_changed(self, total_steps: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, total=total_steps)

    def stepped(self, step: int, total_steps: int, loss: float, samples_per_second: float, resident: int, peak: int) -> None:
        if self._bar is not None:
            text = self.line(step, total_steps, loss, samples_per_second, resident, peak)
            self._bar.update(self._task, completed=step, total=total_steps, description=text)

    def training_finished(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def for_terminal(*, quiet: bool = False) -> Progress:
    """Live where standard error is a terminal, plain lines elsewhere, nothing if quiet."""
    if quiet:
        return Progress()
    return LiveProgress() if sys.stderr.isatty() else PlainProgress()
