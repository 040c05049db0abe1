"""What was trained elsewhere is made smaller: a module with data, a job with weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import delest
from delest import errors, runs
from delest.shrinking import layer_times, pipeline
from delest.training.progress import Progress

JOB = """
import delest
from torch import nn

def network():
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))

job = delest.Job(model=network, data="rows.npz", batch_size=32)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    timed = pipeline.time_alternating
    monkeypatch.setattr(pipeline, "time_alternating", lambda calls: timed(calls, seconds=0.0))
    monkeypatch.setattr(layer_times, "_CALLS", 1)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data():
    x = np.random.default_rng(0).normal(3.0, 2.0, (1200, 20)).astype(np.float32)
    return x, (x[:, :5].sum(1) > 15).astype(np.int64)


@pytest.fixture
def trained(data):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    inputs, targets = map(torch.from_numpy, data)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(inputs), targets).backward()
        optimizer.step()
    return network.eval()


def test_a_trained_module_is_judged_as_it_is_and_made_smaller(trained, data):
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    shrunk = delest.shrink(trained, data, max_drop=0.2, time=1.0, out="r", say=Progress())
    run = runs.read(shrunk.path.parent)
    assert run.status == "done"
    assert run.steps == 0
    assert run.test["accuracy"] > 0.9
    fp32 = next(one for one in shrunk.candidates if one.name == "fp32")
    assert fp32.bound is not None
    assert fp32.bound.disagreeing == 0  # these very weights
    assert next(one.file_bytes for one in shrunk.candidates if one.name == shrunk.shipped) < fp32.file_bytes / 2
    assert all(torch.equal(before[name], tensor) for name, tensor in trained.state_dict().items())
    assert len(delest.predict(shrunk.path, [save_rows(data[0])])) == 4


def save_rows(x):
    np.save("some.npy", x[:4])
    return "some.npy"


def test_a_job_with_weights_is_made_smaller_and_found_again(trained, data, tmp_path):
    (tmp_path / "elsewhere.py").write_text(JOB)
    np.savez("rows.npz", x=data[0], y=data[1])
    save_file(trained.state_dict(), "net.safetensors")
    shrunk = delest.shrink("elsewhere.py", weights="net.safetensors", max_drop=0.2, time=0, out="r", say=Progress())
    assert runs.read(shrunk.path.parent).test["accuracy"] > 0.9
    with torch.no_grad():
        loaded = delest.load("r")(torch.from_numpy(data[0][:8]))
        expected = trained(torch.from_numpy(data[0][:8]))
    torch.testing.assert_close(loaded, expected)
    again = delest.shrink("r", max_drop=0.2, time=0, say=Progress())
    assert again.path == shrunk.path


def test_what_cannot_be_adopted_is_refused(trained, data, tmp_path):
    with pytest.raises(errors.BadInput, match="says nothing of its data"):
        delest.shrink(trained, say=Progress())
    with pytest.raises(errors.BadInput, match="a dict cannot be made smaller"):
        delest.shrink({}, data, say=Progress())
    with pytest.raises(errors.BadInput, match="are for what was trained elsewhere"):
        delest.shrink("r", data, say=Progress())
    (tmp_path / "elsewhere.py").write_text(JOB)
    np.savez("rows.npz", x=data[0], y=data[1])
    save_file({"0.weight": torch.zeros(3, 3)}, "wrong.safetensors")
    with pytest.raises(errors.BadInput, match="these weights do not fit the model"):
        delest.shrink("elsewhere.py", weights="wrong.safetensors", out="r", say=Progress())
    assert not (tmp_path / "r").exists()
    with pytest.raises(errors.BadInput):
        delest.shrink("elsewhere.py", weights="nowhere.safetensors", out="r", say=Progress())
