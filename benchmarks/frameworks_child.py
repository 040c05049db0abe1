"""One training of benchmarks/frameworks.py, in a process of its own; what it took is printed as a line of JSON.

    python frameworks_child.py fit MODEL EPOCHS                    `model.fit` with its defaults
    python frameworks_child.py delest MODEL EPOCHS [BYTES]         `delest.train`, within so much memory

Both train on the same rows with Adam, by KERAS_BACKEND.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import keras_models
import numpy as np

import delest
from delest import errors, job as jobs, malloc
from delest.frameworks.keras.session import KerasSession
from delest.hardware import machine
from delest.training.progress import Progress
from delest.verbs import training as _training  # noqa: F401  # loaded before memory is read, as all other libraries
from delest.verbs.workplace import Workplace, open_workplace

LR = 1e-3  # Keras's default, and delest's for Adam


class Clock:
    """When steps began, by epoch, and when the last one of each had ended."""

    def __init__(self) -> None:
        self.starts: list[list[float]] = []
        self.ends: list[float] = []

    def facts(self) -> dict[str, Any]:
        """Seconds of a steady step (the median of the epochs' means, but for the first) and those that steps took beyond as many steady ones: warming up."""
        steps = [(ends - starts[0]) / len(starts) for starts, ends in zip(self.starts, self.ends, strict=True)]
        steady, count = statistics.median(steps[1:] or steps), sum(map(len, self.starts))
        whole = sum(step * len(starts) for step, starts in zip(steps, self.starts, strict=True))
        return {"step_seconds": steady, "steps": count, "warming_seconds": max(0.0, whole - steady * count)}


class Told(keras.callbacks.Callback):
    """Reads the clock in `model.fit`."""

    def __init__(self, clock: Clock):
        super().__init__()
        self.clock = clock

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.clock.starts.append([])

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.clock.starts[-1].append(time.perf_counter())

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.clock.ends.append(time.perf_counter())


def arrays(place: Workplace) -> tuple[Any, Any]:
    """The rows to train on as users of Keras have them: images as floats from 0 to 1."""
    rows = np.asarray(place.splits["train"])
    inputs, targets = (array[rows] for array in place.job.data)
    return (inputs.astype("float32") / 255 if inputs.dtype == np.uint8 else inputs), targets


def compiled(place: Workplace) -> keras.Model:
    keras.utils.set_random_seed(0)
    model = place.job.model()
    model.compile(keras.optimizers.Adam(LR), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def by_fit(place: Workplace, epochs: int, clock: Clock) -> int:
    """The highest resident bytes."""
    x, y = arrays(place)
    compiled(place).fit(x, y, batch_size=place.job.batch_size, epochs=epochs, verbose=0, callbacks=[Told(clock)])
    return machine.peak_resident_bytes()


def by_delest(place: Workplace, epochs: int, clock: Clock, memory: int | None, folder: Path) -> int:
    """The highest resident bytes."""
    step, steps = KerasSession.step, place.feed("train").steps

    def timed(session: Any, batch: Any, rate: float) -> Any:
        if not clock.starts or len(clock.starts[-1]) == steps:
            clock.starts.append([])
        clock.starts[-1].append(time.perf_counter())
        found = step(session, batch, rate)
        if len(clock.starts[-1]) == steps:
            float(found.loss)
            clock.ends.append(time.perf_counter())
        return found

    KerasSession.step = timed  # type: ignore[method-assign]
    job = replace(place.job, recipe=replace(place.job.recipe, epochs=epochs, patience=epochs))
    run = delest.train(job, memory=memory, out=folder / "run", say=Progress())
    assert run.measured is not None
    return max(run.measured.peak_bytes, machine.peak_resident_bytes())


def opened(model: str) -> Workplace:
    return open_workplace(jobs.load(f"{keras_models.__file__}:{model}_job"), Progress())


def main() -> None:
    how, name, epochs, *limits = sys.argv[1:]
    memory = int(limits[0]) if limits else None
    place = opened(name)
    keras.ops.exp(keras.ops.ones((1 << 10,)))
    malloc.give_back()
    idle, clock = machine.resident_bytes(), Clock()
    machine.reset_peak()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            if how == "delest":
                peak = by_delest(place, int(epochs), clock, memory, folder)
            else:
                peak = by_fit(place, int(epochs), clock)
        except errors.NothingFits as error:
            print(json.dumps({"smallest_bytes": error.smallest_bytes}))
            return
    facts = {"seconds": time.perf_counter() - began, "peak_bytes": peak, "idle_bytes": idle}
    print(json.dumps({**facts, **clock.facts()}))


if __name__ == "__main__":
    main()
