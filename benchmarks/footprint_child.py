"""One real measurement of one case of the zoo, in this process alone; prints one line of JSON.

    python footprint_child.py CASE MODE

It knows nothing of delest: a plain PyTorch loop on one thread. Each mode builds the model, the batch and the optimizer and trains.

`mmap`: three steps with malloc's mmap threshold fixed at 65,536 bytes, so that freed blocks go back to the system at once.
`glibc`: three steps with the allocator as it is.
    idle_bytes: resident set of the warm idle process, before the model is built
    peak_bytes: highest resident set above idle, over building and all steps
    steady_peak_bytes: the same over the steps after the first
    rest_bytes: resident set above idle after the last step, gradients still held
    step_cpu_seconds, step_seconds: of each step after the first, processor and wall time
`events`: building and two steps under torch.profiler.
    allocated_peak_bytes: highest running sum of its `[memory]` events, which are all requests to torch's CPU allocator
    allocated_rest_bytes: the sum at the end
    events: their number

A warm idle process has imported torch, torch._dynamo and the model's class, and has taken two tiny steps of a network with all the
zoo's kinds of layers under the case's kind of optimizer.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import zoo

M_MMAP_THRESHOLD, THRESHOLD_BYTES = -3, 65536  # mallopt(3)
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
STEPS = {"mmap": 3, "glibc": 3, "events": 2}


def measure_resident(case: zoo.Case, steps: int) -> dict[str, Any]:
    warm_up(case)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    idle = read_status("VmRSS")
    reset_peak()
    model = case.model()
    inputs, targets = case.inputs(case.batch_size)
    optimizer = case.optimizer(model.parameters())
    case.step(model, optimizer, inputs, targets)
    first = read_status("VmHWM")
    reset_peak()
    cpu_seconds, seconds = [], []
    for _ in range(steps - 1):
        before, wall = time.process_time(), time.perf_counter()
        case.step(model, optimizer, inputs, targets)
        cpu_seconds.append(time.process_time() - before)
        seconds.append(time.perf_counter() - wall)
    steady = read_status("VmHWM")
    return {
        "idle_bytes": idle,
        "peak_bytes": max(first, steady) - idle,
        "steady_peak_bytes": steady - idle,
        "rest_bytes": read_status("VmRSS") - idle,
        "step_cpu_seconds": cpu_seconds,
        "step_seconds": seconds,
    }


def measure_events(case: zoo.Case, steps: int) -> dict[str, Any]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = case.model()
        inputs, targets = case.inputs(case.batch_size)
        optimizer = case.optimizer(model.parameters())
        for _ in range(steps):
            case.step(model, optimizer, inputs, targets)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return {"allocated_peak_bytes": peak, "allocated_rest_bytes": live, "events": len(events)}


def warm_up(case: zoo.Case) -> None:
    """Load what any training of this kind loads, and leave no tensor behind."""
    import torch
    import torch._dynamo  # optimizers and transformers import it at a moment of their own
    import zoo_networks
    from torch.nn import functional

    if case.needs_transformers:
        import transformers

        getattr(transformers, case.network["architecture"])  # they are imported when first asked for
        getattr(transformers, case.network["config"])
    network = zoo_networks.all_layers(sparse=case.network["function"] == "recommender")
    optimizer = case.optimizer(network.parameters())
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=case.precision == "bf16"):
            outputs = network(torch.randn(2, 3, 16, 16), torch.zeros(2, 4, dtype=torch.int64))
            loss = functional.cross_entropy(outputs, torch.tensor([0, 1]))
        loss.backward()
        optimizer.step()


def read_status(name: str) -> int:
    """Bytes of one field of /proc/self/status."""
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    """Begin VmHWM anew from what is resident now."""
    CLEAR_REFS.write_text("5")


def main() -> None:
    name, mode = sys.argv[1:]
    if mode == "mmap" and not ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, THRESHOLD_BYTES):
        sys.exit("mallopt refused the threshold")
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported
    import torch
    import zoo

    torch.set_num_threads(1)
    case = zoo.find_case(name)
    measure = measure_events if mode == "events" else measure_resident
    print(json.dumps({"mode": mode, **measure(case, STEPS[mode])}))


if __name__ == "__main__":
    main()
