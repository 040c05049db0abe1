from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import typer

from delest import cli, errors, job as jobs
from delest.cli import options
from delest.records.form import to_json
from delest.records.plan import Plan

VALUES: dict[str, tuple[str, Any]] = {  # as typed after the option, as the field has it; kinds that follow from the type
    "str": ("hold", "hold"),
    "int": ("7", 7),
    "float": ("0.25", 0.25),
    "tuple": ("flip,crop", ("flip", "crop")),
}


def parse(line: list[str], **groups: options.Group) -> dict[str, dict[str, Any]]:
    """What a command with these groups is given by a command line."""
    given: dict[str, dict[str, Any]] = {}

    def command(**values: dict[str, Any]) -> None:
        given.update(values)

    app = typer.Typer(rich_markup_mode=None, add_completion=False)
    decorated = options.with_options(**groups)
    app.command()(decorated(_with_parameters(command, groups)))
    typer.main.get_command(app).main(line, standalone_mode=False)
    return given


def _with_parameters(command: Any, groups: Any) -> Any:
    import inspect

    command.__signature__ = inspect.Signature([inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in groups])
    return command


@pytest.mark.parametrize("field", jobs.RECIPE_FIELDS)
def test_every_field_of_the_recipe_has_an_option(field: str) -> None:
    kind = str({item.name: item.type for item in dataclasses.fields(jobs.Recipe)}[field])
    typed, value = VALUES[kind.removesuffix(" | None").partition("[")[0]]
    given = parse([f"--{field.replace('_', '-')}", typed], changes=options.JOB)["changes"]
    assert list(given) == [f"recipe.{field}"]
    found = options.read_job("tests", given)  # any path that exists will do for data
    assert found is not None
    assert getattr(found.recipe, field) == value
    assert found.set_by[f"recipe.{field}"] == "command line"


@pytest.mark.parametrize(
    ("line", "changed"),
    [
        ("--batch-size 16", {"batch_size": 16}),
        ("--seed 0", {"seed": 0}),
        ("--skip-bad", {"skip_bad": True}),
        ("--no-skip-bad", {"skip_bad": False}),
        ("--split-by day", {"split.by": "day"}),
        ("--split-kind group", {"split.kind": "group"}),
        ("--target y --rows 5 --image-size 32", {"target": "y", "rows": 5, "image_size": 32}),
        ("--loss mse --metric rmse --name n", {"loss": "mse", "metric": "rmse", "name": "n"}),
        ("--augment flip --augment noise", {"recipe.augment": ["flip", "noise"]}),
        ("", {}),
    ],
)
def test_only_what_was_given_changes_the_job(line: str, changed: dict[str, Any]) -> None:
    given = parse(line.split(), changes=options.JOB)["changes"]
    assert given == changed
    found = options.read_job("tests", given)
    assert found is not None
    assert set(found.set_by) == set(changed)


def test_a_path_to_data_stays_right_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.csv").write_text("x,y\n1,2\n")
    monkeypatch.chdir(tmp_path)
    for found in (options.read_job("rows.csv", {}), options.read_job(None, {"data": "rows.csv"})):
        assert found is not None
        assert found.data == str(tmp_path / "rows.csv")


def test_without_job_and_data_it_says_what_to_give() -> None:
    with pytest.raises(errors.BadInput, match="JOB is missing"):
        options.read_job(None, {"seed": 3})


def test_budgets_stay_as_typed_and_the_rest_is_read(tmp_path: Path) -> None:
    plan = Plan(batch_size=64, micro_batch=16)
    (tmp_path / "plan.json").write_text(json.dumps(to_json(plan)))
    line = (
        f"--memory 80% --time 10min --preview 5% --out here --resume --init-from w --plan {tmp_path}/plan.json "
        "--device cpu --threads 1 --checkpoint-every 5min --max-drop 0.5%"
    )
    given = parse(line.split(), training={**options.TRAINING, **options.MAX_DROP})["training"]
    assert options.read_training(given) == {
        "memory": "80%",
        "time": "10min",
        "preview": "5%",
        "out": Path("here"),
        "resume": True,
        "init_from": Path("w"),
        "plan": plan,
        "device": "cpu",
        "threads": 1,
        "checkpoint_seconds": 300.0,
        "max_drop": pytest.approx(0.005),
    }
    assert parse([], training=options.TRAINING) == {"training": {}}


@pytest.mark.parametrize(("text", "drop"), [("0.5%", 0.005), ("0.01", 0.01), ("0", 0.0), ("2.5", 2.5)])
def test_a_drop_is_a_share_or_in_the_unit_of_the_metric(text: str, drop: float) -> None:
    assert options.read_training({"max_drop": text}) == {"max_drop": pytest.approx(drop)}


@pytest.mark.parametrize("text", ["", "-1", "150%", "nan", "inf", "little", "0.5%%"])
def test_what_is_no_drop_is_refused(text: str) -> None:
    with pytest.raises(errors.BadInput, match="--max-drop: "):
        options.read_training({"max_drop": text})


def test_a_run_that_goes_on_needs_no_job() -> None:
    assert options.read_job(None, {}, {"resume": True, "out": Path("runs/x")}) is None
    with pytest.raises(errors.BadInput, match="JOB is missing"):
        options.read_job(None, {}, {"out": Path("runs/x")})


def test_the_verbs_take_what_the_options_give() -> None:
    """The arguments of train, run and shrink are the options' names, so that none is refused when it is first used."""
    import inspect

    verbs = pytest.importorskip("delest.verbs")
    for verb, group in ((verbs.train, options.TRAINING), (verbs.run, {**options.TRAINING, **options.MAX_DROP})):
        assert set(group) <= inspect.signature(verb).parameters.keys()
    assert {"max_drop", "threads", "say"} <= inspect.signature(verbs.shrink).parameters.keys()


def test_every_command_has_its_file() -> None:
    folder = Path(cli.__file__).parent
    assert {path.stem for path in folder.glob("*.py")} == {*cli.COMMANDS, "__init__", "options"}
