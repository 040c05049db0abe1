from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from delest.records.hardware import Check, Diagnosis, Roofline
from delest.records.plan import Plan
from delest.records.shrunk import Bound, Candidate, Shrunk
from delest.reporting import text, words
from reporting import samples

FOLDER = Path("runs/digits-001")


def first(output: str) -> str:
    return output.splitlines()[0]


def row(output: str, start: str) -> str:
    """The first line below the verdict that begins so."""
    return next(line.strip() for line in output.splitlines()[1:] if line.strip().startswith(start))


def every_text() -> list[str]:
    long = "x" * 300
    summary = replace(
        samples.digits_summary(),
        notes=(f"{long} and more words " * 3,),
        classes={f"class {k} {long}": k for k in range(40)},
        columns=tuple(
            {"name": f"{long}{k}", "kind": "number", "dtype": "float64", "mean": 1 / 3, "std": 1e-9} for k in range(40)
        ),
    )
    return [
        text.summary_text(summary),
        text.plan_text(samples.digits_plan()),
        text.run_text(samples.digits_run(FOLDER)),
        text.run_text(samples.houses_run(FOLDER)),
        text.shrunk_text(samples.digits_shrunk(FOLDER)),
    ]


def test_a_table_aligns_wraps_and_shortens():
    made = text.table([("a", "1", "one"), ("b" * 40, "22", "word " * 40)], ("name", "rows", "why"), right=(1,))
    lines = made.splitlines()
    assert lines[0].index("why") == lines[1].index("one") == lines[2].index("word")
    assert lines[1].index("1") == lines[2].index("22") + 1
    assert "b" * 27 + "…" in lines[2]
    assert all(len(line) <= 100 for line in lines)
    assert made.count("word") == 40


def test_tables_keep_to_the_width():
    for output in every_text():
        assert max(map(len, output.splitlines()[1:])) <= 100, output


def test_names_cannot_send_commands_to_the_terminal():
    summary = replace(
        samples.digits_summary(), source="\x1b]0;owned\x07", classes={"\x1b[2J": 5, "a\nb": 5}, notes=("\x9b31m",)
    )
    output = text.summary_text(summary) + text.run_text(samples.digits_run(FOLDER, metric="a\x1b[1m"))
    assert all(character.isprintable() or character == "\n" for character in output)
    assert "�[2J" in output


def test_the_summary_opens_with_rows_and_classes_and_shows_what_is_there():
    output = text.summary_text(samples.digits_summary())
    assert first(output) == "usable: 10,000 rows of images, 10 classes"
    assert row(output, "splits") == "splits             train 7,000, validation 1,000, selection 1,000, test 1,000"
    assert row(output, "baseline accuracy").endswith("11.2 %")
    assert "28 x 28 x 1" in row(output, "image")
    assert row(output, "5 ").startswith("5    863   8.6 %  ####")
    assert "- 36 rows occur twice" in output


def test_a_table_without_classes_names_its_target_and_what_was_left_out():
    output = text.summary_text(samples.houses_run(FOLDER).data)
    assert first(output) == "usable: 4,000 rows of a table, target price, 1 left out"
    assert "classes" not in output
    assert "- row 17: price is missing" in output


def test_lists_are_counted_beyond_a_dozen():
    output = text.summary_text(
        replace(samples.digits_summary(), classes={str(k): 1 for k in range(100)}, left_out=("bad.png",) * 30)
    )
    assert "and 88 more" in output
    assert "and 18 more" in output


def test_the_plan_says_whether_it_fits_and_why():
    output = text.plan_text(samples.digits_plan())
    assert first(output) == "fits: 518 MiB of 640 MiB, 31 ms a step"
    assert "128 rows in 4 parts of 32" in output
    assert row(output, "fused_optimizer").split()[1] == "-2"
    assert "bf16  1.9 times slower than fp32 on this processor" in output
    assert "optimizer.step()" in output


def test_a_plan_that_does_not_fit_or_predicts_nothing_says_so():
    tight = replace(samples.digits_plan(), memory_bytes=500 * samples.MIB)
    assert first(text.plan_text(tight)).startswith("does not fit: 518 MiB of 500 MiB")
    bare = text.plan_text(Plan(batch_size=8, micro_batch=8))
    assert first(bare) == "0 methods chosen; memory was not predicted"
    assert row(bare, "batch") == "batch   8 rows"
    assert first(text.plan_text(replace(samples.digits_plan(), memory_bytes=None))) == "fits: 518 MiB, 31 ms a step"


def test_a_run_opens_with_quality_time_and_memory():
    output = text.run_text(samples.digits_run(FOLDER))
    assert first(output) == "98.2 % accuracy on 1,000 test rows (validation 97.9 %), trained in 41 s, peak 530 MiB"
    assert (
        row(output, "trained") == "trained         10 epochs, 550 steps; ended because the validation score stopped improving"
    )
    assert row(output, "best").endswith("epoch 9, step 495: validation accuracy 97.9 %")
    assert row(output, "predicted peak").endswith("518 MiB (504 MiB to 546 MiB), 31 ms a step")
    assert row(output, "time") == "time            47 s: inspecting 0.60 s, planning 3.1 s, training 41 s, evaluating 1.8 s"
    assert row(output, "files").endswith(str(FOLDER))


def test_a_run_without_test_rows_says_that_validation_speaks():
    assert first(text.run_text(samples.houses_run(FOLDER))) == (
        "interrupted after 4.8 epochs, resumable: RMSE 31,250 on 800 validation rows (no test rows), trained in 2.5 s"
    )


def test_a_run_that_only_began_reads_well():
    began = samples.digits_run(
        FOLDER, status="running", test={}, validation={}, best=None, measured=None, seconds={}, stopped_by=None, epochs=0.0
    )
    assert first(text.run_text(began)) == "still training after 0 epochs: nothing evaluated yet"


def test_a_preview_is_compared_with_the_run():
    preview = {
        "share": 0.05,
        "rows": 350,
        "epochs": 12,
        "validation": {},
        "seconds": 4.0,
        "full_seconds": 44.0,
        "peak_bytes": 525 * samples.MIB,
    }
    assert "a preview on 5 % of the rows foretold 44 s and 525 MiB" in text.run_text(
        samples.digits_run(FOLDER, preview=preview)
    )


def test_shrinking_opens_with_what_ships_and_its_gains():
    output = text.shrunk_text(samples.digits_shrunk(FOLDER))
    assert (
        first(output)
        == "int8 ships: 3.9 times smaller, 1.3 times faster at batch 1, accuracy within 0.33 points (promised 0.5)"
    )
    assert row(output, "int8").split() == ["int8", "1.2", "MiB", "470", "µs", "6.4", "ms", "97.70", "%", "0.33", "ships"]
    assert "95 % paired bound on 1,000 selection rows" in output


def test_a_rejected_form_gives_its_reason():
    output = text.shrunk_text(samples.digits_shrunk(FOLDER, shipped="fp32"))
    assert first(output).startswith("fp32 ships: the same size, 1.2 times faster at batch 1")
    assert row(output, "int8").endswith("no")
    assert "its bound of 0.7 points is above the 0.5 that were promised" in output


def test_a_bound_without_any_difference_is_not_called_a_proof():
    shrunk = samples.digits_shrunk(FOLDER, shipped="fp32")
    output = text.shrunk_text(shrunk)
    assert first(output) == "fp32 ships: the same size, 1.2 times faster at batch 1, the same accuracy on all 1,000 rows"
    assert "no row differs" in row(output, "fp32")


def test_timings_that_overlap_are_not_called_faster():
    shrunk = samples.digits_shrunk(FOLDER)
    restless = replace(shrunk.candidates[2], latency_spread={1: (0.0003, 0.00065), 32: (0.006, 0.007)})
    assert "as fast at batch 1" in first(text.shrunk_text(replace(shrunk, candidates=(*shrunk.candidates[:2], restless))))


def test_a_bound_that_could_not_be_computed_is_said_to_be_unknown():
    shrunk = samples.digits_shrunk(FOLDER)
    blind = replace(shrunk.candidates[2], bound=Bound(drop=0.01, upper=float("nan"), rows=2, disagreeing=1.0))
    assert row(text.shrunk_text(replace(shrunk, candidates=(*shrunk.candidates[:2], blind))), "int8").endswith("unknown  ships")


def test_shipping_the_trained_model_itself_claims_nothing():
    only = Candidate(
        name="torch",
        runtime="PyTorch eager",
        file_bytes=None,
        weights_bytes=10,
        latency_seconds={},
        latency_spread={},
        selection={},
    )
    shrunk = Shrunk(path=FOLDER, shipped="torch", metric="rmse", max_drop=0.1, candidates=(only,))
    assert first(text.shrunk_text(shrunk)) == "torch ships: the trained model as it is, since nothing else was kept"
    assert "not measured" in text.shrunk_text(shrunk)


def test_the_diagnosis_counts_failures_and_gives_remedies():
    good, bad = (
        Check(name="torch", ok=True, detail="2.13.0"),
        Check(name="disk", ok=False, detail="full", remedy="free some space"),
    )
    diagnosis = Diagnosis(hardware=samples.HARDWARE, versions={"torch": "2.13.0"}, extras={"keras": False}, checks=(good, bad))
    output = text.diagnosis_text(diagnosis)
    assert first(output) == "1 of 2 checks failed"
    assert "remedy: free some space" in output
    assert "pip install 'delest[keras]'" in output
    assert first(text.diagnosis_text(replace(diagnosis, checks=(good,)))) == "ready: 1 check passed"


def test_the_diagnosis_shows_caches_what_was_measured_and_what_was_cleared():
    roofline = Roofline(
        device="cpu",
        threads=1,
        flops={"matmul.fp32": 77.4e9, "matmul.bf16": 1.3e12, "depthwise.fp32": 2e9},
        reused_bytes=17e9,
        fresh_bytes=950e6,
        cached_bytes=1e12,
        overhead_seconds=4e-6,
        source="micro-probes",
    )
    here = replace(samples.HARDWARE, cache_bytes={"L1d": 32 << 10, "L3": 32 << 20}, swap_bytes=2 << 30)
    diagnosis = Diagnosis(hardware=here, versions={}, extras={}, checks=(), roofline=roofline, cleared_bytes=3 << 20)
    lines = text.diagnosis_text(diagnosis).splitlines()
    assert "the cache was emptied: 3 MiB freed" in lines
    shown = {line.split("  ")[1]: line.split("  ")[-1].strip() for line in lines if line.startswith("  ")}
    assert shown["caches"] == "L1d 32 KiB, L3 32 MiB"
    assert shown["swap"] == "2 GiB"
    assert shown["matmul"] == "fp32 77.4 GFLOP/s, bf16 1.3 TFLOP/s"
    assert shown["depthwise"] == "fp32 2 GFLOP/s"
    assert shown["memory"] == "reused 17 GB/s, fresh 950 MB/s, in the cache 1 TB/s"
    assert shown["small operator"] == "4 µs"
    assert shown["source"] == "measurement, 1 thread: micro-probes"
    plain = text.diagnosis_text(replace(diagnosis, hardware=samples.HARDWARE, roofline=None, cleared_bytes=None))
    assert not any(word in plain for word in ("caches", "swap", "matmul", "emptied"))


@pytest.mark.parametrize(
    ("metric", "value", "shown"),
    [
        ("accuracy", 0.98234, "98.2 %"),
        ("balanced_accuracy", 1.0, "100.0 %"),
        ("loss", 0.063412, "0.06341"),
        ("rmse", 31_250.4, "31,250"),
        ("auc", 0.98765, "0.9877"),
        ("rmse", float("inf"), "not finite"),
        ("loss", None, "not measured"),
    ],
)
def test_metrics_are_shown_by_their_kind(metric, value, shown):
    assert words.format_metric(metric, value) == shown


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (39, 10, "3.9 times smaller"),
        (10, 12, "1.2 times larger"),
        (100, 98, "the same size"),
        (0, 5, "the same size"),
        (1000, 10, "100 times smaller"),
    ],
)
def test_ratios_are_said_in_words(before, after, said):
    assert words.ratio_words(before, after, "smaller", "larger", "the same size") == said


def test_what_the_guard_decided_is_a_line_each():
    split = {"kind": "split", "at": 1200, "phase": "backward", "parts": 2, "why": "memory ran out in the backward phase"}
    growth = {"kind": "growth", "at": 1300, "bytes_per_step": 1 << 18, "why": "memory grows by 256 KiB a step"}
    output = text.run_text(samples.digits_run(FOLDER, decisions=(split, growth)))
    lines = [line.split(maxsplit=1)[1] for line in output.splitlines() if line.split()[:1] == ["decision"]]
    assert lines == [
        "step 1,200, split: memory ran out in the backward phase",
        "step 1,300, growth: memory grows by 256 KiB a step",
    ]
