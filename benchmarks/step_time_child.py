"""Real steps of one case of the zoo, in this process alone; prints one line of JSON.

    python step_time_child.py CASE [ROWS [OPTIMIZER]]

It knows nothing of delest: a plain PyTorch loop on one thread with the allocator as it is. `ROWS` is another batch size and
`OPTIMIZER` (sgd, adamw) another optimizer than the case's.

    step_seconds: median of the steps after the second, processor time, which a busy neighbour disturbs less than it does the clock
    update_seconds: the optimizer's part of it
    steps: how many
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import zoo

LEAST_STEPS, MOST_STEPS, ENOUGH_SECONDS = 3, 20, 4.0  # counted ones
WARM_STEPS = 2  # the first builds kernels, optimizer state is new to the heap until the second


def measure(case: zoo.Case) -> dict[str, Any]:
    model = case.model()
    inputs, targets = case.inputs(case.batch_size)
    optimizer = case.optimizer(model.parameters())
    update: dict[str, float] = {}
    optimizer.register_step_pre_hook(lambda *_: update.update(begun=time.process_time()))
    optimizer.register_step_post_hook(lambda *_: update.update(ended=time.process_time()))
    steps, updates = [], []
    while len(steps) < WARM_STEPS + LEAST_STEPS or (sum(steps) < ENOUGH_SECONDS and len(steps) < MOST_STEPS):
        before = time.process_time()
        case.step(model, optimizer, inputs, targets)
        steps.append(time.process_time() - before)
        updates.append(update["ended"] - update["begun"])
    return {
        "step_seconds": statistics.median(steps[WARM_STEPS:]),
        "update_seconds": statistics.median(updates[WARM_STEPS:]),
        "steps": len(steps) - WARM_STEPS,
    }


def main() -> None:
    name, *changes = sys.argv[1:]
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported
    import torch
    import zoo

    torch.set_num_threads(1)
    names = ("batch_size", "optimizer_name")
    changed = dict(zip(names, changes, strict=False))
    if "batch_size" in changed:
        changed["batch_size"] = int(changed["batch_size"])
    print(json.dumps(measure(dataclasses.replace(zoo.find_case(name), **changed))))


if __name__ == "__main__":
    main()
