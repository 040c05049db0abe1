"""`python -m delest` is the command `delest`."""

import atexit
import contextlib
import os
import sys
import threading
from typing import NoReturn

from delest.cli import main


def command() -> NoReturn:
    """Run the command line and end: at once, for taking a process with a framework apart lasts a second or two."""
    status = main()
    threading._shutdown()  # type: ignore[attr-defined]  # what an interpreter that ends does for threads
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    command()
