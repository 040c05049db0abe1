"""`estimate`, `sweep` and `measure` as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import delest
from delest import cli, errors, processes


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8))


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    path = tmp_path / "rows.npz"
    np.savez(path, images=generator.integers(0, 255, (200, 8, 8, 3), dtype=np.uint8), labels=np.arange(200) % 4)
    return path


def test_any_module_is_estimated() -> None:
    found = delest.estimate(
        mlp, torch.zeros(32, 64), targets=torch.zeros(32, dtype=torch.int64), loss=nn.functional.cross_entropy
    )
    assert (found.basis, found.how, found.device, found.allocator, found.batch_size) == (
        "estimate",
        "trace",
        "cpu",
        "glibc",
        32,
    )
    assert found.low_bytes <= found.peak_bytes <= found.high_bytes
    assert sum(found.breakdown.values()) == found.peak_bytes
    weights = 4 * (64 * 256 + 256 + 256 * 8 + 8)
    assert found.breakdown["parameters"] == weights
    assert found.breakdown["optimizer"] >= 2 * weights
    assert found.step_seconds is not None
    assert found.step_seconds > 0
    assert {share.name for share in found.modules} == {"", "0", "1", "2"}
    assert set(found.phases) == {"start", "first_step", "steady_step", "evaluation", "saving", "resuming"}


def test_optimizers_differ_by_their_state() -> None:
    peaks = {
        name: delest.estimate(mlp, torch.zeros(4, 64), optimizer=name, allocator="exact").peak_bytes
        for name in ("sgd", "adamw")
    }
    assert peaks["adamw"] > peaks["sgd"]


def test_a_job_counts_what_a_process_holds_that_has_opened_its_data(npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = delest.estimate(str(npz))
    begin = processes.begin
    monkeypatch.setattr(processes, "begin", lambda function, job, **more: begin("delest.footprint.runtime:none", job, **more))
    bare = delest.estimate(str(npz))
    assert bare.runtime_bytes < opened.runtime_bytes
    assert [any("could not be opened" in note for note in found.notes) for found in (opened, bare)] == [False, True]


def test_a_sweep_agrees_with_single_estimates() -> None:
    swept = delest.sweep(mlp, torch.zeros(4, 64), batch_sizes=(8, 64), allocator="exact")
    for footprint in swept:
        alone = delest.estimate(mlp, torch.zeros(4, 64), batch_size=footprint.batch_size, allocator="exact")
        assert footprint.peak_bytes == pytest.approx(alone.peak_bytes, abs=2048)


def test_smaller_parts_take_less_memory() -> None:
    whole = delest.estimate(mlp, torch.zeros(4, 64), batch_size=4096, allocator="exact")
    parts = delest.estimate(mlp, torch.zeros(4, 64), batch_size=4096, micro_batch=256, allocator="exact")
    assert parts.micro_batch == 256
    assert parts.peak_bytes < whole.peak_bytes


def test_a_device_that_is_not_here() -> None:
    found = delest.estimate(mlp, torch.zeros(32, 64), device="A100 80GB")
    assert (found.device, found.allocator) == ("a100-80", "cuda")
    assert found.runtime_bytes > 100 << 20  # a context
    assert any("datasheet" in note or "not measured" in note for note in found.notes) or found.validated_on == ()


class Choosing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 8)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs = self.layer(inputs)
        return outputs * 2 if bool(outputs.sum() > 0) else outputs


def test_a_model_that_branches_on_data_is_watched_instead() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    found = delest.estimate(Choosing, torch.zeros(16, 64))
    assert found.how == "probe"
    assert any("reads values" in note for note in found.notes)
    assert found.breakdown["parameters"] == 4 * (64 * 8 + 8)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_job_is_estimated_and_measured(npz: Path) -> None:
    job = delest.Job(data=str(npz), target="labels", batch_size=16)
    estimated = delest.estimate(job, threads=1)
    measured = delest.measure(job, steps=2, threads=1)
    assert isinstance(measured, type(estimated))
    assert measured.basis == "measurement"
    assert estimated.breakdown["parameters"] == measured.breakdown["parameters"]
    assert estimated.batch_size == measured.batch_size == 16


BAD = [
    ({"device": "a1000"}, r"unknown device 'a1000'.*did you mean"),
    ({"batch_size": 0}, "a batch of 0 rows cannot be trained on"),
    ({"allocator": "jemalloc"}, "unknown allocator 'jemalloc'"),
    ({"allocator": "cuda"}, "name one with --device"),
    ({"allocator": "glibc", "device": "t4"}, "is a processor's"),
    ({"precision": "fp8"}, "fp8"),
    ({"optimizer": "adamm"}, "unknown optimizer 'adamm'"),
    ({"sequence_length": 0}, "a sequence of 0"),
    ({"threads": -3}, "-3 threads cannot compute"),
    ({"batch_size": 8, "micro_batch": 9}, "larger than the batch of 8"),
    ({"optimizer": torch.optim.LBFGS}, "LBFGS calls the model several times"),
]


@pytest.mark.parametrize(("wishes", "words"), BAD, ids=[str(next(iter(wishes.items()))) for wishes, _ in BAD])
def test_bad_wishes_are_told(wishes: dict[str, object], words: str) -> None:
    with pytest.raises(errors.BadInput, match=words):
        delest.estimate(mlp, torch.zeros(4, 64), **wishes)  # type: ignore[arg-type]


def test_inputs_that_do_not_fit_and_models_that_cannot_be_built() -> None:
    with pytest.raises(errors.BadInput, match=r"a training step failed on \(\d, 7\)"):
        delest.estimate(mlp, torch.zeros(4, 7))
    with pytest.raises(errors.BadInput, match="building the model failed"):
        delest.estimate(lambda: nn.Linear(-1, 2), torch.zeros(4, 7))
    with pytest.raises(errors.BadInput, match="inputs are missing"):
        delest.estimate(mlp())
    with pytest.raises(errors.BadInput, match="have no rows"):
        delest.estimate(mlp, torch.zeros(0, 64))
    with pytest.raises(errors.BadInput, match="no tensor with a batch dimension"):
        delest.estimate(mlp, [])


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--budget", "100GiB"], 0, ""),
        (["--budget", "10MiB"], 3, ""),
        (["--budget", "much"], 2, "'much' is not a size"),
        (["--device", "a1000"], 2, "unknown device 'a1000'"),
        (["--batch-size", "0"], 2, "batch"),
        (["--sweep", "lr"], 2, "--sweep lr"),
        (["--out", "/nowhere/page.html"], 2, "does not exist"),
        (["--out", "page.txt"], 2, "call it page.html"),
        (["--out", "page.html", "--sweep", "batch"], 2, "--out is of one estimate"),
        (["--sequence-length", "9"], 2, "have no sequence axis"),
        (["--threads", "0"], 2, "0 threads"),
    ],
)
def test_estimate_is_a_gate(npz: Path, options: list[str], status: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["estimate", str(npz), "--target", "labels", "--json", "--threads", "1", *options]) == status
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    assert told["error"]["exit_status"] == status if status == 2 else told["peak_bytes"] > 0
    assert words in printed.err


def test_an_optimizer_like_a_given_one() -> None:
    model = mlp()
    given = torch.optim.AdamW(model[0].parameters(), amsgrad=True)  # type: ignore[index]
    found = delest.estimate(model, torch.zeros(4, 64), optimizer=given, allocator="exact")
    trained = 4 * (64 * 256 + 256)
    assert found.breakdown["optimizer"] == 3 * trained + 2 * 4  # three moments of the first layer alone, and two counts
    assert delest.estimate(mlp, torch.zeros(4, 64), optimizer=given, allocator="exact").breakdown["optimizer"] > 3 * trained


class Caching(nn.Module):
    """Keeps tensors and a generator of its own, takes one batch size alone, and reads gradients in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 8)
        self.kept: list[torch.Tensor] = [torch.ones(3)]
        self.generator = torch.Generator()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.last = self.layer(inputs.view(16, 64))
        inputs = inputs.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.layer(inputs).sum(), inputs, create_graph=True)
        return self.last.sum() + slope.sum()


def test_unusual_modules_are_estimated_and_left_alone() -> None:
    model = Caching()
    model(torch.zeros(16, 64))  # leaves a tensor with a history behind
    last = model.last
    found = delest.estimate(model, torch.zeros(16, 64), allocator="exact")
    assert found.breakdown["parameters"] == 4 * (64 * 8 + 8)
    assert model.last is last
    assert any("evaluation could not be traced" in note for note in found.notes)


def test_a_module_built_on_meta_and_one_that_cannot_be_copied() -> None:
    with torch.device("meta"):
        model = mlp()
    assert delest.estimate(model, torch.zeros(4, 64), allocator="exact").breakdown["parameters"] > 0
    with pytest.raises(errors.BadInput, match="give a factory"):
        delest.estimate(torch.jit.script(mlp()), torch.zeros(4, 64))


class Numpy(torch.autograd.Function):
    @staticmethod
    def forward(context: object, inputs: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(inputs.detach().numpy().clip(0))

    @staticmethod
    def backward(context: object, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient


class Clipped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 8)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return Numpy.apply(self.layer(inputs))


def test_a_function_that_uses_numpy_is_watched_instead() -> None:
    assert delest.estimate(Clipped, torch.zeros(4, 64)).how == "probe"


def test_a_page_of_the_estimate(npz: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert cli.main(["estimate", str(npz), "--target", "labels", "--threads", "1", "--quiet", "--out", str(page)]) == 0
    assert "plotly" in page.read_text().lower()


def test_a_script_is_measured_and_keeps_its_output(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script, out = tmp_path / "train.py", tmp_path / "seen.json"
    script.write_text("import sys\nprint('loss 0.5', *sys.argv[1:])\nsys.exit(7)\n")
    assert cli.main(["measure", "--out", str(out), "--", "python", str(script), "--lr", "3"]) == 7
    printed = capfd.readouterr()
    assert printed.out == "loss 0.5 --lr 3\n"
    assert json.loads(out.read_text())["status"] == 7
