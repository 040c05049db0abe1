"""Kernels run alone: what they take is kept, and what cannot be run harms nobody."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from delest.backends.torch import kernels
from delest.footprint import scratch as scratches
from delest.footprint.runtime import measure_runtime


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DELEST_CACHE", str(tmp_path))
    return tmp_path


def call(func: Any, *args: Any, **kwargs: Any) -> str:
    return kernels.signature(func, args, kwargs)


def test_only_opaque_calls_are_written_down() -> None:
    ones = torch.ones(2, 2)
    assert call(torch.ops.aten.add.Tensor, ones, ones) == ""
    assert call(torch.ops.aten.view.default, ones, [4]) == ""
    assert call(torch.ops.aten.clone.default, ones) == ""
    assert call(torch.ops.aten.mm.default, ones, ones) == ""
    written = json.loads(call(torch.ops.aten.logsumexp.default, ones, [1]))
    assert written[0] == "aten.logsumexp.default"
    assert written[1][0] == {"dtype": "float32", "size": [2, 2], "stride": [2, 1]}


def test_sizes_between_two_numbers_of_rows() -> None:
    def product(rows: int) -> str:
        return call(torch.ops.aten.bmm.default, torch.ones(1, rows * 3, 5), torch.ones(1, 5, 7))

    assert kernels.between(product(2), product(10), (2, 10), 4) == product(4)
    assert kernels.between(product(2), product(10), (2, 7), 4) is None  # 24 is no multiple of 5
    assert kernels.operand_bytes(product(2)) == 4 * (6 * 5 + 5 * 7)


def test_scratch_is_measured_once_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logarithms of sums over 1,000 columns need a buffer of their own inside the kernel."""
    text = call(torch.ops.aten.logsumexp.default, torch.ones(64, 1000), [1])
    broken = json.dumps(["aten.mm.default", [{"dtype": "float32", "size": [2, 3], "stride": [3, 1]}] * 2, {}])
    found = scratches.scratch([text, broken, ""])
    assert list(found) == [text]  # shapes that do not fit cannot be run, which is no error
    assert found[text]["outputs"] == [64 * 4]
    assert found[text]["scratch"] >= 64 * 1000 * 4
    monkeypatch.setattr(scratches.processes, "call", lambda *a, **k: pytest.fail("it is known already"))
    assert scratches.scratch([text, broken]) == found


def test_a_process_that_was_loading_meanwhile_is_used_first(monkeypatch: pytest.MonkeyPatch) -> None:
    text, other = (call(torch.ops.aten.logsumexp.default, torch.ones(2, columns), [1]) for columns in (2, 3))
    with scratches.soon() as soon:
        calls: list[str] = []
        of = scratches.processes.call
        monkeypatch.setattr(scratches.processes, "call", lambda *a, **k: (calls.append(a[0]), of(*a, **k)))
        assert list(soon([text])) == [text]
        assert calls == []
        assert list(soon([other])) == [other]
        assert calls == [scratches.KERNELS]


def test_a_call_that_kills_its_process_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    good = call(torch.ops.aten.logsumexp.default, torch.ones(2, 2), [1])
    bad = json.dumps(["aten.mkldnn_rnn_layer_backward.default", [], {}])
    monkeypatch.setattr(scratches.processes, "call", _dying(scratches.processes.call, bad))
    assert set(scratches.scratch([bad, good])) == {good}


def _dying(call_of: Any, deadly: str) -> Any:
    def call(function: str, job: None, **arguments: Any) -> Any:
        if arguments["signatures"][0] == deadly:
            raise scratches.errors.ProbeFailed("killed by signal 11")
        return call_of(function, job, **arguments)

    return call


def test_a_recurrent_layer_has_its_workspace() -> None:
    layer, tokens, hidden = torch.nn.LSTM(64, 128), 40, 128
    weights = [parameter.detach() for parameter in layer.parameters()]
    state = torch.zeros(1, 8, hidden)
    text = call(
        torch.ops.aten.mkldnn_rnn_layer.default,
        *(torch.zeros(tokens, 8, 64), *weights, state, state, False, [], 2, hidden, 1, True, False, False, True),
    )
    found = scratches.scratch([text]).get(text)
    if found is None:
        pytest.skip("this build of torch has no oneDNN layer")
    assert found["outputs"][-1] > tokens * 8 * hidden * 4
    assert 0 < found.get("touched", 1.0) <= 1


def test_the_runtime_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measure_runtime(1)
    assert 50 << 20 < found.idle_bytes < 2 << 30
    assert 0 < found.touched_bytes < 256 << 20
    monkeypatch.setattr("delest.footprint.runtime.processes.call", lambda *a, **k: pytest.fail("it is known already"))
    assert measure_runtime(1) == found
