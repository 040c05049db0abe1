"""What delest's callback costs in `model.fit`, and what it holds: on TensorFlow and torch, with and without, in one run.

    python benchmarks/keras_callback.py [--only ROW]      # in an environment with delest[keras]

A row is a model on a framework. Three processes make the same `fit`: with no callback, with one that records, and with one that also holds a budget in which the
whole batch fits twice (less room costs more: what steps free goes back then). They take a step each by turns, in every order, so that all three meet the same moments of the machine: how many times as long a step takes is the median
over turns, and over two such sets of processes. Then, in processes of their own, under a limit of the kernel's that is lowered until `fit` dies: the same fit with the callback. Limits are of two kinds. A memory cgroup counts what is resident, as containers do (it takes root
to make one): the callback holds nine tenths of it. RLIMIT_DATA counts address space, of which libraries take more than they use: the callback holds six tenths of what the fit took.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import results_file

from delest import malloc
from delest.hardware import machine

HERE = Path(__file__).parent
ROWS = tuple(f"{model} {framework}" for model in ("cnn", "mlp", "transformer") for framework in ("tensorflow", "torch"))
WAYS = ("fit", "recorded", "guarded")
SETS, STEPS, SKIPPED = 2, 24, 6  # of processes by turns, and of their steps
EPOCHS = 2  # under a limit
AMPLE_BYTES = 8 << 30
LIMITS = {"cgroup": (1.0, 0.9, 0.8, 0.7, 0.6), "data": (2.0, 1.4, 1.0, 0.8, 0.6)}  # by kind: shares of what a fit took
GROUPS = {  # files of a group: its limit, and what counts against it
    "/sys/fs/cgroup/memory": ("memory.limit_in_bytes", "memory.usage_in_bytes"),  # version 1
    "/sys/fs/cgroup": ("memory.max", "memory.current"),
}
SLOWER = 1.03


def environment_of(framework: str) -> dict[str, str]:
    return {**os.environ, "KERAS_BACKEND": framework, "TF_CPP_MIN_LOG_LEVEL": "2"}


def child(framework: str, *words: str) -> dict[str, Any] | None:
    """What a process of ours found; None where it died."""
    process = subprocess.Popen(
        [sys.executable, __file__, "child", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment_of(framework),
    )
    out, error = process.communicate()
    for root in GROUPS:  # of one that was killed
        with contextlib.suppress(OSError):
            Path(root, f"delest-{process.pid}").rmdir()
    if process.returncode == 2:
        raise SystemExit(f"{framework}: {' '.join(words)}: {error[-2000:]}")
    found: dict[str, Any] | None = json.loads(out.splitlines()[-1]) if process.returncode == 0 else None
    return found


def measure(name: str) -> dict[str, Any]:
    model, framework = name.split()
    whole = child(framework, "limited", model, "fit", "none", "0", "0")
    if whole is None:
        raise SystemExit(f"{name}: the fit ended with no limit")
    taken = whole["taken_bytes"]
    limits = {kind: under_limit(framework, model, kind, taken) for kind in LIMITS}
    return {"row": name, **turns(framework, model), "fit_bytes": taken, **limits}


def under_limit(framework: str, model: str, kind: str, taken: int) -> dict[str, Any] | None:
    """The highest limit under which a fit died that takes so many bytes, and what it did with the callback; None where it always lived."""
    for share in LIMITS[kind]:
        room = int(share * taken)
        if child(framework, "limited", model, "fit", kind, str(room), "0") is None:
            memory = int(0.9 * room) if kind == "cgroup" else int(0.6 * taken)
            held = child(framework, "limited", model, "guarded", kind, str(room), str(memory))
            return {"room_bytes": room, "memory_bytes": memory, "held": held}
    return None


def turns(framework: str, model: str) -> dict[str, Any]:
    """Seconds of each step and of what surrounds the steps of a `fit`, by way."""
    steps: dict[str, list[float]] = {way: [] for way in WAYS}
    around: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(SETS):
        with contextlib.ExitStack() as open_fits:
            fits = {way: open_fits.enter_context(stepping(framework, model, way)) for way in WAYS}
            for turn, order in zip(range(SKIPPED + STEPS), itertools.cycle(itertools.permutations(WAYS)), strict=False):
                for way in order:
                    seconds = float(fits[way]("step"))
                    if turn >= SKIPPED:
                        steps[way].append(seconds)
            for way, fit in fits.items():
                around[way].append(float(fit("end")))
    return {"steps_seconds": steps, "around_seconds": {way: statistics.median(found) for way, found in around.items()}}


@contextlib.contextmanager
def stepping(framework: str, model: str, way: str) -> Iterator[Callable[[str], str]]:
    """A process that waits before each step of its `fit` to be told "step" or "end". What tells it gives its answer: seconds of the step once the next can begin, those
    that surrounded all steps once the fit has ended."""
    words = [sys.executable, __file__, "child", "steps", model, way]
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True, env=environment_of(framework)
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        given, found = process.stdin, process.stdout

        def answer() -> str:
            while (line := found.readline()) and not line.startswith("answer"):
                pass
            if not line:
                said.seek(0)
                raise SystemExit(f"{framework}: {model}, {way}: {said.read()[-2000:]}")
            return line.removeprefix("answer").strip()

        def tell(word: str) -> str:
            with contextlib.suppress(BrokenPipeError):
                print(word, file=given, flush=True)
            return answer()

        try:
            answer()
            yield tell
        except BaseException:
            process.kill()
            raise


def steps(model: str, way: str) -> None:
    """The fit of `stepping`; at its end it gives the seconds that surrounded its steps."""
    import frameworks_child as ours
    import keras

    place = ours.opened(model)
    x, y = ours.arrays(place)
    net = ours.compiled(place)
    moments: list[float] = []  # of the fit's begin; when a step could begin and when it was told to, by turns
    ended: list[float] = []  # when epochs had ended

    class Waits(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            moments.append(time.perf_counter())
            print("answer", moments[-1] - moments[-2], flush=True)
            self.model.stop_training = input() == "end"
            moments.append(time.perf_counter())

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            ended.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        callbacks = [Waits(), *callback(way, Path(folder, "run"), AMPLE_BYTES)]
        moments.append(time.perf_counter())
        net.fit(x, y, batch_size=place.job.batch_size, epochs=SKIPPED + STEPS + 1, verbose=0, callbacks=callbacks)
        around = time.perf_counter() - ended[-1] + moments[1] - moments[0]
    print("answer", around, flush=True)


def callback(way: str, folder: Path, memory: int) -> list[Any]:
    from delest.frameworks.keras.callback import DelestCallback

    return [] if way == "fit" else [DelestCallback(memory if way == "guarded" else None, out=folder)]


@contextlib.contextmanager
def limiting(kind: str) -> Iterator[Callable[[int], None]]:
    """What lets this process take so many bytes more than it has by then. It joins a group at once, which so counts all that it has."""
    if kind != "cgroup":
        yield set_limit_on_data if kind == "data" else lambda room: None
        return
    root = next(Path(root) for root in GROUPS if Path(root, "cgroup.procs").exists())
    limit, usage = GROUPS[str(root)]
    group = root / f"delest-{os.getpid()}"
    group.mkdir()
    Path(group, "cgroup.procs").write_text(str(os.getpid()))
    try:

        def set_limit(room: int) -> None:
            Path(group, limit).write_text(str(int(Path(group, usage).read_text()) + room))

        yield set_limit
    finally:
        Path(root, "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def set_limit_on_data(room: int) -> None:
    sizes = machine.data_and_resident_bytes()
    assert sizes is not None
    resource.setrlimit(resource.RLIMIT_DATA, (sizes[0] + room, sizes[0] + room))


def limited(model: str, way: str, kind: str, room: int, memory: int) -> dict[str, Any]:
    """A `fit` that may take `room` bytes more than are taken before it, of which the callback holds `memory`."""
    with tempfile.TemporaryDirectory() as folder, limiting(kind) as set_limit:
        import frameworks_child as ours

        place = ours.opened(model)
        x, y = ours.arrays(place)
        net = ours.compiled(place)
        net.fit(x[:8], y[:8], batch_size=8, epochs=1, verbose=0)
        malloc.give_back()
        resident = machine.resident_bytes()
        machine.reset_peak()
        callbacks = callback(
            way, Path(folder, "run"), resident + memory
        )  # pages of libraries, which no group of ours holds, included
        set_limit(room)
        found = net.fit(x, y, batch_size=place.job.batch_size, epochs=EPOCHS, verbose=0, callbacks=callbacks)
        parts = getattr(callbacks[0].steps, "parts", 1) if callbacks else 1
    return {"taken_bytes": machine.peak_resident_bytes() - resident, "loss": found.history["loss"][-1], "parts": parts}


def ratios(row: dict[str, Any]) -> dict[str, float]:
    found = row["steps_seconds"]
    return {way: statistics.median(one / fit for one, fit in zip(found[way], found["fit"], strict=True)) for way in WAYS}


def show(row: dict[str, Any]) -> None:
    costs = ", ".join(f"{way} {times:.3f}" for way, times in ratios(row).items())
    print(
        f"{row['row']:24} {statistics.median(row['steps_seconds']['fit']) * 1e3:8.1f} ms a step; {costs}; {row['fit_bytes'] / 2**20:,.0f} MiB",
        flush=True,
    )
    for kind in LIMITS:
        found = row[kind]
        if found is None:
            print(f"{'':24} {kind}: no limit was found under which fit dies", flush=True)
            continue
        end = "died" if found["held"] is None else f"{found['held']['parts']} parts"
        room, memory = (found[name] / 2**20 for name in ("room_bytes", "memory_bytes"))
        print(f"{'':24} {kind}: fit dies at {room:,.0f} MiB; with the callback, which holds {memory:,.0f}: {end}", flush=True)


def bounds_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = [
        results_file.bound_at_most(f"{way}, times as long as fit, worst", max(ratios(row)[way] for row in rows), SLOWER)
        for way in WAYS[1:]
    ]
    words = {"cgroup": "a limit on memory (cgroup)", "data": "a limit on address space (RLIMIT_DATA)"}
    for kind, said in words.items():
        held = sum(row[kind] is not None and row[kind]["held"] is not None for row in rows)
        found.append(results_file.bound_at_least(f"finishes under {said} under which fit dies, of 6", held, len(rows)))
    return found


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        what, model, way, *more = sys.argv[2:]
        if what == "steps":
            steps(model, way)
        else:
            print(json.dumps(limited(model, way, more[0], int(more[1]), int(more[2]))))
        return
    options = results_file.read_options(__doc__.splitlines()[0], ROWS)
    try:
        with limiting("cgroup") as set_limit:
            set_limit(1 << 40)
    except (StopIteration, RuntimeError, OSError) as error:
        raise SystemExit(f"no memory cgroup can be made here (as root, in version 1 or 2): {error!r}") from None
    results_file.fill_table("keras_callback", ROWS, options, measure, bounds_of, show)


if __name__ == "__main__":
    main()
