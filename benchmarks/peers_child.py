"""One training of benchmarks/peers.py: a script as its library's documentation writes it, under a limit that its parent sets.

    python peers_child.py HOW JOB BATCH [BUDGET]

HOW is `lightning-power` or `lightning-binsearch` (the two modes of its batch-size finder), `accelerate`, `checkpoint` (each block recomputed),
`plain`, or `delest` as it comes and `delest-fp32`, which are told BUDGET, 0 for none. BATCH is the micro-batch: a number by hand, or `find`, which leaves it to the
library's finder (`checkpoint` and `plain`: the whole batch). The effective batch is the job's: what is smaller is accumulated.

Tells its parent `ready` once libraries and data are loaded (and, for delest, the plan is made, whose child processes would inherit the
limit), and waits for a line. Then it prints what the search found as JSON, and a line for each optimizer step.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).parent


def ready() -> None:
    """Wait for the limit, with what a first step loads loaded: libraries are no data, and would go beyond it unseen."""
    import torch

    weight = torch.nn.Parameter(torch.ones(1 << 18))  # large enough for the threads of parallel operators
    weight.exp().sum().backward()
    torch.optim.AdamW([weight]).step()
    print("ready", flush=True)
    sys.stdin.readline()


def found(micro_batch: int, seconds: float, **more: Any) -> None:
    print(json.dumps({"micro_batch": micro_batch, "search_seconds": seconds, **more}), flush=True)


def stepped(loss: Any) -> None:
    print(f"loss {float(loss):.6f}", flush=True)


def load(name: str) -> Any:
    """The job's parts without anything of delest that trains."""
    import peers_jobs
    import torch
    from torch.utils.data import TensorDataset

    job = getattr(peers_jobs, name)()
    inputs, targets = job.data

    def loss(model: Any, x: Any, y: Any) -> Any:
        if job.step is not None:
            return job.step(model, SimpleNamespace(inputs=x, targets=y))
        return torch.nn.functional.cross_entropy(model(x), y, label_smoothing=job.recipe.label_smoothing)

    rows = len(inputs) // job.batch_size * job.batch_size  # so that each epoch is whole batches
    data = TensorDataset(torch.from_numpy(inputs[:rows]), torch.from_numpy(targets[:rows]))
    return SimpleNamespace(model=job.model, data=data, loss=loss, batch=job.batch_size)


def divisor(batch: int, most: int) -> int:
    """The largest micro-batch of at most so many rows of which the batch is a multiple: gradients are accumulated over equal parts."""
    return next(rows for rows in range(min(batch, most), 0, -1) if batch % rows == 0)


# The peers


def lightning(job: Any, rows: int | None, mode: str) -> None:
    import lightning as L
    import torch
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.tuner import Tuner
    from torch.utils.data import DataLoader

    class Module(L.LightningModule):
        def __init__(self, batch_size: int):
            super().__init__()
            self.batch_size, self.model = batch_size, job.model()

        def train_dataloader(self) -> Any:
            return DataLoader(job.data, batch_size=self.batch_size, shuffle=True)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return job.loss(self.model, *batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    class Told(Callback):
        step = 0

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step > self.step:
                self.step = trainer.global_step
                stepped(outputs["loss"])

    def trainer(**more: Any) -> Any:
        return L.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            **more,
        )

    ready()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        model = Module(rows or 1)
        if rows is None:
            # A size at max_val is taken without a trial: twice the batch leaves the batch itself to be tried.
            rows = Tuner(trainer()).scale_batch_size(model, mode=mode, max_val=2 * job.batch)
            rows = model.batch_size = divisor(job.batch, rows or 1)
        found(rows, time.perf_counter() - started)
        trainer(accumulate_grad_batches=job.batch // rows, callbacks=[Told()]).fit(model)


def accelerate(job: Any, rows: int | None) -> None:
    import torch
    from accelerate import Accelerator
    from accelerate.utils import find_executable_batch_size
    from torch.utils.data import DataLoader

    ready()
    started, size = time.perf_counter(), rows or job.batch
    accelerator = Accelerator(cpu=True)

    def half() -> int:
        nonlocal size
        size //= 2
        return size

    # Halves, as parts must be equal; as it comes it takes nine tenths, which divide no batch.
    @find_executable_batch_size(starting_batch_size=size, reduce_batch_size_fn=half)
    def train(batch_size: int) -> None:
        accelerator.free_memory()
        accelerator.gradient_accumulation_steps = job.batch // batch_size
        model = job.model()
        optimizer = torch.optim.AdamW(model.parameters())
        loader = DataLoader(job.data, batch_size=batch_size, shuffle=True)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        steps = 0
        while True:
            for x, y in loader:
                with accelerator.accumulate(model):
                    loss = job.loss(model, x, y)
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
                if accelerator.sync_gradients:
                    steps += 1
                    if steps == 1:  # a size that makes a step may still not make another: the last word counts
                        found(batch_size, time.perf_counter() - started)
                    stepped(loss)

    train()


def plain(job: Any, rows: int | None, wrap: Callable[[Any], Any]) -> None:
    """The loop of the tutorials, with the batch in equal parts; `wrap` makes something else of each block."""
    import torch
    from torch.utils.data import DataLoader

    ready()
    rows = rows or job.batch
    parts = job.batch // rows
    found(rows, 0.0)
    model = job.model()
    model.layers = torch.nn.ModuleList([wrap(block) for block in model.layers])
    optimizer = torch.optim.AdamW(model.parameters())
    loader = DataLoader(job.data, batch_size=rows, shuffle=True)
    made = 0
    while True:
        for x, y in loader:
            loss = job.loss(model, x, y) / parts
            loss.backward()
            made += 1
            if made % parts == 0:
                optimizer.step()
                optimizer.zero_grad()
                stepped(loss * parts)


def checkpointed(block: Any) -> Any:
    import torch
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Any) -> Any:
            return checkpoint(self.block, x, use_reentrant=False)

    return Checkpointed()


# delest


def train_with_delest(name: str, budget: int, precision: str) -> None:
    import torch

    import delest
    from delest import errors, job as jobs
    from delest.backends.torch import TorchBackend
    from delest.backends.torch.session import TorchSession
    from delest.hardware import machine

    loaded = jobs.override(jobs.load(f"{HERE / 'peers_jobs.py'}:{name}"), {"recipe.precision": precision})
    TorchBackend().warm()
    started = time.perf_counter()
    try:
        plan = delest.plan(loaded, memory=budget or None, threads=torch.get_num_threads())
    except errors.NothingFits as error:
        print(
            json.dumps({"ended": type(error).__name__, "words": str(error), "smallest_bytes": error.smallest_bytes}), flush=True
        )
        return
    seconds = time.perf_counter() - started
    planning_peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10
    step = TorchSession.step

    def told(self: Any, batch: Any, rate: float) -> Any:
        made = step(self, batch, rate)
        stepped(made.loss)
        return made

    machine.reset_peak()
    TorchSession.step = told  # type: ignore[method-assign]  # a line for each step, as the others print
    print("ready", flush=True)
    sys.stdin.readline()
    found(
        plan.micro_batch,
        seconds,
        methods={choice.method: {"keeps": choice.keeps, **choice.config} for choice in plan.choices},
        predicted_bytes=plan.predicted.peak_bytes,
        predicted_step_seconds=plan.predicted.step_seconds,
        planning_peak_bytes=planning_peak,
        considered=[
            [*one.methods, one.blocks, one.micro_batch, one.peak_bytes >> 20, one.step_seconds, one.fits]
            for one in plan.considered
        ],
    )
    with tempfile.TemporaryDirectory() as folder:
        # Saved at the beginning and the end only: the parent stops this process for longer than it runs.
        run = delest.train(loaded, plan=plan, out=f"{folder}/run", checkpoint_seconds=1e6)
    done = {"ended": "done", "peak_bytes": machine.peak_resident_bytes(), "decisions": [one["kind"] for one in run.decisions]}
    print(json.dumps(done), flush=True)


def main() -> None:
    how, name, batch, *budget = sys.argv[1:]
    warnings.filterwarnings("ignore")
    sys.path.insert(0, str(HERE))
    if how.startswith("delest"):
        train_with_delest(name, int(budget[0]), "fp32" if how == "delest-fp32" else "auto")
        return
    rows = None if batch == "find" else int(batch)
    job = load(name)
    if how.startswith("lightning"):
        lightning(job, rows, how.partition("-")[2])
    elif how == "accelerate":
        accelerate(job, rows)
    else:
        plain(job, rows, checkpointed if how == "checkpoint" else lambda block: block)


if __name__ == "__main__":
    main()
