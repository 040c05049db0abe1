"""A headless Chromium driven over the DevTools protocol on a pipe: what a page fetched, said, drew and looks like."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = "/usr/bin/chromium"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)

# Chromium reads commands from descriptor 3 and answers on 4. Both are copied out of the way first: the pipe's own
# numbers may be 4 and 3.
LAUNCHER = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
for end, place in zip(ends, (3, 4)):
    os.dup2(end, place)
os.execv(sys.argv[3], sys.argv[3:])
"""


def require_chromium() -> None:
    """Skip the calling test where there is no Chromium; with DELEST_CI=1 fail instead."""
    if Path(CHROMIUM).exists():
        return
    message = f"{CHROMIUM} is missing; `apt-get install chromium` enables this test"
    if os.environ.get("DELEST_CI") == "1":
        pytest.fail(message)
    pytest.skip(message)


class Page:
    """One browser tab. `requests` holds every URL that was asked for, `console` everything that was said or thrown."""

    def __init__(self, commands: int, answers: int):
        self._commands, self._answers = commands, answers
        self._buffer = b""
        self._last = 0
        self._session: str | None = None
        self._loaded = False
        self.requests: list[str] = []
        self.console: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def open(self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load a file and wait until it has loaded and its charts are drawn."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.prefer(dark=dark)
        self._loaded = False
        self.call("Page.navigate", url=path.resolve().as_uri())
        self._until(lambda: self._loaded)
        self.settle()

    def settle(self) -> None:
        """Wait for two animation frames, after which pending layout and drawing are done."""
        self.evaluate(
            "document.fonts.ready.then(() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done))))"
        )

    def prefer(self, *, dark: bool) -> None:
        """Set what `prefers-color-scheme` answers."""
        self.call(
            "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        )

    def resize(self, width: int, height: int = 900) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.evaluate("new Promise(done => setTimeout(done, 300))")  # charts answer to the resize event with a delay
        self.settle()

    def evaluate(self, expression: str) -> Any:
        """The JSON value of a JavaScript expression; promises are awaited. Raises `AssertionError` where it throws."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, out: Path) -> None:
        """A PNG of the whole page, beyond the window too."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        out.write_bytes(base64.b64decode(answer["data"]))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command and return its result; events that arrive meanwhile are noted."""
        self._last += 1
        number = self._last
        replies: list[dict[str, Any]] = []
        message = {
            "id": number,
            "method": method,
            "params": parameters,
            **({"sessionId": self._session} if self._session else {}),
        }
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        self._until(lambda: bool(replies), lambda answer: replies.append(answer) if answer.get("id") == number else None)
        assert "error" not in replies[0], f"{method}: {replies[0]['error']}"
        return replies[0]["result"]

    def _until(self, done: Any, seen: Any = lambda answer: None, seconds: float = 60.0) -> None:
        """Take in messages until `done()`."""
        deadline = time.monotonic() + seconds
        while not done():
            while b"\0" not in self._buffer:
                if not select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))[0]:
                    raise TimeoutError(f"Chromium did not answer within {seconds:g} s")
                chunk = os.read(self._answers, 1 << 20)
                if not chunk:
                    raise ConnectionError("Chromium ended")
                self._buffer += chunk
            message, _, self._buffer = self._buffer.partition(b"\0")
            answer = json.loads(message)
            self._note(answer.get("method"), answer.get("params", {}))
            seen(answer)

    def _note(self, event: str | None, details: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(details["request"]["url"])
        elif event == "Runtime.consoleAPICalled":
            self.console.append(" ".join(str(part.get("value", part.get("description"))) for part in details["args"]))
        elif event == "Runtime.exceptionThrown":
            self.console.append(str(details["exceptionDetails"].get("exception", details["exceptionDetails"])))
        elif event == "Log.entryAdded":
            self.console.append(details["entry"]["text"])
        elif event == "Page.loadEventFired":
            self._loaded = True


@contextlib.contextmanager
def page() -> Iterator[Page]:
    """A tab of a fresh Chromium with an empty profile; the browser ends with the block."""
    folder = tempfile.mkdtemp(prefix="delest-chromium-")
    command_out, command_in = os.pipe()
    answer_out, answer_in = os.pipe()
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            LAUNCHER,
            str(command_out),
            str(answer_in),
            CHROMIUM,
            *FLAGS,
            f"--user-data-dir={folder}/profile",
        ],
        pass_fds=(command_out, answer_in),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": folder},  # a killed browser leaves its temporary files
        start_new_session=True,
    )
    os.close(command_out)
    os.close(answer_in)
    try:
        yield Page(command_in, answer_out)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(command_in)
        os.close(answer_out)
        shutil.rmtree(folder, ignore_errors=True)


def screenshot(path: Path, out_png: Path, width: int = 1280, *, dark: bool = False) -> None:
    """A picture of a whole page at that width in pixels."""
    with page() as tab:
        tab.open(path, width=width, dark=dark)
        tab.screenshot(out_png)
