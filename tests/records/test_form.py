"""The JSON form: what every record keeps on its way through a file, and what is refused when it comes back."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from delest import errors
from delest.records import footprint, hardware, latency, plan, run, script, shrunk, source, trace, verification
from delest.records.form import from_json, read_json, read_object, to_json, to_plain
from delest.storage import write_json

FOOTPRINT = footprint.Footprint(
    peak_bytes=5 << 30,
    runtime_bytes=300 << 20,
    low_bytes=4 << 30,
    high_bytes=6 << 30,
    phases={"start": 1 << 30, "steady_step": 5 << 30},
    step_seconds=0.25,
    batch_size=128,
    micro_batch=32,
    basis="estimate",
    how="probe",
    isolated=False,
)
DETAILED = dataclasses.replace(
    FOOTPRINT,
    breakdown={"parameters": 1 << 20, "runtime": 300 << 20},
    modules=(footprint.ModuleShare(name="0.layer", kind="Linear", parameter_bytes=400, seconds=0.5, flops=1e9),),
    timeline=footprint.Timeline(position=[0.0, 1.0], phase=["1 forward", "2 update"], categories={"data": [1, 2]}, peak=1),
    validated_on=("EPYC",),
    notes=("a rule",),
)
ROOFLINE = hardware.Roofline(
    device="EPYC",
    threads=2,
    flops={"matmul.fp32": 8e10},
    reused_bytes=1.5e10,
    fresh_bytes=1e9,
    cached_bytes=2e10,
    overhead_seconds=5e-6,
    source="micro-probes",
)
DEVICE = hardware.Device(
    name="t4",
    title="NVIDIA T4",
    memory_bytes=16 << 30,
    bandwidth_bytes=3.2e11,
    flops={"fp32": 8.1e12},
    capability="7.5",
    released=2018,
    source="https://example.org/t4.pdf",
)
TRACE = trace.Trace(
    storages=trace.Storages(
        born=[0], dies=[1], fixed_bytes=[4.0], per_sample_bytes=[0.5], category=["parameters"], module=["0"]
    ),
    operators=trace.Operators(
        name=["aten.mm.default"],
        module=["0"],
        phase=["forward"],
        step=[1],
        reads=[(0,)],
        writes=[()],
        kind=["matmul"],
        dtype=["fp32"],
        fixed_flops=[2.0],
        per_sample_flops=[1.0],
        fixed_moved_bytes=[8.0],
        per_sample_moved_bytes=[4.0],
        fixed_scratch_bytes=[0.0],
        per_sample_scratch_bytes=[0.0],
        signature=[""],
    ),
    rows=(2, 8),
    how="fake tensors",
    modules={"0": "Linear"},
)
TIMING = latency.Timing(rows=32, seconds=0.01, seconds_spread=0.001, rows_per_second=3200.0, peak_bytes=90 << 20)
SEEN = script.ScriptMeasurement(
    command=("python", "train.py"),
    status=0,
    seconds=3.5,
    peak_bytes=1 << 30,
    optimizers=(script.OptimizerUse(name="AdamW", steps=10, parameter_bytes=4, state_bytes=8, implementation="loop"),),
    remedies=(script.Remedy(what="fused AdamW", saved_seconds=0.01, code="fused=True"),),
)
COLUMN = source.Column(name="colour", kind="category", shape=(), dtype="str", categories=("blue", "rot"), missing=3)
HARDWARE = hardware.Hardware(
    processor="EPYC",
    cores=2,
    instruction_sets=("avx2", "fma"),
    memory_bytes=16 << 30,
    memory_limit_bytes=None,
    available_bytes=8 << 30,
    accelerators=(hardware.Accelerator(name="H100", memory_bytes=80 << 30, capability="9.0", usable=True),),
)
PLAN = plan.Plan(
    choices=(plan.Choice(method="micro_batch", config={"rows": 32}, keeps="rounding", why="it fits", cost_seconds=-0.5),),
    batch_size=128,
    micro_batch=32,
    memory_bytes=2 << 30,
    predicted=FOOTPRINT,
    rejected=(plan.Rejection(method="bf16", why="slower"),),
    threads=2,
    code="for x in y:\n    ...\n",
    seconds={"probing": 1.5},
)
SUMMARY = run.Summary(
    source="10 images",
    fingerprint="9f",
    rows=10,
    kind="images",
    columns=({"name": "image", "shape": [28, 28, 1], "mean": 33.4},),
    target="label",
    classes={"cat": 4, "dog": 6},
    splits={"train": 7},
    row_bytes=3136,
    notes=("few rows",),
    baseline={"accuracy": 0.6},
)
BOUND = shrunk.Bound(drop=0.001, upper=0.004, rows=1000, disagreeing=0.015)
CANDIDATE = shrunk.Candidate(
    name="int8",
    runtime="ONNX Runtime",
    file_bytes=4096,
    weights_bytes=16384,
    latency_seconds={1: 0.001, 32: 0.02},
    latency_spread={1: (0.0009, 0.0011), 32: (0.018, 0.022)},
    selection={"accuracy": 0.98},
    bound=BOUND,
    parity=1e-5,
)
METHOD_CHECK = verification.MethodCheck(
    name="micro_batch",
    keeps="rounding",
    ok=True,
    why="within 1e-09",
    steps=20,
    precision="fp64",
    tolerance=1e-9,
    loss_difference=0.0,
    gradient_difference=3e-16,
)
RESUME_CHECK = verification.ResumeCheck(ok=True, why="the same", steps=8, killed_at=6, resumed_from=5, sha256="1b9e")
EXAMPLES: tuple[Any, ...] = (
    FOOTPRINT,
    *DETAILED.modules,
    DETAILED.timeline,
    ROOFLINE,
    DEVICE,
    TRACE,
    TRACE.storages,
    TRACE.operators,
    TIMING,
    latency.Latency(
        path="runs/x/bundle",
        timings=(TIMING,),
        peak_bytes=90 << 20,
        runtime_bytes=60 << 20,
        loaded_bytes=9 << 20,
        model_bytes=1 << 20,
        providers=("CPUExecutionProvider",),
        threads=None,
    ),
    SEEN,
    *SEEN.optimizers,
    *SEEN.remedies,
    COLUMN,
    source.Target(name="label", kind="class", classes=("cat", "dog")),
    source.Schema(inputs=(COLUMN,), target=source.Target(name="price", kind="number")),
    HARDWARE,
    *HARDWARE.accelerators,
    hardware.Check(name="torch", ok=False, detail="missing", remedy="pip install torch", essential=True),
    hardware.Diagnosis(
        hardware=HARDWARE,
        versions={"torch": "2.13.0"},
        extras={"keras": False},
        checks=(hardware.Check(name="torch", ok=True, detail="2.13.0"),),
    ),
    PLAN,
    *PLAN.choices,
    *PLAN.rejected,
    SUMMARY,
    run.Best(step=40, epoch=2.5, score=0.97),
    run.Run(
        path=Path("runs/digits-001"),
        name="digits-001",
        status="done",
        job={"seed": 3, "recipe": {"augment": ["flip"], "lr": None}},
        metric="accuracy",
        steps=40,
        epochs=2.5,
        stopped_by="plateau",
        plan=PLAN,
        measured=FOOTPRINT,
        best=run.Best(step=40, epoch=2.5, score=0.97),
        validation={"accuracy": 0.97},
        test={"accuracy": 0.96, "loss": 0.1},
        data=SUMMARY,
        decisions=({"kind": "decay", "at": 30},),
        preview={"share": 0.05},
        weights_sha256="ab",
        versions={"torch": "2.13.0"},
    ),
    BOUND,
    CANDIDATE,
    shrunk.Stage(name="pruned-1", accepted=False, why="it loses 0.03", parameters=7, seconds=2.5),
    shrunk.Shrunk(
        path=Path("runs/digits-001/shrunk"), shipped="int8", metric="accuracy", max_drop=0.005, candidates=(CANDIDATE,)
    ),
    plan.Option(
        methods=("activation_checkpointing",),
        blocks=4,
        micro_batch=32,
        peak_bytes=1,
        step_seconds=0.5,
        fits=True,
        keeps="bitwise",
    ),
    METHOD_CHECK,
    RESUME_CHECK,
    verification.Verification(
        ok=True,
        plan=plan.Plan(batch_size=8, micro_batch=8),
        methods=(METHOD_CHECK,),
        resume=RESUME_CHECK,
        rows=8,
        seconds={"comparing": 1.5},
    ),
)


def records() -> set[Any]:
    rooms = (footprint, hardware, latency, plan, run, script, shrunk, source, trace, verification)
    return {
        kind
        for room in rooms
        for _, kind in inspect.getmembers(room, dataclasses.is_dataclass)
        if kind.__module__ == room.__name__
    }


def through_json(record: Any) -> Any:
    return from_json(type(record), json.loads(json.dumps(to_json(record), allow_nan=False)))


def refuse(kind: type, data: Any) -> tuple[str, ...]:
    with pytest.raises(errors.BadInput) as raised:
        from_json(kind, data, "run.json")
    return raised.value.faults


# There and back


def test_every_record_has_an_example_here():
    assert {type(record) for record in EXAMPLES} == records()


@pytest.mark.parametrize("record", EXAMPLES, ids=lambda record: type(record).__name__)
def test_a_record_comes_back_as_it_was(record):
    again = through_json(record)
    assert again == record
    assert repr(again) == repr(record)  # tuples are tuples, paths are paths, whole numbers are whole


@pytest.mark.parametrize("record", EXAMPLES, ids=lambda record: type(record).__name__)
def test_a_record_comes_back_from_a_file(tmp_path, record):
    write_json(tmp_path / "x.json", record)
    assert read_json(type(record), tmp_path / "x.json") == record
    assert read_object(tmp_path / "x.json").keys() == {item.name for item in dataclasses.fields(record)}


def test_defaults_need_not_be_in_the_file():
    assert from_json(plan.Plan, {"batch_size": 8, "micro_batch": 8}) == plan.Plan(batch_size=8, micro_batch=8)


def test_fields_that_are_not_known_are_passed_over():
    assert from_json(run.Best, {"step": 1, "epoch": 1.0, "score": 0.5, "later": 1}) == run.Best(step=1, epoch=1.0, score=0.5)


def test_the_format_is_written_first_and_read():
    data = to_json(run.Best(step=1, epoch=1.0, score=0.5))
    assert list(data) == ["format", "step", "epoch", "score"]
    assert data["format"] == 1
    data_before = dict(data)
    from_json(run.Best, data)
    assert data == data_before


def test_batch_sizes_stay_whole_numbers():
    again = through_json(CANDIDATE)
    assert {type(key) for key in again.latency_seconds} == {int}
    assert again.latency_spread[32] == (0.018, 0.022)


@given(
    st.builds(
        shrunk.Candidate,
        name=st.text(),
        runtime=st.text(),
        file_bytes=st.none() | st.integers(0, 1 << 60),
        weights_bytes=st.integers(0, 1 << 60),
        latency_seconds=st.dictionaries(st.integers(1, 4096), st.floats(0, 1e9)),
        latency_spread=st.dictionaries(st.integers(1, 4096), st.tuples(st.floats(0, 1e9), st.floats(0, 1e9))),
        selection=st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False)),
        bound=st.none() | st.just(BOUND),
        parity=st.none() | st.floats(0, 1e9),
        kept=st.booleans(),
        why=st.text(),
    )
)
def test_any_candidate_comes_back(candidate):
    assert through_json(candidate) == candidate


# Numbers that JSON does not know


def test_what_is_not_finite_is_null():
    assert to_plain({"a": math.nan, "b": [math.inf, -math.inf], "c": 1.5}) == {"a": None, "b": [None, None], "c": 1.5}


def test_a_score_that_was_not_defined_comes_back_as_nan():
    undefined = run.Run(
        path=Path("r"),
        name="r",
        status="done",
        best=run.Best(step=1, epoch=1.0, score=math.nan),
        test={"auc": math.nan, "loss": 0.5},
    )
    again = through_json(undefined)
    assert math.isnan(again.best.score)
    assert math.isnan(again.test["auc"])
    assert dataclasses.replace(again, best=None, test={}) == dataclasses.replace(undefined, best=None, test={})
    assert again.test["loss"] == 0.5


def test_undefined_numbers_deep_inside_come_back_too():
    candidate = dataclasses.replace(CANDIDATE, latency_seconds={1: math.nan, 32: 0.02}, latency_spread={1: (math.inf, 1.0)})
    record = shrunk.Shrunk(path=Path("s"), shipped="int8", metric="auc", max_drop=0.0, candidates=(CANDIDATE, candidate))
    again = through_json(record).candidates[1]
    assert math.isnan(again.latency_seconds[1])
    assert again.latency_seconds[32] == 0.02
    assert math.isnan(again.latency_spread[1][0])
    assert again.latency_spread[1][1] == 1.0


def test_none_where_none_is_allowed_stays_none():
    assert through_json(dataclasses.replace(CANDIDATE, parity=math.nan)).parity is None


def test_null_beside_another_fault_is_not_blamed():
    assert refuse(run.Best, {"step": "x", "epoch": None, "score": None}) == (
        "run.json: step: Input should be a valid integer, unable to parse string as an integer",
    )


# Plain data


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.float64("nan"), None),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (np.array([1.0, np.nan]), [1.0, None]),
        (np.array(7), 7),
        (np.str_("x"), "x"),
        (Path("a/b"), "a/b"),
        ((1, (2, 3)), [1, [2, 3]]),
        ({1: Path("a"), np.int64(2): ()}, {"1": "a", "2": []}),
        (run.Best(step=1, epoch=0.5, score=1.0), {"step": 1, "epoch": 0.5, "score": 1.0}),
        ({"best": [run.Best(step=1, epoch=0.5, score=1.0)]}, {"best": [{"step": 1, "epoch": 0.5, "score": 1.0}]}),
        (None, None),
        (True, True),
        ("text", "text"),
    ],
)
def test_plain_data(value, plain):
    found = to_plain(value)
    assert found == plain
    assert type(found) is type(plain)
    json.dumps(found, allow_nan=False)


# Refused


def test_a_newer_format_is_refused():
    (fault,) = refuse(run.Best, {"format": 2, "step": 1, "epoch": 1.0, "score": 0.5})
    assert fault == ("run.json has format 2, this delest reads up to 1: a newer delest wrote it; upgrade delest to read it.")


def test_a_format_that_is_no_number_is_refused():
    assert "has format two" in refuse(run.Best, {"format": "two", "step": 1, "epoch": 1.0, "score": 0.5})[0]


def test_missing_fields_are_all_named():
    assert refuse(run.Best, {"step": 1}) == ("run.json: epoch: Field required", "run.json: score: Field required")


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"batch_size": "many"}, "batch_size"),
        ({"batch_size": 1.5}, "batch_size"),
        ({"micro_batch": None}, "micro_batch"),
        ({"device": 5}, "device"),
        ({"choices": 3}, "choices"),
        ({"choices": [{"method": "m", "config": {}, "keeps": "most", "why": ""}]}, "choices.0.keeps"),
        ({"seconds": {"probing": "long"}}, "seconds.probing"),
        ({"predicted": {"peak_bytes": 1}}, "predicted.runtime_bytes"),
    ],
)
def test_a_wrong_type_is_named_with_its_place(changes, place):
    faults = refuse(plan.Plan, {"batch_size": 8, "micro_batch": 8, **changes})
    assert f"run.json: {place}: " in faults[0]


@pytest.mark.parametrize("data", [[], [1], "text", 3, None])
def test_what_is_no_object_is_refused(tmp_path, data):
    assert "not an object" in refuse(run.Best, data)[0]
    (tmp_path / "x.json").write_text(json.dumps(data))
    with pytest.raises(errors.BadInput, match=r"x\.json holds a JSON .*, not an object"):
        read_json(run.Best, tmp_path / "x.json")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(errors.BadInput, match=r"none\.json does not exist"):
        read_json(run.Best, tmp_path / "none.json")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\xff", b"kept", b'{"step": 1}}'])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(errors.BadInput, match=r"x\.json is not valid JSON"):
        read_json(run.Best, tmp_path / "x.json")


def test_a_file_of_a_newer_format_is_named(tmp_path):
    (tmp_path / "x.json").write_text('{"format": 99}')
    with pytest.raises(errors.BadInput, match=r"x\.json has format 99"):
        read_object(tmp_path / "x.json")
