"""Every bad input: exit status 2 (or 3), one clear message that names the thing and the remedy, existing runs untouched."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import nn

import delest
from delest import errors
from delest.cli import main
from disks import small_disk

HEAD = """
import numpy as np
from torch import nn
import delest

random = np.random.default_rng(0)
x, y = random.normal(size=(200, 6)).astype("float32"), np.arange(200) % 3

def model():
    return nn.Linear(6, 3)
"""


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working folder with a run in it that must stay as it is."""
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / "runs" / "old-001"
    kept.mkdir(parents=True)
    (kept / "job.json").write_text('{"format": 1, "origin": "other.py"}')
    (kept / "run.json").write_text("kept")
    return tmp_path


def write_job(here: Path, text: str) -> str:
    (here / "job.py").write_text(HEAD + textwrap.dedent(text))
    return "job.py"


def refuse(capsys, *arguments: str, status: int = 2) -> str:
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")}
    assert main([*arguments, "--quiet"]) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")} == before, "a run was touched or begun"
    return captured.err


def save_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(path)


def test_a_path_that_does_not_exist(here, capsys):
    (here / "digits.py").write_text("")
    said = refuse(capsys, "train", "digts.py")
    assert "digts.py does not exist" in said
    assert "Did you mean digits.py?" in said


def test_an_empty_folder(here, capsys):
    (here / "photos").mkdir()
    assert "photos" in refuse(capsys, "train", "photos")


def test_a_truncated_jpeg_is_named_and_can_be_left_out(here, capsys):
    for number in range(40):
        save_image(here / "photos" / ("cat" if number % 2 else "dog") / f"{number}.jpg", number)
    whole = (here / "photos" / "dog" / "8.jpg").read_bytes()
    (here / "photos" / "dog" / "8.jpg").write_bytes(whole[: len(whole) // 2])
    said = refuse(capsys, "train", "photos")
    assert "8.jpg" in said
    assert "--skip-bad" in said
    assert main(["inspect", "photos", "--skip-bad", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["rows"] == 39
    assert any("8.jpg" in line for line in summary["left_out"])


def test_layers_without_a_shape_are_named(here, capsys):
    job = """
    def lazy(known):
        network = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyBatchNorm1d(), nn.Linear(8, 3))
        if known:
            import torch
            network(torch.zeros(2, 6))
        return network

    job = delest.Job(model=lambda: lazy(KNOWN), data=(x, y), recipe=delest.Recipe(epochs=1))
    """
    write_job(here, job.replace("KNOWN", "False"))
    for verb in ("train", "estimate"):
        said = refuse(capsys, verb, "job.py")
        assert "0 (LazyLinear), 2 (LazyBatchNorm1d)" in said
        assert "model(torch.zeros(2, 1, 28, 28))" in said
    write_job(here, job.replace("KNOWN", "True"))
    assert main(["train", "job.py", "--quiet", "--out", "r"]) == 0


def test_a_table_without_that_target(here, capsys):
    (here / "loans.csv").write_text("income,repaid\n" + "".join(f"{i},{i % 2}\n" for i in range(50)))
    said = refuse(capsys, "train", "loans.csv", "--target", "repayed")
    assert "repayed" in said
    assert "'repaid'" in said


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_arrays_with_values_that_are_not_finite(here, capsys, value):
    x = np.ones((40, 3), np.float32)
    x[7, 1] = value
    np.savez(here / "data.npz", x=x, y=np.arange(40) % 2)
    said = refuse(capsys, "train", "data.npz")
    assert "data.npz" in said
    assert "7" in said


def test_infinite_table_values_are_refused_and_nan_is_missing(here, capsys):
    rows = "".join(f"{'inf' if i == 9 else i},{'yes' if i % 2 else 'no'}\n" for i in range(60))
    (here / "t.csv").write_text("a,target\n" + rows)
    assert "inf" in refuse(capsys, "train", "t.csv").lower()
    (here / "t.csv").write_text("a,target\n" + rows.replace("inf", "nan"))
    assert main(["inspect", "t.csv", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["columns"][0]["missing"] == 1


def test_a_single_class(here, capsys):
    np.savez(here / "data.npz", x=np.ones((40, 3), np.float32), y=np.zeros(40, int))
    assert "class" in refuse(capsys, "train", "data.npz")


def test_labels_out_of_the_models_range_and_a_model_that_does_not_fit_its_loss(here, capsys):
    said = refuse(
        capsys, "train", write_job(here, "job = delest.Job(model=lambda: nn.Linear(6, 2), data=(x, y), batch_size=16)")
    )
    assert "2 values a row and the data have 3 classes" in said
    assert "must have 3 outputs" in said


@pytest.mark.parametrize(
    ("job", "words"),
    [
        ({"model": lambda: nn.Linear(5, 3)}, "forward failed on float32 [2, 6]: RuntimeError: mat1 and mat2 shapes"),
        ({"model": lambda: nn.Identity()}, "no parameter to train"),
        ({"model": lambda: nn.Sequential(nn.Linear(6, 3)).requires_grad_(False)}, "no parameter to train"),
        ({"loss": lambda outputs, targets: outputs}, "must give one number"),
        ({"loss": lambda outputs, targets: outputs.sum() * float("nan")}, "is nan on the first two rows"),
        ({"loss": "mse"}, "the loss mse does not fit a class target"),
        ({"metric": "rmse"}, "the metric rmse does not judge a class target"),
        ({"model": dict}, "the model factory gave a dict"),
        ({"model": lambda: 1 / 0}, "building the model failed: ZeroDivisionError"),
        ({"step": lambda net, batch: net(batch.inputs).missing}, "the step failed"),
        ({"model": lambda: nn.Sequential(nn.Linear(6, 3), nn.Softmax(1))}, "leave the softmax out"),
        ({"step": lambda net, batch: net(batch.inputs).square().mean(), "predict": lambda net, x: net.missing}, "missing"),
    ],
)
def test_models_and_losses_that_cannot_train(here, job, words):
    random = np.random.default_rng(0)
    data = random.normal(size=(200, 6)).astype(np.float32), np.arange(200) % 3
    whole = {"model": lambda: nn.Linear(6, 3), "data": data, "batch_size": 16, **job}
    with pytest.raises(errors.BadInput) as raised:
        delest.plan(delest.Job(**whole))
    assert words in str(raised.value)


def test_all_faults_of_a_job_are_reported_together(here, capsys):
    job = write_job(
        here,
        "job = delest.Job(model=model, data='nowhere.npz', metric='acuracy', recipe=delest.Recipe(lr=-1.0, schedule='cosin'))",
    )
    said = refuse(capsys, "train", job)
    assert "4 faults" in said
    assert "Did you mean 'accuracy'?" in said
    assert "Did you mean 'cosine'?" in said
    assert "lr is -1" in said
    assert "nowhere.npz" in said


def test_a_batch_larger_than_the_data(here, capsys):
    said = refuse(capsys, "train", write_job(here, "job = delest.Job(model=model, data=(x, y), batch_size=500)"))
    assert "batch of 500 rows is larger than the" in said
    assert "--batch-size" in said


def test_an_output_folder_that_holds_another_run(here, capsys):
    job = write_job(here, "job = delest.Job(model=model, data=(x, y), batch_size=16)")
    said = refuse(capsys, "train", job, "--out", "runs/old-001")
    assert "holds another run" in said
    assert "--resume" in said


def test_a_budget_that_nothing_fits_names_the_smallest_that_works(here, capfd):
    said = refuse(
        capfd,  # a run with a budget is a child of the command
        "train",
        write_job(here, "job = delest.Job(model=model, data=(x, y), batch_size=16)"),
        "--memory",
        "10MB",
        status=3,
    )
    assert "nothing fits 9.5 MiB" in said
    assert "--memory" in said


def test_a_full_disk_is_said_before_training(here, capsys):
    with small_disk(here / "disk", "600k"):
        said = refuse(
            capsys, "train", write_job(here, "job = delest.Job(model=model, data=(x, y), batch_size=16)"), "--out", "disk/run"
        )
        assert "disk" in said
        assert "--out" in said
        assert list((here / "disk").iterdir()) == []


def test_a_disk_that_fills_up_while_training_leaves_the_last_checkpoint(here, capsys):
    job = """
    def large():
        return nn.Sequential(nn.Linear(6, 2048), nn.ReLU(), nn.Linear(2048, 3))

    def step(net, batch):
        global calls
        calls += 1
        import pathlib
        if net.training and calls == 20 and not pathlib.Path("filled").exists():
            pathlib.Path("filled").touch()
            filler = pathlib.Path("disk/filler")
            with open(filler, "wb") as file:
                try:
                    while True:
                        file.write(b"0" * 65536)
                except OSError:
                    pass
        return nn.functional.cross_entropy(net(batch.inputs), batch.targets)

    calls = 0
    job = delest.Job(model=large, data=(x, y), batch_size=16, step=step, predict=lambda net, given: net(given), recipe=delest.Recipe(epochs=4))
    """
    with small_disk(here / "disk", "4m"):
        assert main(["train", write_job(here, job), "--out", "disk/run", "--threads", "1", "--quiet"]) == 2
        said = capsys.readouterr().err
        assert "no room on disk" in said
        assert "Traceback" not in said
        (here / "disk" / "filler").unlink()
        assert main(["train", "--out", "disk/run", "--resume", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["status"] == "done"


def test_weights_to_begin_with_that_do_not_fit(here, capsys):
    from safetensors.numpy import save_file

    save_file({"weight": np.ones((3, 5), np.float32), "bias": np.ones(3, np.float32)}, "w.safetensors")
    job = write_job(here, "job = delest.Job(model=model, data=(x, y), batch_size=16)")
    assert "weight has shape (3, 5), the model's has (3, 6)" in refuse(capsys, "train", job, "--init-from", "w.safetensors")
    assert "none.safetensors does not exist" in refuse(capsys, "train", job, "--init-from", "none.safetensors")


def test_resuming_what_is_not_there_or_has_changed(here, capsys):
    assert "no unfinished run" in refuse(
        capsys, "train", write_job(here, "job = delest.Job(model=model, data=(x, y), batch_size=16)"), "--resume"
    )
    assert "holds no run to resume" in refuse(capsys, "train", "--out", "nowhere", "--resume")


@pytest.mark.parametrize(
    "loss", ["bce", lambda outputs, targets: nn.functional.binary_cross_entropy(outputs[:, 0], targets.float())]
)
def test_a_single_probability_where_a_logit_is_needed(here, loss):
    x = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)
    job = delest.Job(
        model=lambda: nn.Sequential(nn.Linear(6, 1), nn.Sigmoid()), data=(x, np.arange(200) % 2), loss=loss, batch_size=32
    )
    with pytest.raises(errors.BadInput, match="leave the sigmoid out"):
        delest.plan(job)


def test_a_device_that_is_not_there(here, capsys):
    job = write_job(here, "job = delest.Job(model=model, data=(x, y), batch_size=16)")
    assert "unknown device 'tpu'" in refuse(capsys, "train", job, "--device", "tpu")
    import torch

    if not torch.cuda.is_available():
        assert "--device cuda cannot be used" in refuse(capsys, "train", job, "--device", "cuda")


def test_one_hot_targets_need_a_step_or_class_numbers(here, capsys):
    (here / "job.py").write_text(HEAD + "job = delest.Job(model=model, data=(x, np.eye(3)[y]), metric='accuracy')")
    said = refuse(capsys, "train", "job.py")
    assert "target 'target' holds 3 values a row" in said
    assert "argmax" in said
    assert "the metric accuracy does not judge" in said
