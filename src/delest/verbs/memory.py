"""Memory and time of training: estimated before anything runs, or measured in real steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delest import errors, job as jobs, malloc, processes
from delest.verbs.keras_jobs import is_keras, measure_keras, refuse, sweep_keras
from delest.verbs.workplace import Workplace, check_batch, check_device, open_workplace, preprocessing_json

if TYPE_CHECKING:
    from delest.records.footprint import Footprint
    from delest.records.latency import Latency
    from delest.records.plan import Choice
    from delest.records.script import ScriptMeasurement
    from delest.training.progress import Progress

MODEL = "model.onnx"


def estimate(
    job_or_module: Any,
    inputs: Any = None,
    *,
    targets: Any = None,
    batch_size: int | None = None,
    micro_batch: int | None = None,
    sequence_length: int | None = None,
    loss: Callable[..., Any] | None = None,
    optimizer: Any = None,
    precision: str | None = None,
    device: str | None = None,
    allocator: str | None = None,
    threads: int | None = None,
    say: Progress | None = None,
) -> Footprint:
    """Peak memory and step time of training, before anything runs and without allocating the weights.

    A job, or a file with one, is traced as `train` would run it. For any `torch.nn.Module` (or a factory of one, which is
    then never allocated) give `inputs`: a tensor, a tuple for `module(*inputs)` or a mapping for `module(**inputs)`, the
    batch first; `targets` and `loss(outputs, targets)`, or nothing where the module returns its `loss`; an `optimizer`: a
    name, a factory of parameters, or an instance to be like. `precision` is fp32, bf16, fp16 (autocast) or bf16-true.

    `batch_size` (default: the job's, or that of the inputs) is done in parts of `micro_batch` rows. `device` is cpu or a name of
    the catalogue, such as a100-80. `allocator` is glibc (default on cpu), mmap (a fixed mmap threshold), exact (live tensors
    alone) or cuda.

    Raises `BadInput` for a model that cannot be built or does not take its inputs, an unknown device, a batch below 1.
    """
    sizes = None if batch_size is None else (batch_size,)
    return sweep(
        job_or_module,
        inputs,
        targets=targets,
        batch_sizes=sizes,
        micro_batch=micro_batch,
        sequence_length=sequence_length,
        loss=loss,
        optimizer=optimizer,
        precision=precision,
        device=device,
        allocator=allocator,
        threads=threads,
        say=say,
    )[0]


def sweep(
    job_or_module: Any,
    inputs: Any = None,
    *,
    batch_sizes: Sequence[int] | None = None,
    micro_batch: int | None = None,
    device: str | None = None,
    allocator: str | None = None,
    threads: int | None = None,
    say: Progress | None = None,
    **wishes: Any,
) -> tuple[Footprint, ...]:
    """`estimate` for several batch sizes (default: the job's own) from the same two traces; the other arguments are its."""
    from delest.training.progress import Progress

    say = say or Progress()
    given = [*(batch_sizes or ()), *([] if micro_batch is None else [micro_batch])]
    faults = [f"a batch of {rows!r} rows cannot be trained on: give 1 or more." for rows in given if not _counts(rows)]
    if threads is not None and not _counts(threads):
        faults.append(f"{threads!r} threads cannot compute: give 1 or more.")
    if batch_sizes and micro_batch is not None and _counts(micro_batch) and micro_batch > max(batch_sizes):
        faults.append(f"a micro-batch of {micro_batch} rows is larger than the batch of {max(batch_sizes)}.")
    length = wishes.get("sequence_length")
    if length is not None and not _counts(length):
        faults.append(f"a sequence of {length!r} tokens is no sequence: give 1 or more.")
    if faults:
        raise errors.BadInput(faults)
    if inputs is None:
        return _sweep_job(job_or_module, batch_sizes, micro_batch, device, allocator, threads, say, wishes)
    return _sweep_module(job_or_module, inputs, batch_sizes, micro_batch, device, allocator, threads, say, wishes)


def measure(
    job_or_bundle: Any,
    *,
    steps: int = 5,
    threads: int | None = None,
    device: str | None = None,
    allocator: str | None = None,
    rows: Sequence[int] = (1, 32),
    timeline: bool = True,
    say: Progress | None = None,
) -> Footprint | Latency:
    """Run real training steps of a job in a fresh process, or time a bundle (a folder with an exported model) on `rows`.

    `allocator` is the malloc that the process is started with: glibc (default), mmap, tcmalloc or jemalloc where they are installed.
    Raises `BadInput` where there is neither, or with every fault of the job; `OutOfMemory` where its steps do not fit.
    """
    from delest.hardware import machine
    from delest.records.footprint import Footprint
    from delest.records.form import from_json
    from delest.training.progress import Progress

    say = say or Progress()
    folder = _bundle(job_or_bundle)
    if folder is not None:
        from delest.footprint.latency import measure_bundle

        say.stage(f"measure: answers of {folder} in a process of its own")
        return measure_bundle(folder, rows=rows, threads=threads)
    check_device(device)
    faults = [f"{steps!r} steps cannot be measured: give 1 or more."] if not _counts(steps) else []
    variables: dict[str, str] = {}
    try:
        variables = malloc.environment(allocator or "glibc")
    except errors.BadInput as error:
        faults += error.faults
    if threads is not None and not _counts(threads):
        faults.append(f"{threads!r} threads cannot compute: give 1 or more.")
    if faults:
        raise errors.BadInput(faults)
    place = open_workplace(jobs.load(job_or_bundle), say)
    check_batch(place)
    if is_keras(place.job, place.source.schema):
        return measure_keras(place, steps=steps, threads=threads, device=device, allocator=allocator, say=say)
    if variables and place.job.origin is None:
        raise errors.BadInput(
            f"--allocator {allocator}: a job given as Python objects cannot be measured in another process; put it in a file."
        )
    say.stage(f"measure: {steps} real steps in a process of its own")
    index = place.splits["train"][: place.job.batch_size * (steps + 3)]
    found = processes.call(
        "delest.footprint.measurement:measure_job",
        place.job,
        timeout=3600.0,
        environment=variables,
        preprocessing=preprocessing_json(place),
        index=[int(row) for row in index],
        threads=threads or machine.describe().cores,
        device=device or "auto",
        steps=steps,
        timeline=timeline,
    )
    return from_json(Footprint, found)


def measure_script(command: Sequence[str], *, timeline: bool = False) -> ScriptMeasurement:
    """Run a training script that knows nothing of delest, and say what it took and what would help most.

    Standard streams, signals and the exit status are the script's own. Raises `BadInput` for a command that cannot be run.
    """
    from delest.footprint.script import measure_script as measured

    return measured(command, timeline=timeline)


def read_budget(text: str | int | None, device: str | None = None) -> int | None:
    """Bytes of a budget; a percentage is of what the device has: this machine's limit, or the catalogue's figure.

    Raises `BadInput` for a size that is none, and for an unknown device.
    """
    from delest.units import read_size

    if text is None or "%" not in str(text):
        return None if text is None else read_size(text, whole_bytes=0)
    from delest.hardware import catalogue, machine

    if device not in (None, "auto", "cpu"):
        return read_size(text, catalogue.find_device(str(device)).memory_bytes)
    here = machine.describe()
    return read_size(text, here.memory_limit_bytes or here.memory_bytes)


def _counts(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _bundle(given: Any) -> Path | None:
    """The folder with the exported model that a path names: a bundle, or a run's."""
    if not isinstance(given, (str, Path)):
        return None
    return next((folder for folder in (Path(given), Path(given, "bundle")) if (folder / MODEL).is_file()), None)


# What is estimated


def _sweep_job(
    job: Any,
    batch_sizes: Sequence[int] | None,
    micro_batch: int | None,
    device: str | None,
    allocator: str | None,
    threads: int | None,
    say: Progress,
    wishes: Mapping[str, Any],
) -> tuple[Footprint, ...]:
    from delest.hardware import machine

    loaded = _as_wished(job, wishes)
    used = threads or machine.describe().cores
    if batch_sizes:
        loaded = replace(loaded, batch_size=max(batch_sizes), set_by={**loaded.set_by, "batch_size": "argument"})
    place = open_workplace(loaded, say)
    if is_keras(place.job, place.source.schema):
        check_batch(place)
        if wishes.get("sequence_length") is not None:
            refuse(place.job, place.source.schema, "--sequence-length")
        batches = tuple(batch_sizes or (place.job.batch_size,))
        return sweep_keras(place, batches, micro_batch, device=device, allocator=allocator, threads=threads, say=say)
    from delest.backends.torch.loops import JobLoop
    from delest.footprint.estimate import choose_target, estimate_loop
    from delest.records.plan import Plan

    target = choose_target(device, allocator, used)
    batches = tuple(batch_sizes or (place.job.batch_size,))
    if micro_batch is not None and micro_batch > max(batches):
        raise errors.BadInput(f"a micro-batch of {micro_batch} rows is larger than the batch of {max(batches)}.")
    say.stage(
        f"estimate: tracing two steps of {max(batches)} rows without running them; what is new to this machine is probed once"
    )
    plan = Plan(batch_size=max(batches), micro_batch=max(batches), choices=asked_for(place.job), threads=used)
    example = example_of(place, wishes.get("sequence_length"))
    sizes = [(batch, min(batch, micro_batch or batch)) for batch in batches]
    counted = target.name == "cpu" and target.allocator != "exact"
    with _idle_process(place, used) if counted else contextlib.nullcontext(lambda: None) as idle:
        found = estimate_loop(
            lambda mode: JobLoop(place.job, plan, place.source.schema, example),
            sizes,
            target,
            evaluation_rows=lambda rows: rows if rows == micro_batch else max(rows, 256),  # as the session has it
            precision="bf16" if place.job.recipe.precision == "bf16" else "fp32",
            watched=lambda: watch(place, used, wishes.get("sequence_length")),
            idle=idle,
        )
    return tuple(found)


@contextlib.contextmanager
def _idle_process(place: Workplace, threads: int) -> Iterator[Callable[[], int | None]]:
    """Waits for what a process holds that has opened the job's data, before its model; it works while this one traces. None for a job
    that cannot be rebuilt elsewhere, and where its process fails."""
    from delest.footprint.runtime import MAPPED

    if place.job.origin is None:
        yield lambda: None
        return
    asked: dict[str, Any] = {
        "preprocessing": preprocessing_json(place),
        "index": [int(row) for row in place.splits["train"][:2]],
    }
    environment = {**MAPPED, "OMP_NUM_THREADS": str(threads)}
    function = "delest.footprint.runtime:idle_of_job"
    with processes.begin(function, place.job, environment=environment, threads=threads, **asked) as running:

        def answer() -> int | None:
            try:
                return int(running.answer(timeout=120.0))
            except errors.ProbeFailed:
                return None

        yield answer


def _as_wished(job: Any, wishes: Mapping[str, Any]) -> jobs.Job:
    """The job with an optimizer and a precision that were asked for over its own."""
    if hasattr(job, "parameters") and not isinstance(job, jobs.Job):
        raise errors.BadInput("inputs are missing: a module is estimated on what it receives, as in estimate(module, inputs).")
    stray = [name for name in ("loss", "targets") if wishes.get(name) is not None]
    if stray:
        raise errors.BadInput(f"{' and '.join(stray)}: a job has its own; they go with a module and its inputs.")
    changes = {f"recipe.{name}": wishes[name] for name in ("optimizer", "precision") if wishes.get(name) is not None}
    return jobs.override(jobs.load(job), changes)


def asked_for(job: jobs.Job) -> tuple[Choice, ...]:
    """The methods that the recipe names; those that only a probe can decide on are left out."""
    from delest.records.plan import Choice

    asked: list[tuple[str, dict[str, Any]]] = []
    if job.recipe.memory_format == "channels_last":
        asked.append(("memory_format", {"format": "channels_last"}))
    if job.recipe.precision == "bf16":
        asked.append(("precision", {"dtype": "bf16"}))
    return tuple(Choice(method=name, config=config, keeps="changed", why="the recipe asks for it") for name, config in asked)


def example_of(place: Workplace, length: int | None) -> Any:
    from delest.backends.torch.loops import with_length

    schema = place.source.schema
    if length is not None and not any(column.kind == "array" and len(column.shape) >= 1 for column in schema.inputs):
        raise errors.BadInput(
            f"--sequence-length {length}: these inputs ({place.source.description}) have no sequence axis."
            + (" The windows of a text have --context tokens." if schema.is_text else "")
        )
    batch = next(iter(place.feed("train", place.splits["train"][:2]).ordered()))
    return batch if length is None else replace(batch, inputs=with_length(batch.inputs, length))


def watch(place: Workplace, threads: int, length: int | None) -> Any:
    """The trace of real steps on few rows, from a child process: for a model that reads values of tensors."""
    from delest.records.form import from_json
    from delest.records.trace import Trace

    found = processes.call(
        "delest.footprint.watched:trace_job",
        place.job,
        preprocessing=preprocessing_json(place),
        index=[int(row) for row in place.splits["train"][:2]],
        threads=threads,
        length=length,
    )
    return from_json(Trace, found)


def _sweep_module(
    module: Any,
    inputs: Any,
    batch_sizes: Sequence[int] | None,
    micro_batch: int | None,
    device: str | None,
    allocator: str | None,
    threads: int | None,
    say: Progress,
    wishes: Mapping[str, Any],
) -> tuple[Footprint, ...]:
    from delest.backends.torch.loops import PRECISIONS, ModuleLoop, Program, with_length
    from delest.footprint.estimate import choose_target, estimate_loop
    from delest.footprint.watched import watch_loop

    precision = wishes.get("precision") or "fp32"
    if precision not in PRECISIONS:
        raise errors.BadInput(jobs.unknown("precision", precision, PRECISIONS))
    target = choose_target(device, allocator, threads)
    length = wishes.get("sequence_length")
    program = Program(
        model=module,
        inputs=inputs if length is None else with_length(inputs, length),
        targets=wishes.get("targets"),
        loss=wishes.get("loss"),
        optimizer=wishes.get("optimizer"),
        precision=precision,
        implementation=target.implementation,
    )
    batches = tuple(batch_sizes or (program.rows,))
    say.stage(
        f"estimate: tracing two steps of {max(batches)} rows without running them; what is new to this machine is probed once"
    )
    sizes = [(batch, min(batch, micro_batch or batch)) for batch in batches]
    found = estimate_loop(
        lambda mode: ModuleLoop(program, mode),
        sizes,
        target,
        precision=precision,
        whole=False,
        watched=lambda: watch_loop(lambda: ModuleLoop(program)),
        isolated=False,
    )
    return tuple(found)
