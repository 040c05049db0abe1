"""What other tools say that one case of the zoo takes to train, in this process alone; prints one line of JSON.

    python footprint_peers.py CASE

For each peer {"bytes": N} or, where it does not answer, {"raised": "TYPE: MESSAGE"}. The bytes are compared with the peak above idle
and include whatever margin the tool adds.

MemTracker: torch.distributed._tools.mem_tracker, two steps under it on fake tensors, as its documentation shows.
accelerate: the rule of `accelerate estimate-memory`, largest of "Training using Adam" in float32.
torch-kitsune: kitsune.predict.predict_memory, which takes one shape of one input; of several the first is given.
weights times four: weights, gradients and two moments.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import zoo


def ask_mem_tracker(case: zoo.Case) -> int:
    import torch
    from torch._subclasses import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    model = case.model()  # not under the mode: some initialisations look at values
    with FakeTensorMode() as mode:
        for module in model.modules():
            holders: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for held in holders:
                held.update({name: mode.from_tensor(tensor) for name, tensor in held.items() if tensor is not None})
        inputs, targets = case.inputs(case.batch_size)
        optimizer = case.optimizer(model.parameters())
        tracker = MemTracker()
        batch = list(inputs.values()) if isinstance(inputs, dict) else list(inputs) if isinstance(inputs, tuple) else [inputs]
        tracker.track_external(model, optimizer, *batch, *([] if targets is None else [targets]))
        with tracker:
            for step in range(2):
                case.step(model, optimizer, inputs, targets)
                if not step:
                    tracker.reset_mod_stats()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


def ask_accelerate(case: zoo.Case) -> int:
    from accelerate import init_empty_weights
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes

    with init_empty_weights():
        model = case.model()
    total, _ = calculate_maximum_sizes(model)
    return int(max(estimate_training_usage(total, "float32").values()))


def ask_kitsune(case: zoo.Case) -> int:
    from kitsune.predict import predict_memory

    inputs, _ = case.inputs(1)
    first = next(iter(inputs.values())) if isinstance(inputs, dict) else inputs[0] if isinstance(inputs, tuple) else inputs
    shape = tuple(first.shape[1:])
    answer = predict_memory(case.model(), shape, batch_size=case.batch_size, optimizer=case.optimizer_name, training=True)
    return answer.total_bytes


def ask_rule(case: zoo.Case) -> int:
    import torch

    with torch.device("meta"):
        model = case.model()
    return 4 * sum(math.prod(parameter.shape) * parameter.element_size() for parameter in model.parameters())


PEERS: dict[str, Callable[[Any], int]] = {
    "MemTracker": ask_mem_tracker,
    "accelerate": ask_accelerate,
    "torch-kitsune": ask_kitsune,
    "weights times four": ask_rule,
}


def ask(peer: Callable[[Any], int], case: zoo.Case) -> dict[str, Any]:
    try:
        return {"bytes": peer(case)}
    except Exception as error:  # whatever it is, it is the answer
        return {"raised": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


def main() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported
    import zoo

    case = zoo.find_case(sys.argv[1])
    with contextlib.redirect_stdout(sys.stderr):
        answers = {name: ask(peer, case) for name, peer in PEERS.items()}
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
