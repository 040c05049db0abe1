"""What `verify` found, as plain text: a verdict, the methods beside the plain step, and the run that was killed."""

from __future__ import annotations

from delest.records.verification import MethodCheck, ResumeCheck, Verification
from delest.reporting import text, words
from delest.units import format_seconds

HEADER = ("", "method", "results", "losses", "gradients", "weights", "allowed", "steps")


def verification_text(verification: Verification) -> str:
    """The verdict first; differences are relative, the largest of any step or tensor."""
    plan, rows = verification.plan, words.format_count(verification.rows, "row")
    facts = [
        (
            "batch",
            rows if verification.rows == plan.batch_size else f"{rows} of {plan.batch_size:,}, for which the plain step fits",
        ),
        (
            "device",
            f"{plan.device}" if plan.threads is None else f"{plan.device}, {words.format_count(plan.threads, 'thread')}",
        ),
        ("time", ", ".join(f"{stage} {format_seconds(seconds)}" for stage, seconds in verification.seconds.items())),
    ]
    methods = [_method(check) for check in verification.methods]
    return text.sections(
        words.clean(_verdict(verification)),
        ("", text.table(facts)),
        ("relative differences from the plain step", methods and text.table(methods, HEADER, right=range(3, 7))),
        ("", methods and text.table([(check.name, check.why) for check in verification.methods])),
        ("kill and resume", text.table([_resume(verification.resume)])),
    )


def _verdict(verification: Verification) -> str:
    count, resume = len(verification.methods), verification.resume
    failed = [check.name for check in verification.methods if not check.ok]
    failed += ["kill and resume"] if resume.ok is False else []
    if failed:
        checks = words.format_count(count + (resume.ok is not None), "check")
        return f"{len(failed)} of {checks} failed: {', '.join(failed)}"
    judged = sum(check.tolerance is not None for check in verification.methods)
    said = ["nothing to compare, the plan has no methods"] if not count else []
    said += [f"{words.format_count(judged, 'comparison')} within tolerance"] if judged else []
    said += (
        [f"{words.format_count(count - judged, 'comparison')} reported and not judged by difference"] if count > judged else []
    )
    said += ["a killed run goes on bit for bit" if resume.ok else "resuming was not tried"]
    return f"verified: {'; '.join(said)}"


def _method(check: MethodCheck) -> tuple[str, ...]:
    differences = (check.loss_difference, check.gradient_difference, check.weight_difference)
    shown = ("-" if value is None else _difference(value) for value in differences)
    allowed = "" if check.tolerance is None else _difference(check.tolerance)
    steps = f"{check.steps} in {check.precision}" if check.steps else ""
    return (_mark(check.ok), check.name, check.keeps, *shown, allowed, steps)


def _resume(resume: ResumeCheck) -> tuple[str, ...]:
    if resume.ok is None:
        return (_mark(None), resume.why)
    how = f"killed at step {resume.killed_at} of {resume.steps}"
    how += f", resumed from step {resume.resumed_from}" if resume.resumed_from is not None else ""
    digests = f"SHA-256 {(resume.sha256 or '')[:12]} and {(resume.resumed_sha256 or '')[:12]}"
    return (_mark(resume.ok), f"{how}: {resume.why} {digests}")


def _mark(ok: bool | None) -> str:
    return "-" if ok is None else "ok" if ok else "FAILED"


def _difference(value: float) -> str:
    """One digit is what there is to know of a rounding error."""
    return "0" if value == 0 else f"{value:.0e}" if value < 1e-3 else f"{value:.2g}"
