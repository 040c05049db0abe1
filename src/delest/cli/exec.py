"""`delest exec`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from delest import errors
from delest.cli import Answer, options

EXAMPLE = "delest exec plan.json -- python train.py --epochs 5"
PlanArgument = Annotated[
    Path | None, typer.Argument(metavar="PLAN", help="a plan.json, as delest plan --json prints it", show_default=False)
]
CommandArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="-- COMMAND", help="after --, a script with its arguments as you start it yourself", show_default=False
    ),
]


@options.with_options()
def exec(plan: PlanArgument = None, command: CommandArgument = None, *, quiet: options.QuietOption = False) -> Answer:
    """Start a script of your own as a plan needs it.

    Its malloc and its threads, which must act before a process starts, are set in the environment; what else the plan holds is for
    delest.apply in the script. Output, signals and exit status are the script's own.
    """
    from delest import verbs

    if plan is None or not command:
        raise errors.BadInput(f"a plan and a command are needed, as in {EXAMPLE}.")
    variables = verbs.environment_for(plan)
    if not quiet:
        words = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
        print(f"exec: {words or 'the plan holds nothing that must act before a process starts'}", file=sys.stderr)
    verbs.execute(command, variables)
