"""What benchmarks/frameworks.py times: its jobs, whose steps in delest's loop are noted where CLOCK names a file, and `model.fit` on the same rows.

python frameworks_child.py MODEL [EPOCHS]    `model.fit` with its defaults; what it took as a line of JSON
delest train frameworks_child.py:MODEL_job   by delest
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from typing import Any

import keras
import keras_models
import numpy as np

from delest import job as jobs, malloc
from delest.hardware import machine
from delest.training.loop import Trainer
from delest.training.progress import Progress
from delest.verbs.workplace import Workplace, open_workplace

LR = 1e-3  # Keras's default, and delest's for Adam


class Clock:
    """When steps began, by epoch, and when the last one of each had ended."""

    def __init__(self) -> None:
        self.starts: list[list[float]] = []
        self.ends: list[float] = []


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
    setting = json.loads(os.environ.get("SETTING", "{}"))
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(setting.get("policy", "float32"))
    with keras.RematScope(mode=setting["remat"]) if "remat" in setting else contextlib.nullcontext():
        model = place.job.model()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(LR), loss, **setting.get("compile", {}))
    return model


def opened(model: str) -> Workplace:
    return open_workplace(jobs.load(f"{keras_models.__file__}:{model}_job"), Progress())


def main() -> None:
    name, *more = sys.argv[1:]
    place = opened(name)
    epochs = int(more[0]) if more else place.job.recipe.epochs
    keras.ops.exp(keras.ops.ones((1 << 10,)))
    malloc.give_back()
    idle, clock = machine.resident_bytes(), Clock()
    machine.reset_peak()
    x, y = arrays(place)
    compiled(place).fit(x, y, batch_size=place.job.batch_size, epochs=epochs, verbose=0, callbacks=[Told(clock)])
    print(json.dumps({"idle_bytes": idle, "peak_bytes": machine.peak_resident_bytes(), "clock": vars(clock)}))


def __getattr__(name: str) -> Any:
    return getattr(keras_models, name)


def note_steps(path: str) -> None:
    """Append to a file when each step of delest's loop began, and when the last one of each epoch had ended."""
    step = Trainer._step

    def timed(trainer: Trainer, batch: Any, rate: float) -> Any:
        began = time.perf_counter()
        found = step(trainer, batch, rate)
        last = found is not None and trainer.position.row + found.count >= len(trainer.train_feed)
        if last:
            float(found.loss)
        with open(path, "a") as file:
            print(began, time.perf_counter() if last else "", file=file)
        return found

    Trainer._step = timed  # type: ignore[method-assign]


if "CLOCK" in os.environ:
    note_steps(os.environ["CLOCK"])
if __name__ == "__main__":
    main()
