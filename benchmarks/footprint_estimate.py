"""What delest estimates for one case of the zoo, in this process alone; prints one line of JSON.

    python footprint_estimate.py CASE [ALLOCATOR ...]

For each allocator (mmap, glibc, exact), in the order given, the bytes above the runtime with their interval, and the seconds that the
estimate took by the clock and of the processor; imports are not counted. `resident_bytes` is the most that this process ever held,
imports included. Beside the zoo's cases there is `llama-8b-4096`: a model of 8 billion parameters on 4,096 tokens, which nothing here
could hold.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import zoo

LLAMA = "llama-8b-4096"
ALLOCATORS = ("mmap", "glibc", "exact")


def find_case(name: str) -> zoo.Case:
    import zoo

    if name != LLAMA:
        return zoo.find_case(name)
    return zoo.Case(
        name=LLAMA,
        kind="Llama, grouped heads",
        network={
            "function": "pretrained",
            "architecture": "LlamaForCausalLM",
            "config": "LlamaConfig",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 8192,
            "rope_theta": 500000.0,
            "use_cache": False,
        },
        data={"function": "labelled_texts", "length": 4096, "vocabulary": 128256},
        loss_name=None,
        batch_size=1,
        optimizer_name="adamw",
        implementation="loop",
        precision="fp32",
    )


def estimate(case: zoo.Case, allocator: str) -> dict[str, Any]:
    """Bytes above `runtime_bytes`, which are those of a warm idle process."""
    import delest

    inputs, targets = case.inputs(case.batch_size)
    before, processor = time.perf_counter(), time.process_time()
    found = delest.estimate(
        case.model,
        inputs,
        targets=targets,
        loss=case.loss,
        optimizer=case.optimizer,
        precision=case.precision,
        batch_size=case.batch_size,
        allocator=allocator,
    )
    return {
        "seconds": time.perf_counter() - before,
        "cpu_seconds": time.process_time() - processor,
        "peak_bytes": found.peak_bytes - found.runtime_bytes,
        "low_bytes": found.low_bytes - found.runtime_bytes,
        "high_bytes": found.high_bytes - found.runtime_bytes,
        "runtime_bytes": found.runtime_bytes,
        "allocated_bytes": found.allocated_bytes,
        "step_seconds": found.step_seconds,
        "how": found.how,
        "notes": list(found.notes),
    }


def main() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported
    import torch

    torch.set_num_threads(1)
    case = find_case(sys.argv[1])
    import torch._dynamo

    import delest.verbs  # noqa: F401

    if case.needs_transformers:
        import transformers

        getattr(transformers, case.network["architecture"])  # they are imported when first asked for
    with contextlib.redirect_stdout(sys.stderr):
        answers = {allocator: estimate(case, allocator) for allocator in sys.argv[2:] or ALLOCATORS}
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({**answers, "resident_bytes": resident}))


if __name__ == "__main__":
    main()
