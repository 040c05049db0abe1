"""A method that a model does not take is tried on two real rows while planning, and its own words say why it was turned down."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import delest
from delest.hardware import roofline
from delest.records.form import from_json
from delest.records.plan import Plan
from delest.training.progress import Progress
from delest.verbs import planning
from delest.verbs.workplace import open_workplace, preprocessing_json
from rooflines import ROOFLINE

MIB = 1 << 20


class Centring(nn.Module):
    """Reads the whole batch through no layer that says so."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.relu(self.first(x - x.mean(0))))


class Scaling(nn.Module):
    """Wants its logits for more than the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Centring(), Centring())
        self.head = nn.Linear(64, 2000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x)) / 2


def test_methods_that_do_not_suit_are_tried_and_turned_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "measure_roofline", lambda threads: ROOFLINE)
    random = np.random.default_rng(0)
    data = random.normal(size=(4000, 64)).astype(np.float32), np.arange(4000) % 50
    recipe = delest.Recipe(precision="fp32", epochs=1)
    place = open_workplace(delest.Job(model=Scaling, data=data, batch_size=512, recipe=recipe), Progress())
    sample = {"rows": 256, "first": 20 * MIB, "steady": 20 * MIB, "evaluation": 10 * MIB, "seconds": 0.5}
    request: dict[str, Any] = {
        "probe": {
            "samples": [sample],
            "variants": {},
            "batch_statistics": False,
            "busy": "",
            "largest_bytes": 1 << 20,
            "device_memory_bytes": None,
            "base_bytes": 4 * MIB,
            "weights_bytes": MIB,
            "state_bytes": 3 * MIB,
            "device": "cpu",
        },
        "budget_bytes": 175 * MIB,
        "asked": True,
        "idle_bytes": 100 * MIB,
        "threads": 1,
    }
    index = [int(row) for row in place.splits["train"][:2]]
    threads = torch.get_num_threads()
    try:
        found = planning.choose_on_traces(place.job, preprocessing=preprocessing_json(place), index=index, request=request)
    finally:
        torch.set_num_threads(threads)
    why = {one.method: one.why for one in from_json(Plan, found).rejected}
    assert "the block 'blocks.0' gives other values for a row alone" in why["layered_accumulation"]
    assert "the logits of 'head' are asked for 'truediv'" in why["chunked_loss"]
