"""Which room may import which, and what a start of the command line must not load."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import delest
from delest.cli import COMMANDS

PACKAGE = Path(delest.__file__).parent
FLOOR = {
    "errors", "records", "metrics", "job", "storage", "processes", "units", "runs", "supervision", "tensors", "malloc",
}  # fmt: skip
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "records": {"errors"},
    "units": {"errors"},
    "malloc": {"errors"},
    "detection": set(),
    "metrics": {"errors", "records"},
    "job": {"errors", "records", "metrics"},
    "storage": {"errors", "records"},
    "processes": {"errors", "job"},
    "tensors": {"errors"},
    "runs": {"errors", "job", "records", "storage"},
    "supervision": {"errors", "runs", "storage", "units"},
    "hardware": FLOOR,
    "data": FLOOR,
    "bundle": FLOOR | {"data"},
    "methods": FLOOR,
    "backends": FLOOR | {"methods"},
    "footprint": FLOOR | {"hardware", "data", "backends", "bundle"},
    "planning": FLOOR | {"methods", "footprint"},
    "training": FLOOR | {"hardware", "data", "backends"},
    "shrinking": FLOOR | {"data", "bundle", "backends", "training", "footprint"},
    "reporting": FLOOR,
    "cli": FLOOR | {"verbs", "reporting"},
    "__main__": {"cli"},
}
MAY_IMPORT["frameworks"] = set(MAY_IMPORT) - {"cli", "__main__"}
MAY_IMPORT["verbs"] = set(MAY_IMPORT) - {"cli", "__main__"}

FRAMEWORKS = {"torch", "torchao", "torch_pruning", "tensorflow", "jax", "keras", "lightning", "transformers"}
NO_FRAMEWORK = {*FLOOR, "data", "bundle", "methods", "planning", "training", "reporting", "cli"}
HOOKED = {"keras", "lightning", "transformers"}  # whose loops the room `frameworks` alone may know
HEAVY = FRAMEWORKS | {"numpy", "pydantic", "polars", "pyarrow", "onnx", "onnxruntime", "PIL", "plotly", "jinja2", "rich"}


def room_of(module: str) -> str:
    """The room of `delest.room.file`, "" for the package itself."""
    return module.partition(".")[2].partition(".")[0]


def imported_modules(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(module, line) of every import, those inside functions and for type checking too; `from a import b` gives a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide the room"
            yield node.module or "", node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def for_types_only(tree: ast.AST) -> set[int]:
    """Lines under `if TYPE_CHECKING:`."""
    blocks = (node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"))
    return {item.lineno for block in blocks for part in block.body for item in ast.walk(part) if hasattr(item, "lineno")}


def wrong_imports(text: str, room: str) -> list[str]:
    """Imports in a file of `room` that the table does not allow. Records may name anybody's types."""
    tree, found = ast.parse(text), []
    spared = for_types_only(tree)
    for module, line in imported_modules(tree):
        if module.split(".")[0] == "delest":
            target = room_of(module)
            known = target in MAY_IMPORT  # `delest.__version__` is no room
            if known and target != room and target not in MAY_IMPORT[room] and not (target == "records" and line in spared):
                found.append(f"line {line}: {room} imports {target}")
        elif module.split(".")[0] in FRAMEWORKS and (
            room in NO_FRAMEWORK or (module.split(".")[0] in HOOKED and room != "frameworks")
        ):
            found.append(f"line {line}: {room} imports {module}")
    return found


def files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] != "__init__.py")


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_only_what_the_table_allows(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert room in MAY_IMPORT, f"{room} is a room that the table does not know"
    assert wrong_imports(path.read_text(), room) == []


@pytest.mark.parametrize(
    ("text", "room", "count"),
    [
        ("from delest.verbs import train", "training", 1),
        ("def f():\n    from delest import cli", "verbs", 1),
        ("import delest.planning.search", "data", 1),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from delest.job import Job", "methods", 0),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from delest.data import Feed", "methods", 1),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from delest.records.run import Run", "errors", 0),
        ("from delest.records.run import Run", "errors", 1),
        ("from delest import __version__, errors, job as jobs", "verbs", 0),
        ("def f():\n    import torch.nn as nn", "data", 1),
        ("import torch", "backends", 0),
        ("import lightning", "backends", 1),
        ("import lightning", "frameworks", 0),
    ],
)
def test_the_table_is_enforced(text: str, room: str, count: int) -> None:
    assert len(set(wrong_imports(text, room))) == count


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh process has loaded after `code`."""
    code += "\nimport json, sys\nprint(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})), file=sys.stderr)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert child.returncode == 0, child.stderr
    return set(json.loads(child.stderr.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import delest",
        "from delest import Job, Recipe, Split",
        "from delest.cli import main; assert main(['--help']) == 0",
        "from delest.cli import main; assert main(['--version']) == 0",
        "import delest.verbs",
    ],
)
def test_a_start_loads_nothing_heavy(code: str) -> None:
    assert loaded_by(code) & HEAVY == set()


@pytest.mark.parametrize(
    "code",
    [
        f"from delest.cli import main\nfor name in {COMMANDS!r}: assert main([name, '--help']) == 0",
        "from delest.cli import main; assert main(['train', '--no-such-option']) == 2",
        "from delest.cli import main; assert main(['inspect', 'no-such-file.py']) == 2",
    ],
)
def test_a_command_loads_at_most_what_typer_reads_values_with(code: str) -> None:
    assert loaded_by(code) & HEAVY <= {"pydantic"}


def test_machine_and_probe_modules_leave_torch_for_when_it_is_asked() -> None:
    loaded = loaded_by(
        "from delest.hardware import accelerators, catalogue, doctor, machine, probes, roofline; machine.describe()"
    )
    assert loaded & FRAMEWORKS == set()
