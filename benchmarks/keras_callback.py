"""What delest's callback costs in `model.fit`, and what it holds: on TensorFlow and torch, with and without, in one run.

    python benchmarks/keras_callback.py [--only ROW]      # in an environment with delest[keras]

A row is a model on a framework. In one process the same `fit` is made by turns with no callback, with one that records, and with one that also holds a budget in
which the whole batch fits: the seconds of a step are the median over all turns, but for the first steps of each. Then, in processes of their own, under a limit of the
kernel's (RLIMIT_DATA) that is lowered until `fit` dies: the same fit with the callback, which holds half of what the fit took.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import results_file

HERE = Path(__file__).parent
ROWS = tuple(f"{model} {framework}" for model in ("cnn", "mlp", "transformer") for framework in ("tensorflow", "torch"))
WAYS = ("fit", "recorded", "guarded")
ROUNDS, SKIPPED, EPOCHS = 6, 3, 2
AMPLE_BYTES = 8 << 30
SHARES = (2.0, 1.4, 1.0, 0.8, 0.6)  # of what a fit took, as the limit
SLOWER = 1.03


def child(framework: str, *words: str) -> dict[str, Any] | None:
    """What a process of ours found; None where it died."""
    environment = {**os.environ, "KERAS_BACKEND": framework, "TF_CPP_MIN_LOG_LEVEL": "2"}
    done = subprocess.run([sys.executable, __file__, "child", *words], capture_output=True, text=True, env=environment)
    if done.returncode == 2:
        raise SystemExit(f"{framework}: {' '.join(words)}: {done.stderr[-2000:]}")
    found: dict[str, Any] | None = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
    return found


def measure(name: str) -> dict[str, Any]:
    model, framework = name.split()
    turns, whole = child(framework, "turns", model), child(framework, "limited", model, "fit", "0", "0")
    if turns is None or whole is None:
        raise SystemExit(f"{name}: the fit ended with no limit")
    row, taken = {"row": name, **turns, "fit_bytes": whole["taken_bytes"]}, whole["taken_bytes"]
    for share in SHARES:
        room = int(share * taken)
        if child(framework, "limited", model, "fit", str(room), "0") is None:
            held = child(framework, "limited", model, "guarded", str(room), str(taken // 2))
            return {**row, "room_bytes": room, "held": held}
    return row


def turns(model: str) -> dict[str, Any]:
    """Seconds of a step and of what surrounds the steps of a `fit`, by way."""
    import frameworks_child as ours

    place = ours.opened(model)
    x, y = ours.arrays(place)
    models = {way: ours.compiled(place) for way in WAYS}
    steps: dict[str, list[float]] = {way: [] for way in WAYS}
    around: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(ROUNDS + 1):  # the first compiles
            for way in WAYS:
                clock = ours.Clock()
                callbacks = [ours.Told(clock), *callback(way, Path(folder, f"{way}-{turn}"), AMPLE_BYTES)]
                began = time.perf_counter()
                models[way].fit(x, y, batch_size=place.job.batch_size, epochs=1, verbose=0, callbacks=callbacks)
                if turn:
                    moments = [*clock.starts[0], clock.ends[0]]
                    steps[way] += [
                        after - before for before, after in zip(moments[SKIPPED:], moments[SKIPPED + 1 :], strict=False)
                    ]
                    around[way].append(time.perf_counter() - began - (moments[-1] - moments[0]))
    return {
        "step_seconds": {way: statistics.median(found) for way, found in steps.items()},
        "around_seconds": {way: statistics.median(found) for way, found in around.items()},
    }


def callback(way: str, folder: Path, memory: int) -> list[Any]:
    from delest.frameworks.keras.callback import DelestCallback

    return [] if way == "fit" else [DelestCallback(memory if way == "guarded" else None, out=folder)]


def limited(model: str, way: str, room: int, memory: int) -> dict[str, Any]:
    """A `fit` that may take `room` bytes more than are taken before it, of which the callback holds `memory`; no limit where `room` is 0."""
    import frameworks_child as ours

    from delest import malloc
    from delest.hardware import machine

    place = ours.opened(model)
    x, y = ours.arrays(place)
    net = ours.compiled(place)
    net.fit(x[:8], y[:8], batch_size=8, epochs=1, verbose=0)
    malloc.give_back()
    data, resident = machine.data_and_resident_bytes()
    machine.reset_peak()
    if room:
        resource.setrlimit(resource.RLIMIT_DATA, (data + room, data + room))
    with tempfile.TemporaryDirectory() as folder:
        callbacks = callback(way, Path(folder, "run"), resident + memory)
        found = net.fit(x, y, batch_size=place.job.batch_size, epochs=EPOCHS, verbose=0, callbacks=callbacks)
        parts = getattr(callbacks[0].steps, "parts", 1) if callbacks else 1
    return {"taken_bytes": machine.peak_resident_bytes() - resident, "loss": found.history["loss"][-1], "parts": parts}


def ratios(row: dict[str, Any]) -> dict[str, float]:
    return {way: row["step_seconds"][way] / row["step_seconds"]["fit"] for way in WAYS}


def show(row: dict[str, Any]) -> None:
    step, held = row["step_seconds"]["fit"] * 1e3, row.get("held")
    end = "died" if held is None else f"{held['parts']} parts"
    under = f"of {row['room_bytes'] / 2**20:,.0f} MiB: with it {end}" if "room_bytes" in row else "was not found"
    costs = ", ".join(f"{way} {times:.3f}" for way, times in ratios(row).items())
    print(f"{row['row']:24} {step:8.1f} ms a step; {costs}; a limit under which fit dies {under}", flush=True)


def bounds_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = [
        results_file.bound_at_most(f"{way}, times as long as fit, worst", max(ratios(row)[way] for row in rows), SLOWER)
        for way in WAYS[1:]
    ]
    held = sum(row.get("held") is not None for row in rows)
    return [*found, results_file.bound_at_least("finishes under a limit under which fit dies, of 6", held, len(rows))]


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        what, model, *more = sys.argv[2:]
        print(json.dumps(turns(model) if what == "turns" else limited(model, more[0], int(more[1]), int(more[2]))))
        return
    options = results_file.read_options(__doc__.splitlines()[0], ROWS)
    results_file.fill_table("keras_callback", ROWS, options, measure, bounds_of, show)


if __name__ == "__main__":
    main()
